"""The recorder: ships spooled records to MLflow, for ever, whatever happens to MLflow or to itself.

It may be killed at any time, SIGKILL included: a record's effect is in MLflow before the project's result
says so, and shipping it again changes nothing. One recorder works on a spool (kept by a lock); it sleeps
until nudged, gathers what comes within 0.2 s into one call, and gives way to training on the processor.

    python -m flops.tracking.recorder --spool DIR --tracking-uri URI --artifacts DIR [--ready-file FILE]
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flops.core.clock import Clock, SystemClock
from flops.core.errors import ConflictError, FailedError, FlopsError
from flops.core.ids import ProjectId
from flops.telemetry import about, log_lines
from flops.tracking.commands import is_server, shown, without_secrets
from flops.tracking.model_folder import RecordRefusedError
from flops.tracking.results import (
    KEPT_REFUSALS,
    RecorderStatus,
    Refusal,
    Result,
    write_result,
    write_status,
)
from flops.tracking.shipping import RunVanishedError, Shipper, joinable
from flops.tracking.spool import Entry, Spool
from flops.tracking.store import open_store

log = logging.getLogger(__name__)

_GATHER_S = 0.2
_LOOK_AGAIN_S = 60.0  # a nudge is never missed; this covers file systems that break that promise
_FIRST_RETRY_S = 0.5
_LOCK_DEADLINE_S = 10.0
_ENTRIES_A_CALL = 500


@dataclass
class _Line:
    """Where one project's shipping stands."""

    result: Result
    failures: int = 0
    not_before: float = 0.0


