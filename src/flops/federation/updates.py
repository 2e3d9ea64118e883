"""Updates on their way into the aggregate: checked as they arrive, kept in memory or spooled to disk.

A small update stays in memory. A large one goes to an unlinked file in the state folder: the page cache
holds it, the aggregator's own memory does not grow with the number of learners, and nothing is left behind
by a crash.
"""

import mmap
import os
import tempfile
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flops.federation.blocks import LARGEST, Block, all_usable
from flops.federation.space import needing_space
from flops_worker.tensors import Layout, views


class RefusedError(ValueError):
    """An update that must not count; the text is shown to users and sent to the learner."""


class LateError(RefusedError):
    """An update that would have counted earlier; no reason to distrust its sender."""


class Body(Protocol):
    """The parameters of one update, wherever they lie."""

    def read(self, block: Block) -> np.ndarray[Any, Any]:
        """The numbers of one block; valid until the next call."""
        ...

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        """All arrays, read-only, not loaded before they are touched."""
        ...

    def release(self) -> None:
        """The body is not needed any more."""
        ...


@dataclass
class Update:
    """What a learner returned for one round, complete and checked."""

    learner: str
    num_examples: int
    metrics: Mapping[str, float]
    body: Body
    fit_s: float = 0.0
    nbytes: int = 0
    task: str = ""
    version: int = 0
    """The version of the global model that it was made from."""


class MemoryBody:
    """A small body that arrived beside its header."""

    def __init__(
        self, layout: Layout, blocks: tuple[Block, ...], data: bytes, largest: float = LARGEST
    ) -> None:
        """Check and keep it.

        Raises:
            RefusedError: the bytes are not one finite model of this layout.
        """
        if len(data) != layout.nbytes:
            raise RefusedError(f"it has {len(data)} bytes instead of {layout.nbytes}")
        self._layout, self._data = layout, data
        for block in blocks:
            check_numbers(self.read(block), largest)

    def read(self, block: Block) -> np.ndarray[Any, Any]:
        return block.view(memoryview(self._data)[block.offset : block.end])

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        return views(self._layout, self._data)

    def release(self) -> None:
        self._data = b""


class SpooledBody:
    """A large body, written to its spool file block by block, in order, by the thread that receives it."""

    def __init__(
        self, spool: "Spool", layout: Layout, blocks: tuple[Block, ...], largest: float = LARGEST
    ) -> None:
        self._spool, self._layout, self._blocks, self._largest = spool, layout, blocks, largest
        self._fd = spool.take()
        self._next = 0
        self._buffer = bytearray()
        # The receiving thread writes while the round loop may give the file back for another update.
        self._lock = threading.Lock()

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def complete(self) -> bool:
        return self._next == len(self._blocks)

    def receive(self, offset: Any, data: memoryview | None) -> None:
        """Take the next block.

        Raises:
            RefusedError: another block than the next one, or numbers that are not finite.
        """
        block = self._blocks[self._next] if not self.complete else None
        if block is None or data is None or offset != block.offset or len(data) != block.nbytes:
            raise RefusedError("its bytes do not follow the layout")
        check_numbers(block.view(data), self._largest)
        position = block.offset
        with self._lock:
            if self._fd < 0:
                return  # it is not waited for any more
            with self._spool.needing_space():
                while data:
                    written = os.pwrite(self._fd, data, position)
                    data, position = data[written:], position + written
        self._next += 1

    def read(self, block: Block) -> np.ndarray[Any, Any]:
        if len(self._buffer) < block.nbytes:
            self._buffer = bytearray(block.nbytes)
        view = memoryview(self._buffer)[: block.nbytes]
        if os.preadv(self._fd, [view], block.offset) != block.nbytes:
            raise OSError(f"the spool file ended before byte {block.end}")
        return block.view(view)

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        mapping = mmap.mmap(self._fd, self._layout.nbytes, access=mmap.ACCESS_READ)
        return views(self._layout, mapping)

    def release(self) -> None:
        with self._lock:
            if self._fd >= 0:
                self._spool.give_back(self._fd)
                self._fd = -1
                self._buffer = bytearray()


class Spool:
    """Unlinked files for large bodies, used again round after round so that their pages stay warm."""

    def __init__(self, folder: Path, keep: int = 4) -> None:
        self._folder, self._keep = folder, keep
        self._free: list[int] = []

    def take(self) -> int:
        try:
            return self._free.pop()
        except IndexError:
            with self.needing_space(), tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
                return os.dup(file.fileno())

    def needing_space(self) -> AbstractContextManager[None]:
        """For whoever writes to one of the files."""
        return needing_space(self._folder, "the training")

    def give_back(self, fd: int) -> None:
        if len(self._free) < self._keep:
            self._free.append(fd)
        else:
            os.close(fd)

    def close(self) -> None:
        while self._free:
            os.close(self._free.pop())


def check_numbers(values: np.ndarray[Any, Any], largest: float = LARGEST) -> None:
    if not all_usable(values, largest):
        raise RefusedError("it contains NaN or infinite values")
