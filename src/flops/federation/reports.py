"""Reports: what the aggregator tells the manager, durable and in order.

A report is a line in a file before anything else; a thread posts the lines to the manager and tries again
for as long as the manager is away. The manager answers with the last number it has, so nothing is lost and
nothing counts twice, whichever side is killed. The round loop never waits for any of this. Where the manager
shares no files with the aggregator, it gets the trained model before the report of the end, which names its
digest.
"""

import contextlib
import http.client
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flops.core.clock import Clock
from flops.core.events import EventKind
from flops.federation.config import ReportTo
from flops.federation.postbox import Postbox, RefusedError

log = logging.getLogger(__name__)

_BATCH = 200
_BEGIN = b'{"seq":'
_KIND_BYTES = 120  # of a line, within which its kind stands
_ROUND_KINDS = tuple(f'"{kind}"'.encode() for kind in (EventKind.ROUND_FINISHED, EventKind.CLUSTER_ROUND))
_LONGEST_PAUSE_S = 2.0


class Reporter:
    """The aggregator's outgoing reports."""

    def __init__(self, file: Path, to: ReportTo | None, clock: Clock, cluster: str | None = None) -> None:
        """Args: cluster is whose aggregator this is; None: the root's."""
        self._clock = clock
        self._source = cluster or "aggregator"
        self._beside = {"cluster": cluster} if cluster else {}
        self._postbox = Postbox(to) if to is not None else None
        self._sends_models = to is not None and to.upload
        self._changed = threading.Condition()
        self._unsent: deque[dict[str, Any]] = deque()
        self._seq = 0
        self._closed = self._refused = False
        self._progress_s = 0.0
        """When the manager was last seen to take something, on the monotonic clock."""
        self.last_round = 0
        """The last round that was reported as finished, in this life or an earlier one."""
        self._accepted_file = file.with_name(file.name + ".accepted")
        accepted = _number_in(self._accepted_file)
        for text in _complete_lines(file):
            self._seq = int(text[len(_BEGIN) : text.index(b",")])
            if self._seq > accepted or any(kind in text[:_KIND_BYTES] for kind in _ROUND_KINDS):
                self._note(json.loads(text), sent=self._seq <= accepted)
        self._file = file.open("a")
        if self._postbox is not None:
            posting = threading.Thread(
                target=self._post_for_ever, args=(self._postbox,), name="reports", daemon=True
            )
            posting.start()

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
        """Wait until the manager has everything; False when it does not want it, or is away for so long."""
        begin = time.monotonic()
        with self._changed:
            while self._unsent and not self._refused:
                left_s = max(begin, self._progress_s) + timeout_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            return not self._unsent

    def _note(self, line: dict[str, Any], sent: bool = False) -> None:
        if line["kind"] in (EventKind.ROUND_FINISHED, EventKind.CLUSTER_ROUND):
            self.last_round = int(line["data"]["round"])
        if self._postbox is not None and not sent:
            self._unsent.append(line)

    def close(self) -> None:
        """Nothing more is reported; what is unsent stays in the file."""
        with self._changed:
            self._closed = True
            self._file.close()
            self._changed.notify_all()

    def _post_for_ever(self, postbox: Postbox) -> None:
        pause = 0.05
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._unsent) or self._closed)
                if self._closed:
                    return
                batch = [self._unsent[number] for number in range(min(_BATCH, len(self._unsent)))]
            try:
                if self._sends_models:
                    batch = self._send_model(postbox, batch)
                accepted = postbox.post(self._source, batch)
                pause = 0.05
            except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
                log.info("the manager is away (%s), trying again", error)
                with self._changed:
                    self._refused = isinstance(error, RefusedError)
                    self._changed.notify_all()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            self._note_progress()
            with self._changed:
                self._refused = False
                while self._unsent and self._unsent[0]["seq"] <= accepted:
                    self._unsent.popleft()
                with contextlib.suppress(OSError):  # a full disk: they are sent again after a restart
                    self._accepted_file.write_text(str(accepted))
                self._changed.notify_all()

    def _send_model(self, postbox: Postbox, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send the model that the first of these reports names, if so; returns those that can be posted."""
        ends = [place for place, line in enumerate(batch) if line["kind"] == EventKind.TRAINING_FINISHED]
        if not ends or ends[0] > 0:
            return batch[: ends[0]] if ends else batch
        data = batch[0]["data"]
        postbox.send_model(Path(data["model_file"]), data["model_sha256"], self._note_progress)
        return batch[:1]

    def _note_progress(self) -> None:
        self._progress_s = time.monotonic()


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
