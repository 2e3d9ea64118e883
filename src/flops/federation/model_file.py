"""Model files of the federation: the safetensors files of `flops_worker.tensors`, mapped or written."""

import hashlib
import mmap
import os
from pathlib import Path
from typing import Any, Self

import numpy as np

from flops.core.errors import FailedError
from flops_worker.tensors import Layout, LayoutError, read_layout


def layout_digest(layout: Layout) -> str:
    """What two ends compare to know that they mean the same arrays."""
    return hashlib.sha256(layout.file_header()).hexdigest()[:32]


class ModelFile:
    """A complete model file, mapped read-only. Close it when nothing views its body any more."""

    def __init__(self, fd: int, name: str) -> None:
        """Take over an open file.

        Raises:
            FailedError: the file is no complete model.
        """
        try:
            self.layout, self.body_offset = read_layout(fd)
        except (LayoutError, OSError) as error:
            os.close(fd)
            raise FailedError(f"the model file '{name}' cannot be read: {error}") from error
        self.fd = fd
        self._mapping: mmap.mmap | None = None

    @classmethod
    def open(cls, path: Path) -> Self:
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path))

    @property
    def body(self) -> memoryview:
        """All parameters, flat: ``layout.nbytes`` bytes, mapped on first use."""
        if not self.layout.nbytes:
            return memoryview(b"")
        if self._mapping is None:
            self._mapping = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
        return memoryview(self._mapping)[self.body_offset :]

    def close(self) -> None:
        # A view that is still being sent keeps the mapping alive; it goes with the last of them.
        self._mapping = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ModelWriter:
    """A model file in the making: slices arrive in any order, and the file appears only when it is complete.

    Without a path it is an anonymous memory file (or an unlinked temporary one where the platform has none).
    """

    def __init__(self, layout: Layout, path: Path | None = None) -> None:
        self.layout = layout
        self._path = path
        self._temporary = path.with_name(path.name + ".part") if path else None
        if self._temporary is not None:
            self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        else:
            self.fd = anonymous_file("flops-model")
        header = layout.file_header()
        self.body_offset = len(header)
        os.ftruncate(self.fd, len(header) + layout.nbytes)
        os.pwrite(self.fd, header, 0)

    def write(self, offset: int, data: Any) -> None:
        """Write a slice of the body (bytes-like) at ``offset`` bytes from the body's start."""
        view = memoryview(data).cast("B")
        position = self.body_offset + offset
        while view:
            written = os.pwrite(self.fd, view, position)
            view, position = view[written:], position + written

    def finish(self, durable: bool = False) -> ModelFile:
        """The complete file; with ``durable`` it survives a power cut."""
        if durable:
            os.fsync(self.fd)
        if self._temporary is not None and self._path is not None:
            self._temporary.rename(self._path)
            if durable:
                sync_folder(self._path.parent)
        fd, self.fd = self.fd, -1
        return ModelFile(fd, str(self._path or "in memory"))

    def discard(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)


def write_arrays(layout: Layout, arrays: list[np.ndarray[Any, Any]], path: Path, durable: bool) -> ModelFile:
    """Write arrays, each cast to the layout's dtype (integers are rounded), as a model file."""
    writer = ModelWriter(layout, path)
    try:
        for tensor, array in zip(layout.tensors, arrays, strict=True):
            if tensor.nbytes:
                writer.write(
                    tensor.offset, as_dtype(array, tensor.numpy_dtype).reshape(-1).view(np.uint8).data
                )
        return writer.finish(durable)
    except BaseException:
        writer.discard()
        raise


def as_dtype(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The array in another dtype, contiguous; numbers bound for integers are rounded, not cut off."""
    if dtype.kind in "iu" and array.dtype.kind == "f":
        information = np.iinfo(dtype)
        highest = float(information.max)
        if highest > information.max:  # 2**63 - 1 is no float64; the next one up would become negative
            highest = float(np.nextafter(highest, 0.0))
        array = np.clip(np.rint(array.astype(np.float64, copy=False)), float(information.min), highest)
    elif dtype.kind == "b" and array.dtype.kind == "f":
        array = array >= 0.5
    return np.ascontiguousarray(array, dtype=dtype)


def anonymous_file(name: str) -> int:
    """An open file without a name: it vanishes with its last user, however that user ends."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
