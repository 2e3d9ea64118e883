"""Global models that many members of one process have received: the same bytes are kept once."""

import os
import threading

from flops.federation.model_file import ModelWriter
from flops_worker.tensors import Layout

_PART_BYTES = 1 << 20


class KeptModels:
    """Open model files that members share; any thread may ask.

    A thousand members that each kept their own would take a thousand times the memory, and as often the time
    to write it: what arrives is compared with what arrived last, since members are sent the same model.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._small: tuple[bytes, bytes, int] | None = None  # header, body, file
        self._large = -1

    def of_body(self, layout: Layout, body: bytes | memoryview) -> int:
        """An open file of the model with this body; the caller closes it."""
        header, data = layout.file_header(), bytes(body)
        with self._lock:
            if self._small is None or self._small[:2] != (header, data):
                fd = written(layout, data)
                if self._small is not None:
                    os.close(self._small[2])
                self._small = header, data, fd
            return os.dup(self._small[2])

    def of_file(self, fd: int) -> int:
        """An open file with the bytes of this complete one, which is taken over; the caller closes it."""
        with self._lock:
            if self._large >= 0:
                if _same(fd, self._large):
                    os.close(fd)
                    return os.dup(self._large)
                os.close(self._large)
            self._large = os.dup(fd)
            return fd


def written(layout: Layout, body: bytes | memoryview) -> int:
    """An anonymous file of the model with this body; the caller closes it."""
    writer = ModelWriter(layout)
    try:
        writer.write(0, body)
    except BaseException:
        writer.discard()
        raise
    return writer.fd


def _same(one: int, other: int) -> bool:
    size = os.fstat(one).st_size
    return os.fstat(other).st_size == size and all(
        os.pread(one, _PART_BYTES, start) == os.pread(other, _PART_BYTES, start)
        for start in range(0, size, _PART_BYTES)
    )
