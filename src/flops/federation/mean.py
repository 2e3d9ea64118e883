"""The streaming weighted mean: what every averaging strategy reduces its updates to.

Updates are folded in slot order, whatever the order in which they arrived, so the same cohort gives the same
bits. (A float64 sum alone is not enough: about one parameter in 10^9 would depend on the order.)
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from flops.federation.blocks import Block
from flops.federation.model_file import as_dtype
from flops.federation.updates import Body
from flops_worker.tensors import Layout, Tensor

_MOST_NAMES = 200
"""Of the metrics of a round: learners name their own, and could name as many as they like."""


class WeightedMean:
    """A running sum of weighted updates: 8 bytes a parameter, however many learners there are."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        self._blocks = blocks
        num_parameters = blocks[-1].start + blocks[-1].count if blocks else 0
        self._sum = np.zeros(num_parameters, np.float64)
        self._product = np.empty(max((block.count for block in blocks), default=0), np.float64)
        self.total_weight = 0.0

    def fold(self, body: Body, weight: float) -> None:
        """Add one learner's update to the running sum.

        Args:
            body: an update of the layout that the blocks were made from, finite.
            weight: the training examples behind the update; finite and positive.
        Source:
            McMahan et al. 2017, arXiv:1602.05629, Algorithm 1, server side.
        """
        for block in self._blocks:
            product = self._product[: block.count]
            np.multiply(body.read(block), weight, out=product, dtype=np.float64, casting="unsafe")
            total = self._sum[block.start : block.start + block.count]
            np.add(total, product, out=total)
        self.total_weight += weight

    def fold_sum(self, body: Body, blocks: tuple[Block, ...], weight: float) -> None:
        """Add what a cluster summed up.

        Args:
            body: a sum of updates, each weighted by its examples, of `sum_layout`.
            blocks: of `sum_layout`.
            weight: the training examples behind all of them.
        """
        for block in blocks:
            total = self._sum[block.start : block.start + block.count]
            np.add(total, body.read(block), out=total)
        self.total_weight += weight

    def sums(self) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """The running sum, piece by piece: number of the first parameter, and (count,) float64."""
        for block in self._blocks:
            yield block.start, self._sum[block.start : block.start + block.count]

    def result(self) -> Iterator[tuple[Block, np.ndarray[Any, Any]]]:
        """The mean, block by block, in the dtype of the layout; (count,) each."""
        for block in self._blocks:
            mean = self._product[: block.count]
            np.divide(self._sum[block.start : block.start + block.count], self.total_weight, out=mean)
            yield block, as_dtype(mean, block.dtype)

    def reset(self) -> None:
        self._sum.fill(0.0)
        self.total_weight = 0.0


def sum_layout(layout: Layout) -> Layout:
    """The layout of a weighted sum of such models: the same arrays, every number a float64."""
    offset = 0
    tensors = []
    for tensor in layout.tensors:
        nbytes = 8 * math.prod(tensor.shape)
        tensors.append(Tensor(tensor.key, "F64", tensor.shape, offset, nbytes))
        offset += nbytes
    return Layout(tuple(tensors))


def weighted_metrics(reports: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """The mean of each metric over the learners that report it, weighted by their examples.

    Args:
        reports: for each learner its weight and its metrics.
    """
    totals: dict[str, float] = {}
    for weight, metrics in reports:
        for name in metrics:
            if name in totals or len(totals) < _MOST_NAMES:
                totals[name] = totals.get(name, 0.0) + weight
    means: dict[str, float] = {}
    for weight, metrics in reports:
        for name, value in metrics.items():
            if name in totals:
                # The share comes first: a weight times a value near the largest float would be infinite.
                means[name] = means.get(name, 0.0) + weight / totals[name] * value
    return means
