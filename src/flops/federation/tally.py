"""What one learner's part has cost: rounds and bytes, counted by the agent itself, for whoever owns its data.

Kept in a file that is mapped into memory: each number is there the moment it is counted, also when the agent
is killed in the next, and the next agent of this learner counts on.
"""

import mmap
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"FLOPS-TALLY-1\n\0\0"
_NUMBERS = struct.Struct("=4q")
_SIZE = len(_MAGIC) + _NUMBERS.size


@dataclass(frozen=True)
class Counts:
    """Of one learner, over all its agents.

    Args:
        rounds: trainings that were done. evaluations: of models, that were done.
        bytes_in, bytes_out: of messages with the aggregator, without the transport's own.
    """

    rounds: int = 0
    evaluations: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def since(self, before: "Counts") -> "Counts":
        """What was counted after that."""
        return Counts(
            max(0, self.rounds - before.rounds),
            max(0, self.evaluations - before.evaluations),
            max(0, self.bytes_in - before.bytes_in),
            max(0, self.bytes_out - before.bytes_out),
        )


class Tally:
    """Counts into a file, which is made where it is not there; safe from any thread."""

    def __init__(self, path: Path) -> None:
        """Raises OSError: the file cannot be written."""
        counts = read_tally(path)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _SIZE)
            self._map = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        self._lock = threading.Lock()
        self._numbers = [counts.rounds, counts.evaluations, counts.bytes_in, counts.bytes_out]
        self._map[: len(_MAGIC)] = _MAGIC
        self._keep()

    def trained(self) -> None:
        self._add(0, 1)

    def evaluated(self) -> None:
        self._add(1, 1)

    def received(self, size_bytes: int) -> None:
        self._add(2, size_bytes)

    def sent(self, size_bytes: int) -> None:
        self._add(3, size_bytes)

    def _add(self, place: int, more: int) -> None:
        with self._lock:
            self._numbers[place] += more
            self._keep()

    def _keep(self) -> None:
        _NUMBERS.pack_into(self._map, len(_MAGIC), *self._numbers)


def read_tally(path: Path) -> Counts:
    """What was counted so far; zeros where nothing was, or where the file is none."""
    try:
        with path.open("rb") as file:
            content = file.read(_SIZE + 1)
    except OSError:
        return Counts()
    if len(content) != _SIZE or not content.startswith(_MAGIC):
        return Counts()
    numbers = _NUMBERS.unpack_from(content, len(_MAGIC))
    return Counts(*(max(0, number) for number in numbers))
