"""Blocks: the pieces in which a model travels, is checked and is summed.

A block is a run of whole numbers of one dtype in the flat body, at most `BLOCK_BYTES` long. Both ends derive
the same blocks from the layout, so a slice that arrives is either exactly the next block or wrong.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from flops_worker.tensors import Layout

LARGEST = 1e290
"""Numbers beyond this are refused: any sum of fewer, weighted by any number of examples, stays finite."""
LARGEST_SUM = 1e306
"""The same for what clusters summed up: `LARGEST` times all examples that ten thousand learners can claim."""
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


def all_usable(values: np.ndarray[Any, Any], largest: float = LARGEST) -> bool:
    """Whether all numbers can be summed: not NaN, not beyond the largest, and bools 0 or 1."""
    if values.dtype.kind == "b":
        return bool((values.view(np.uint8) <= 1).all())
    if values.dtype.kind != "f" or not values.size:
        return True
    if values.dtype.itemsize == 8:
        return bool(values.max() <= largest and values.min() >= -largest)  # neither is so with a NaN
    # NaN and infinity survive a sum, and nothing of float32 or smaller can overflow it: one pass.
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(np.add.reduce(values, dtype=np.float64)))