class Recorder:
    """Ships all projects of one spool.

    Args:
        connect: opens MLflow; asked again and again until it succeeds.
        max_wait_s: the longest pause between two attempts while MLflow does not take records.
    """

    def __init__(
        self,
        spool: Spool,
        connect: Callable[[], Shipper],
        *,
        destination: str,
        clock: Clock | None = None,
        max_wait_s: float = 30.0,
    ) -> None:
        self._spool = spool
        self._connect = connect
        self._destination = destination
        self._clock = clock or SystemClock()
        self._max_wait_s = max_wait_s
        self._lines: dict[ProjectId, _Line] = {}
        self._message = ""

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Connect, then ship for ever. ``on_ready`` is called once MLflow has answered."""
        with self._spool.listen_for_records() as nudges:
            self._say("preparing", f"opening MLflow at {self._destination}")
            failures = 0
            while True:
                try:
                    shipper = self._connect()
                    break
                except Exception as error:  # noqa: BLE001 - tracking waits for its store, whatever ails it
                    failures += 1
                    self._wait_for_store(error)
                    time.sleep(self._pause_s(failures))
            on_ready()
            while True:
                next_try_s = self.ship_all(shipper)
                nudges.wait(_LOOK_AGAIN_S if next_try_s is None else next_try_s)
                time.sleep(_GATHER_S)

    def ship_all(self, shipper: Shipper) -> float | None:
        """Ship whatever is due; returns the seconds until the next attempt is, None if all is shipped."""
        projects = self._spool.projects()
        self._lines = {project: self._line(project) for project in projects}
        for project, line in self._lines.items():
            if line.not_before <= self._clock.monotonic():
                with about(project=project):
                    self._ship_project(project, line, shipper)
        waiting = [line for line in self._lines.values() if line.failures]
        if not waiting:
            self._say("ready", f"all records are in MLflow at {self._destination}")
            return None
        return max(0.0, min(line.not_before for line in waiting) - self._clock.monotonic())

    def _line(self, project: ProjectId) -> _Line:
        if project in self._lines:
            return self._lines[project]
        try:
            result = self._spool.result(project)
        except FailedError as error:
            log.warning("%s", error)
            result = None
        return _Line(result or Result(project=project))

    def _ship_project(self, project: ProjectId, line: _Line, shipper: Shipper) -> None:
        try:
            if self._spool.size_bytes(project) <= line.result.offset:
                line.failures = 0
                return
            for entries in _calls(self._spool.read(project, line.result.offset)):
                self._ship_call(entries, line, shipper)
        except RunVanishedError:
            log.warning("the run of project %s is gone from MLflow - its records are shipped anew", project)
            line.result = Result(project=project)
            self._failed(line)
        except Exception as error:  # noqa: BLE001 - back off for ever: nothing is lost, and the status says so
            self._failed(line)
            self._wait_for_store(error)
        else:
            line.failures = 0
            self._spool.announce_result()

    def _ship_call(self, entries: list[Entry], line: _Line, shipper: Shipper) -> None:
        records = [entry.record for entry in entries if entry.record is not None]
        before = line.result
        try:
            after = shipper.ship(records, before) if records else _refused(before, entries[0])
        except RecordRefusedError as error:
            if len(entries) > 1:  # only the culprit is refused
                for entry in entries:
                    self._ship_call([entry], line, shipper)
                return
            after = _refused(before, replace(entries[0], problem=str(error)))
        after = replace(after, offset=entries[-1].end)
        write_result(self._spool.result_file(ProjectId(after.project)), after)
        line.result = after
        line.failures = 0
        if replace(before, offset=after.offset) != after:
            if after.refused_count > before.refused_count:
                log.warning("a record of project %s is refused: %s", after.project, after.refused[-1].reason)
            self._spool.announce_result()

    def _failed(self, line: _Line) -> None:
        line.failures += 1
        line.not_before = self._clock.monotonic() + self._pause_s(line.failures)

    def _pause_s(self, failures: int) -> float:
        longest = min(self._max_wait_s, _FIRST_RETRY_S * 2.0 ** min(failures - 1, 16))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing

    def _wait_for_store(self, error: Exception) -> None:
        text = re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")
        cause = " ".join(without_secrets(text).split())
        if len(cause) > 300:  # the first words say what was tried, the last ones why it failed
            cause = f"{cause[:140]} ... {cause[-140:]}"
        self._say(
            "waiting",
            f"MLflow at {self._destination} takes no records at present ({cause}) - they are kept in "
            f"{self._spool.directory} and shipped as soon as it does",
        )

    def _say(self, state: Literal["preparing", "ready", "waiting"], message: str) -> None:
        if message == self._message:
            return
        # The status is a courtesy; a full disk must not end what it is about.
        with contextlib.suppress(OSError):
            write_status(
                self._spool.status_file,
                RecorderStatus(state=state, message=message, since=self._clock.now(), pid=os.getpid()),
            )
            self._message = message
        log.info("%s", message)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flops.tracking.recorder", description=__doc__)
    parser.add_argument("--spool", type=Path, required=True)
    parser.add_argument(
        "--tracking-uri",
        default=os.environ.get("FLOPS_TRACKING_URI"),
        help="default: $FLOPS_TRACKING_URI, which other users of this machine cannot read",
    )
    parser.add_argument("--artifacts", required=True, help="a folder or an address")
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--max-wait-s", type=float, default=30.0)
    options = parser.parse_args(arguments)
    if not options.tracking_uri:
        parser.error("--tracking-uri is missing")

    log_lines("recorder")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    os.umask(0o077)
    # Nothing has to be put in order: what is not shipped now is shipped by the next recorder.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))

    started = time.monotonic()
    uri: str = options.tracking_uri
    spool = Spool(options.spool)

    def connect() -> Shipper:
        return Shipper(open_store(uri, options.artifacts), None if is_server(uri) else options.artifacts)

    def ready() -> None:
        seconds = round(time.monotonic() - started, 2)
        log.info("ready after %s s", seconds)
        if options.ready_file is not None:
            options.ready_file.write_text(json.dumps({"pid": os.getpid(), "seconds": seconds}))

    try:
        with only_recorder(spool):
            Recorder(spool, connect, destination=shown(uri), max_wait_s=options.max_wait_s).run(ready)
    except FlopsError as error:
        log.error("%s", error)
        return 1
    return 0


@contextlib.contextmanager
def only_recorder(spool: Spool) -> Iterator[None]:
    """Hold the spool's lock, which ends with the process.

    Raises:
        ConflictError: another recorder held it for ten seconds.
    """
    fd = os.open(spool.directory / "recorder.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_DEADLINE_S
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConflictError(
                        f"another recorder works on {spool.directory} - stop it first"
                    ) from None
                time.sleep(0.1)  # flock has no deadline of its own
        yield
    finally:
        os.close(fd)


def _calls(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Put neighbours together that are shipped in one call."""
    some: list[Entry] = []
    for entry in entries:
        last = some[-1].record if some else None
        together = last is not None and entry.record is not None and joinable(last, entry.record)
        if some and not (together and len(some) < _ENTRIES_A_CALL):
            yield some
            some = []
        some.append(entry)
    if some:
        yield some


def _refused(result: Result, entry: Entry) -> Result:
    refusal = Refusal(offset=entry.offset, reason=entry.problem)
    kept = result.refused if result.refused_count >= KEPT_REFUSALS else (*result.refused, refusal)
    return replace(result, refused=kept, refused_count=result.refused_count + 1)


if __name__ == "__main__":
    sys.exit(main())
