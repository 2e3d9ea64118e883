"""The node's own record of what ran on its data: lines of JSON that are only ever added to."""

import json
import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flops.core.clock import Clock, SystemClock
from flops.federation.tally import Counts
from flops.node.assignment import Assignment

_MAX_LINES = 1_000_000


class Journal:
    """Writes it; safe from any thread. What was written is on the disk when a method returns."""

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        self._path = path
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()

    def began(self, assignment: Assignment) -> str:
        """A learner was accepted; returns the entry's id."""
        return self._about(assignment, "began", {})

    def refused(self, assignment: Assignment, reason: str) -> str:
        """A learner was not: nothing of it was fetched."""
        return self._about(assignment, "refused", {"reason": reason})

    def ended(self, entry: str, reason: str, counts: Counts) -> None:
        """A learner's part is over, for this attempt."""
        self._write({"event": "ended", "entry": entry, "reason": reason, **vars(counts)})

    def _about(self, assignment: Assignment, event: str, more: Mapping[str, Any]) -> str:
        entry = secrets.token_hex(6)
        facts = {
            "project": assignment.project,
            "learner": assignment.learner,
            "service": assignment.name,
            "owner": assignment.owner,
            "team": assignment.team,
            "repository": assignment.repository,
            "commit": assignment.commit,
            "lock": assignment.lock,
            "code_sha256": assignment.code_sha256,
            "tags": list(assignment.tags),
            "site": assignment.site,
            "rounds_total": assignment.rounds_total,
        }
        self._write({"event": event, "entry": entry, **facts, **more})
        return entry

    def _write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps({"at": round(self._clock.now(), 3), **line}, separators=(",", ":")) + "\n"
        with self._lock:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, text.encode())
                os.fsync(fd)
            finally:
                os.close(fd)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """One entry for each learner, the oldest first: what began, with how it ended where it has.

    A line that a power cut tore is left out.
    """
    entries: dict[str, dict[str, Any]] = {}
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file):
                if number >= _MAX_LINES:
                    break
                _take(entries, text)
    except FileNotFoundError:
        return []
    return list(entries.values())


def _take(entries: dict[str, dict[str, Any]], text: str) -> None:
    try:
        line = json.loads(text)
        event, entry, at = line.pop("event"), line.pop("entry"), line.pop("at")
    except (ValueError, KeyError, AttributeError):
        return
    if event in ("began", "refused"):
        ended = {"ended": at} if event == "refused" else {"ended": None, "reason": ""}
        entries[entry] = {"entry": entry, "state": event, "began": at, **line, **ended}
    elif event == "ended" and entry in entries:
        entries[entry].update(line, ended=at, state="ended")
