"""Model parameters as one flat file: the safetensors format, written and read with numpy alone.

A model is an ordered list of arrays. At rest and between agent and worker it is a file in the safetensors
format (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length, a JSON
header, then every array's bytes back to back. On the network only the bytes after the header travel, and
both ends hold the `Layout`. Nothing here runs code from a file, and every length is checked before use.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
_NAMES = {np.dtype(value): name for name, value in DTYPES.items()}

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 32
_ALIGNMENT = 64


class LayoutError(ValueError):
    """The bytes, or their description, are not a model in this format."""


@dataclass(frozen=True)
class Tensor:
    """Where one array lies in the flat body: ``nbytes`` bytes from ``offset``, C order, little-endian."""

    key: str
    dtype: str
    shape: Tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(DTYPES[self.dtype])


@dataclass(frozen=True)
class Layout:
    """The ordered arrays of a model: keys, dtypes and shapes, without gaps."""

    tensors: Tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together (the body of the file)."""
        return self.tensors[-1].offset + self.tensors[-1].nbytes if self.tensors else 0

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray[Any, Any]]) -> "Layout":
        """The layout of a list of arrays; keys are their positions.

        Raises:
            LayoutError: an array has a dtype that cannot travel (objects, strings, complex numbers).
        """
        tensors: List[Tensor] = []
        offset = 0
        for position, array in enumerate(arrays):
            dtype = _NAMES.get(array.dtype.newbyteorder("<"))
            if dtype is None:
                raise LayoutError(
                    f"array {position} has dtype {array.dtype}; parameters must be numbers "
                    f"({', '.join(sorted(np.dtype(value).name for value in DTYPES.values()))})"
                )
            tensors.append(Tensor(str(position), dtype, tuple(array.shape), offset, array.nbytes))
            offset += array.nbytes
        return cls(tuple(tensors))

    @classmethod
    def from_header(cls, header: Any) -> "Layout":
        """Read the JSON header of a file that may come from anywhere.

        Raises:
            LayoutError: anything that is not exactly a gapless list of known arrays.
        """
        if not isinstance(header, dict) or len(header) > MAX_TENSORS:
            raise LayoutError("the header is not an object, or has too many arrays")
        tensors: List[Tensor] = []
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            try:
                dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            except (TypeError, KeyError, ValueError) as error:
                raise LayoutError(f"array '{key[:40]}' lacks dtype, shape or offsets") from error
            if dtype not in DTYPES:
                raise LayoutError(f"array '{key[:40]}' has the unknown dtype {str(dtype)[:20]}")
            numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
            if len(numbers) > MAX_DIMENSIONS + 2 or not all(
                type(number) is int and 0 <= number < 1 << 48 for number in numbers
            ):
                raise LayoutError(f"array '{key[:40]}' has an impossible shape or offset")
            if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
                raise LayoutError(f"array '{key[:40]}' does not fill its {end - begin} bytes")
            tensors.append(Tensor(key, dtype, tuple(shape), begin, end - begin))
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
        expected = 0
        for tensor in tensors:
            if tensor.offset != expected:
                raise LayoutError(f"array '{tensor.key[:40]}' overlaps or leaves a gap")
            expected += tensor.nbytes
        return cls(tuple(tensors))

    def to_header(self) -> Dict[str, Any]:
        return {
            tensor.key: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [tensor.offset, tensor.offset + tensor.nbytes],
            }
            for tensor in self.tensors
        }

    def file_header(self) -> bytes:
        """The bytes before the body, padded so that the body starts at a multiple of 64."""
        known: Optional[bytes] = self.__dict__.get("_file_header")
        if known is not None:
            return known
        text = json.dumps(self.to_header(), separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        self.__dict__["_file_header"] = header  # made once: the layout cannot change
        return header

    def difference(self, other: "Layout") -> str:
        """Why two layouts are not the same, in words; empty when they are."""
        if len(self.tensors) != len(other.tensors):
            return f"{len(other.tensors)} arrays instead of {len(self.tensors)}"
        for mine, theirs in zip(self.tensors, other.tensors):
            if mine.key != theirs.key:
                return f"array '{theirs.key[:40]}' instead of '{mine.key[:40]}'"
            if mine.shape != theirs.shape:
                return f"array {mine.key} has shape {theirs.shape} instead of {mine.shape}"
            if mine.dtype != theirs.dtype:
                return f"array {mine.key} has dtype {theirs.dtype} instead of {mine.dtype}"
        return ""


def views(layout: Layout, body: Any) -> List[np.ndarray[Any, Any]]:
    """The arrays that lie in a buffer of ``layout.nbytes`` bytes, without copying it."""
    return [
        np.ndarray(tensor.shape, tensor.numpy_dtype, buffer=body, offset=tensor.offset)
        if tensor.nbytes
        else np.empty(tensor.shape, tensor.numpy_dtype)
        for tensor in layout.tensors
    ]


def write(fd: int, layout: Layout, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    """Write header and arrays to an open file, from its start; the file then has exactly that size."""
    header = layout.file_header()
    os.ftruncate(fd, len(header) + layout.nbytes)
    _write_at(fd, memoryview(header), 0)
    for tensor, array in zip(layout.tensors, arrays):
        if tensor.nbytes:
            flat = np.ascontiguousarray(array, dtype=tensor.numpy_dtype).reshape(-1)
            _write_at(fd, flat.view(np.uint8).data, len(header) + tensor.offset)


def read_layout(fd: int) -> Tuple[Layout, int]:
    """Layout of an open file, and where its body starts.

    Raises:
        LayoutError: the file is not a complete model in this format.
    """
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise LayoutError("the file is too short for its header")
    try:
        header = json.loads(os.pread(fd, length, 8))
    except ValueError as error:
        raise LayoutError("the header is not JSON") from error
    layout = Layout.from_header(header)
    if size != 8 + length + layout.nbytes:
        raise LayoutError(f"the file has {size} bytes instead of {8 + length + layout.nbytes}")
    return layout, 8 + length


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
