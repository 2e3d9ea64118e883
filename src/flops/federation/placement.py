"""Placement: which cluster each learner belongs to, decided by the root from how far away the learners are.

A learner first connects to the root, which measures the round trip of a few small messages, waits until it
has measured everybody (or its deadline), and divides: clusters of equal size, neighbours in distance
together, so that no cluster waits for one far learner. Learners are told where to connect, clusters who
their learners are. The decision is a file; it is made once, and holds for all lives of the root.
"""

import json
import logging
import statistics
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.flight as flight

from flops.core.errors import FailedError
from flops.federation import wire

log = logging.getLogger(__name__)

COMMAND = b"flops-placement-1"
_PINGS = 9  # round trips measured; the first one pays for the connection and is left out
_AT_ONCE = 4  # learners measured at the same time, so that they do not measure each other
_PATIENCE_S = 2.0
_MAX_CALLS = 8  # of one member; all but one are left over from connections that broke unnoticed


class Placement:
    """Measures learners and places them; thread-safe.

    Args:
        file: where the decision is kept.
        learners: everybody who has to be placed, in slot order.
        clusters: addresses by name, in slot order.
        deadline_s: how long to wait for learners that have not come to be measured.
    """

    def __init__(
        self, file: Path, learners: Sequence[str], clusters: Mapping[str, str], deadline_s: float
    ) -> None:
        self._file, self._learners, self._clusters = file, list(learners), dict(clusters)
        self._deadline = time.monotonic() + deadline_s
        self._round_trips_s: dict[str, float] = {}
        self._changed = threading.Condition()
        self._calls: Counter[str] = Counter()
        self._turns = threading.BoundedSemaphore(_AT_ONCE)
        self._decided: dict[str, list[str]] | None = self._read()

    def wait(self) -> tuple[dict[str, list[str]], dict[str, float]]:
        """Wait for the decision; returns the learners of each cluster, and the round trips in seconds that
        were measured in this life."""
        with self._changed:
            while self._decided is None:
                self._changed.wait(max(0.0, self._deadline - time.monotonic()))
                missing = len(self._learners) - len(self._round_trips_s)
                if self._decided is None and (not missing or time.monotonic() >= self._deadline):
                    if missing:
                        log.warning("%s learners were not there to be measured", missing)
                    self._decide()
            return self._decided, dict(self._round_trips_s)

    def serve(self, member: str, reader: Any, writer: Any) -> None:
        """Answer one learner or cluster that asks for its place (runs in the call's own thread)."""
        if member not in self._clusters and member not in self._learners:
            raise flight.FlightUnauthorizedError(f"{member} has its place at this aggregator")
        with self._changed:
            if self._calls[member] >= _MAX_CALLS:
                raise flight.FlightUnavailableError("too many questions of this member are open")
            self._calls[member] += 1
        try:
            self._serve(member, reader, writer)
        except (StopIteration, wire.WireError) as error:
            log.info("%s went before it had its place (%s)", member, type(error).__name__)
        finally:
            with self._changed:
                self._calls[member] -= 1

    def _serve(self, member: str, reader: Any, writer: Any) -> None:
        writer.begin(wire.SCHEMA)
        if member not in self._clusters and self._undecided:
            mine = self._turns.acquire(timeout=_PATIENCE_S)  # a learner that does not answer keeps its turn
            try:
                round_trip_s = _measure(reader, writer)
            finally:
                if mine:
                    self._turns.release()
            with self._changed:
                self._round_trips_s[member] = round_trip_s
                self._changed.notify_all()
        with self._changed:
            self._changed.wait_for(lambda: self._decided is not None, max(0.0, self._left_s + 5.0))
            decided = self._decided
        if decided is None:
            raise flight.FlightUnavailableError("no decision yet, ask again")
        if member in self._clusters:
            wire.send(writer, {"t": "placed", "members": decided[member]})
            return
        cluster = next(name for name, learners in decided.items() if member in learners)
        wire.send(writer, {"t": "placed", "cluster": cluster, "aggregator": self._clusters[cluster]})

    @property
    def _undecided(self) -> bool:
        with self._changed:
            return self._decided is None

    @property
    def _left_s(self) -> float:
        return self._deadline - time.monotonic()

    def _decide(self) -> None:
        decided = by_latency(self._learners, self._round_trips_s, list(self._clusters))
        temporary = self._file.with_name(self._file.name + ".part")
        temporary.write_text(json.dumps(decided))
        temporary.rename(self._file)
        self._decided = decided
        self._changed.notify_all()

    def _read(self) -> dict[str, list[str]] | None:
        try:
            decided: dict[str, list[str]] = json.loads(self._file.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise FailedError(f"the placement '{self._file}' is damaged: {error} - start again") from error
        return decided


def by_latency(
    learners: Sequence[str], round_trips_s: Mapping[str, float], clusters: Sequence[str]
) -> dict[str, list[str]]:
    """Divide learners so that those of one cluster are about equally far away.

    Args:
        learners: in slot order; those that were not measured count as the farthest.
        round_trips_s: what was measured.
    Returns:
        the learners of each cluster in slot order; sizes differ by at most one.
    """
    slots = {learner: slot for slot, learner in enumerate(learners)}
    farthest = sorted(learners, key=lambda name: (round_trips_s.get(name, float("inf")), slots[name]))
    parts = np.array_split(np.arange(len(farthest)), len(clusters))
    return {
        cluster: sorted((farthest[place] for place in part), key=slots.__getitem__)
        for cluster, part in zip(clusters, parts, strict=True)
    }


def ask(client: Any, options: Any) -> dict[str, Any]:
    """Ask the root for a place: a learner hears its ``aggregator``, a cluster its ``members``.

    Raises:
        pyarrow.flight.FlightError, WireError, StopIteration: it could not be had now; ask again.
    """
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(COMMAND), options)
    try:
        writer.begin(wire.SCHEMA)
        while True:
            message = wire.receive(reader, wire.MAX_ANSWER_BYTES)
            if message.kind == "ping":
                wire.send(writer, {"t": "pong", "number": message.header.get("number")})
            elif message.kind == "placed":
                return dict(message.header)
            else:
                raise wire.WireError(f"an unknown message '{message.kind[:40]}'")
    finally:
        reader.cancel()


def _measure(reader: Any, writer: Any) -> float:
    """Seconds of a small message there and back: the median, for one lost moment must not move a learner."""
    taken = []
    for number in range(_PINGS):
        begin = time.perf_counter()
        wire.send(writer, {"t": "ping", "number": number})
        answer = wire.receive(reader, wire.MAX_ANSWER_BYTES)
        if answer.kind != "pong" or answer.header.get("number") != number:
            raise wire.WireError("a pong was expected")
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])
