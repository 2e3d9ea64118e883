"""Model files between agent and worker: mapped for reading, written in place."""

from __future__ import annotations

import mmap
import os
from typing import Any, List, Optional, Sequence, Tuple

import numpy as np

from flops_worker import tensors


class LayoutReader:
    """`tensors.read_layout` for files that mostly repeat one header: it is parsed once."""

    def __init__(self) -> None:
        self._header = b""
        self._size = -1
        self._last: Optional[Tuple[tensors.Layout, int]] = None

    def read(self, fd: int) -> Tuple[tensors.Layout, int]:
        """Layout of an open file, and where its body starts.

        Raises:
            LayoutError: the file is not a complete model.
        """
        size = os.fstat(fd).st_size
        if (
            self._last is not None
            and size == self._size
            and os.pread(fd, len(self._header), 0) == self._header
        ):
            return self._last
        last = tensors.read_layout(fd)
        self._header, self._size, self._last = os.pread(fd, last[1], 0), size, last
        return last


class ModelMapper:
    """Maps model files into arrays that the caller may change and keep for ever."""

    def __init__(self) -> None:
        self._reader = LayoutReader()

    def map(self, fd: int) -> Tuple[tensors.Layout, List[np.ndarray[Any, Any]]]:
        """The arrays of an open model file: private (changes stay here), and valid as long as they are held.

        The file must not change afterwards: pages that nobody wrote to are still its own.

        Raises:
            LayoutError: the file is not a complete model.
        """
        layout, start = self._reader.read(fd)
        mapped = mmap.mmap(fd, start + layout.nbytes, access=mmap.ACCESS_COPY)
        arrays = tensors.views(layout, memoryview(mapped)[start:])
        # Some libraries (Cython's typed memoryviews) refuse arrays that follow a smaller dtype unaligned.
        return layout, [array if array.flags.aligned else array.copy() for array in arrays]


def write(fd: int, arrays: Sequence[np.ndarray[Any, Any]]) -> tensors.Layout:
    """Write arrays as a model file.

    Raises:
        LayoutError: an array has a dtype that cannot travel.
    """
    layout = tensors.Layout.of(arrays)
    tensors.write(fd, layout, arrays)
    return layout
