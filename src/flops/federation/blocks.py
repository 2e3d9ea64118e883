"""Blocks: the pieces in which a model travels, is checked and is summed.

A block is a run of whole numbers of one dtype in the flat body, at most `BLOCK_BYTES` long. Both ends derive
the same blocks from the layout, so a slice that arrives is either exactly the next block or wrong.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from flops_worker.tensors import Layout

BLOCK_BYTES = 1 << 20
# 1 MiB: large enough that a message's fixed cost (about 0.1 ms) vanishes, small enough for the L2 cache to
# hold it between the passes that check, convert and add it.


@dataclass(frozen=True)
class Block:
    """``count`` numbers of ``dtype`` at byte ``offset`` of the body; the first is parameter ``start``."""

    offset: int
    nbytes: int
    dtype: np.dtype[Any]
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def view(self, data: Any) -> np.ndarray[Any, Any]:
        """The numbers in a buffer that holds exactly this block; (count,) of ``dtype``, not copied."""
        return np.frombuffer(data, self.dtype, self.count)


def blocks(layout: Layout) -> tuple[Block, ...]:
    """The blocks of a layout, in order; arrays of one dtype that lie side by side share blocks."""
    runs: list[list[Any]] = []
    for tensor in layout.tensors:
        if not tensor.nbytes:
            continue
        dtype = tensor.numpy_dtype
        if runs and runs[-1][0] == dtype:
            runs[-1][2] += tensor.nbytes
        else:
            runs.append([dtype, tensor.offset, tensor.nbytes])
    result: list[Block] = []
    start = 0
    for dtype, offset, nbytes in runs:
        step = BLOCK_BYTES // dtype.itemsize
        total = nbytes // dtype.itemsize
        for first in range(0, total, step):
            count = min(step, total - first)
            result.append(
                Block(offset + first * dtype.itemsize, count * dtype.itemsize, dtype, start + first, count)
            )
        start += total
    return tuple(result)


def all_finite(values: np.ndarray[Any, Any]) -> bool:
    """Whether there is neither NaN nor infinity; one pass in the usual case."""
    if values.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        # NaN and infinity survive a sum; a float64 sum that overflows by itself is looked at closely.
        if np.isfinite(np.add.reduce(values, dtype=np.float64)):
            return True
    return bool(np.isfinite(values).all())
