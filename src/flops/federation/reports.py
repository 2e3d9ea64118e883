"""Reports: what the aggregator tells the manager, durable and in order.

A report is a line in a file before anything else; a thread posts the lines to the manager and tries again
for as long as the manager is away. The manager answers with the last number it has, so nothing is lost and
nothing counts twice, whichever side is killed. The round loop never waits for any of this.
"""

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flops.core.clock import Clock
from flops.core.events import EventKind
from flops.federation.config import ReportTo

log = logging.getLogger(__name__)

_BATCH = 200
_BEGIN = b'{"seq":'
_KIND_BYTES = 120  # of a line, within which its kind stands
_ROUND_KINDS = tuple(f'"{kind}"'.encode() for kind in (EventKind.ROUND_FINISHED, EventKind.CLUSTER_ROUND))
_LONGEST_PAUSE_S = 2.0
_REFUSALS = {401, 403, 404, 410}


class Reporter:
    """The aggregator's outgoing reports."""

    def __init__(self, file: Path, to: ReportTo | None, clock: Clock, cluster: str | None = None) -> None:
        """Args: cluster is whose aggregator this is; None: the root's."""
        self._clock = clock
        self._source = cluster or "aggregator"
        self._beside = {"cluster": cluster} if cluster else {}
        self._to = to
        self._changed = threading.Condition()
        self._unsent: deque[dict[str, Any]] = deque()
        self._seq = 0
        self._closed = self._refused = False
        self.last_round = 0
        """The last round that was reported as finished, in this life or an earlier one."""
        self._accepted_file = file.with_name(file.name + ".accepted")
        accepted = _number_in(self._accepted_file)
        for text in _complete_lines(file):
            self._seq = int(text[len(_BEGIN) : text.index(b",")])
            if self._seq > accepted or any(kind in text[:_KIND_BYTES] for kind in _ROUND_KINDS):
                self._note(json.loads(text), sent=self._seq <= accepted)
        self._file = file.open("a")
        if to is not None:
            threading.Thread(target=self._post_for_ever, name="reports", daemon=True).start()

    def report(self, kind: EventKind, **data: Any) -> None:
        """Write a report down and have it sent."""
        with self._changed:
            self._seq += 1
            line = {
                "seq": self._seq,
                "time": self._clock.now(),
                "kind": str(kind),
                "data": {**self._beside, **data},
            }
            # Words of members may hold what no database takes: half a surrogate pair.
            text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
            text = text.encode("utf-8", "replace").decode()
            line = json.loads(text)
            self._file.write(text + "\n")
            self._file.flush()
            self._note(line)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the manager has everything; False when it stays away or does not want it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unsent or self._refused, timeout_s)
            return not self._unsent

    def _note(self, line: dict[str, Any], sent: bool = False) -> None:
        if line["kind"] in (EventKind.ROUND_FINISHED, EventKind.CLUSTER_ROUND):
            self.last_round = int(line["data"]["round"])
        if self._to is not None and not sent:
            self._unsent.append(line)

    def close(self) -> None:
        """Nothing more is reported; what is unsent stays in the file."""
        with self._changed:
            self._closed = True
            self._file.close()
            self._changed.notify_all()

    def _post_for_ever(self) -> None:
        pause = 0.05
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._unsent) or self._closed)
                if self._closed:
                    return
                batch = [self._unsent[number] for number in range(min(_BATCH, len(self._unsent)))]
            try:
                accepted = self._post(batch)
                pause = 0.05
            except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
                log.info("the manager is away (%s), trying again", error)
                with self._changed:
                    self._refused = isinstance(error, _RefusedError)
                    self._changed.notify_all()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            with self._changed:
                self._refused = False
                while self._unsent and self._unsent[0]["seq"] <= accepted:
                    self._unsent.popleft()
                with contextlib.suppress(OSError):  # a full disk: they are sent again after a restart
                    self._accepted_file.write_text(str(accepted))
                self._changed.notify_all()

    def _post(self, batch: list[dict[str, Any]]) -> int:
        assert self._to is not None
        connection = _UnixConnection(self._to.socket or "")
        with contextlib.closing(connection):
            connection.request(
                "POST",
                self._to.url_path,
                body=json.dumps({"source": self._source, "reports": batch}),
                headers={
                    "Content-Type": "application/json",
                    "Authorization": f"Bearer {self._to.token}",
                },
            )
            response = connection.getresponse()
            body = response.read()
            if response.status in _REFUSALS:
                raise _RefusedError(f"it does not know this project any more ({response.status})")
            if response.status != http.HTTPStatus.OK:
                raise OSError(f"it answered {response.status} {body[:200]!r}")
            return int(json.loads(body)["accepted"])


class _RefusedError(OSError):
    """The manager is there and will not take these reports: the project was removed."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("manager", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _complete_lines(file: Path) -> Iterator[bytes]:
    """The reports of an earlier life, one by one; a line that a crash cut short is cut off."""
    if not file.exists():
        return
    end = 0
    with file.open("r+b") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            yield line
        stream.truncate(end)


def _number_in(file: Path) -> int:
    """The last number that the manager has; 0 where that is not known."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0
