"""How single updates change the global model: the arithmetic of the asynchronous strategies.

A mixing decides and computes; it never waits. `flops.federation.asynchronous` feeds it updates as they
arrive and makes a new version of the model whenever it is due. Sums are float64; every version is stored in
the dtypes of the model, integers rounded.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flops.federation.blocks import Block
from flops.federation.hub import GlobalModel
from flops.federation.mean import WeightedMean
from flops.federation.model_file import as_dtype
from flops.federation.strategies import asynchronous_parameters
from flops.federation.updates import Body, Update

Blocks = tuple[Block, ...]
Numbers = np.ndarray[Any, Any]
Step = Iterator[tuple[Block, Numbers]]

_LARGEST_DEFAULT_BUFFER = 10  # what Nguyen et al. found best over all their tasks
_GAP = 1.5
_GAP_S = 0.2
# Learners are of one tier while each takes at most half as long again as its quicker neighbour; the constant
# keeps the jitter of very short trainings from tearing tiers apart.


def discount(function: str, staleness: int, a: float | None = None, b: float = 4) -> float:
    """How much an update counts that was made from a model ``staleness`` versions ago; above 0, at most 1.

    Args:
        function: constant: 1; polynomial: (staleness + 1)^-a; hinge: 1 up to b, then
            1 / (a (staleness - b) + 1).
        a: None: 0.5 for polynomial, 10 for hinge.
    Source:
        Xie et al. 2019, arXiv:1903.03934, section 5.2. Polynomial with a = 0.5 is what Nguyen et al. 2022,
        arXiv:2106.06639, use in FedBuff.
    """
    if function == "constant":
        return 1.0
    if function == "polynomial":
        return float((staleness + 1) ** -(0.5 if a is None else a))
    return 1.0 if staleness <= b else 1.0 / ((10.0 if a is None else a) * (staleness - b) + 1.0)


class Mixing(ABC):
    """What the asynchronous strategies have in common; used by one thread."""

    def __init__(self, parameters: Mapping[str, Any], blocks: Blocks) -> None:
        self.parameters, self._blocks = parameters, blocks
        self.at_once = 1
        """Learners that are at work together; set by the training."""

    def may_ask(self, idle: Sequence[str]) -> list[str]:
        """Who of the idle learners may be given work."""
        return list(idle)

    def asked(self, learner: str, now: float) -> None:  # noqa: B027 - most need not know
        """A learner was given work."""

    @abstractmethod
    def take(self, update: Update, base: GlobalModel, staleness: int, took_s: float) -> float:
        """Take an accepted update over, and release its body when it is used; returns its discount.

        Args:
            base: the model it was made from.
            staleness: versions that the global model has had since.
            took_s: from the asking to the arrival.
        """

    def lost(self, learner: str) -> None:  # noqa: B027
        """A learner that was asked is not waited for any more."""

    @abstractmethod
    def due(self, now: float) -> bool:
        """Whether the model makes its next step now."""

    def look_again(self, now: float) -> float:
        """When `due` may have changed without anybody saying anything."""
        return math.inf

    @abstractmethod
    def step(self, model: GlobalModel) -> Step:
        """The next version of the model, block by block, in the dtypes of the layout."""

    @property
    def ends_round(self) -> bool:
        """Whether the next step may end a round: its model is committed and evaluated."""
        return True

    @property
    def can_wait(self) -> bool:
        """Whether a step that is due may be made later, from more updates."""
        return True

    def round_ended(self) -> None:  # noqa: B027
        """The last step has ended a round."""

    def state(self) -> dict[str, Numbers]:
        """What has to be known after a round to go on, by name."""
        return {}

    def restore(self, state: Mapping[str, Numbers]) -> None:  # noqa: B027
        """Put back what `state` returned."""

    def close(self) -> None:  # noqa: B027
        """Give back what is not used yet."""

    def _discount(self, staleness: int) -> float:
        values = self.parameters
        return discount(values["staleness"], staleness, values["a"], values["b"])


class FedAsync(Mixing):
    """Every update moves the model towards itself: x <- (1 - alpha s) x + alpha s y, s its discount.

    Source:
        Xie et al. 2019, arXiv:1903.03934, Algorithm 1. ``proximal_mu`` is its regularisation; the learners'
        code has to apply it.
    """

    def __init__(self, parameters: Mapping[str, Any], blocks: Blocks) -> None:
        super().__init__(parameters, blocks)
        self._update: Update | None = None
        self._weight = 0.0
        self._steps = 0

    def take(self, update: Update, base: GlobalModel, staleness: int, took_s: float) -> float:
        self._update = update
        share = self._discount(staleness)
        self._weight = float(self.parameters["alpha"]) * share
        return share

    def due(self, now: float) -> bool:
        return self._update is not None

    def step(self, model: GlobalModel) -> Step:
        assert self._update is not None
        for block in self._blocks:
            mixed = _numbers(model, block).astype(np.float64)
            mixed += self._weight * (self._update.body.read(block).astype(np.float64) - mixed)
            yield block, as_dtype(mixed, block.dtype)
        self._steps += 1
        self.close()

    @property
    def ends_round(self) -> bool:
        return self._steps + 1 >= (self.parameters["updates_per_round"] or self.at_once)

    @property
    def can_wait(self) -> bool:
        return False

    def round_ended(self) -> None:
        self._steps = 0

    def close(self) -> None:
        if self._update is not None:
            self._update.body.release()
            self._update = None


class FedBuff(Mixing):
    """Differences are gathered until the buffer is full: x <- x + rate / K * sum of s (y - base).

    In memory: 8 bytes a parameter, whatever the size of the buffer.

    Source:
        Nguyen et al. 2022, arXiv:2106.06639, Algorithm 1 (without secure aggregation).
    """

    def __init__(self, parameters: Mapping[str, Any], blocks: Blocks) -> None:
        super().__init__(parameters, blocks)
        self._sum = WeightedMean(blocks)
        self._count = 0

    @property
    def buffer_size(self) -> int:
        """Updates that fill the buffer; by default half of those that work together, at most ten."""
        size: int | None = self.parameters["buffer_size"]
        return size or min(_LARGEST_DEFAULT_BUFFER, (self.at_once + 1) // 2)

    def take(self, update: Update, base: GlobalModel, staleness: int, took_s: float) -> float:
        share = self._discount(staleness)
        self._sum.fold(_Difference(update.body, base), share)
        update.body.release()
        self._count += 1
        return share

    def due(self, now: float) -> bool:
        return self._count >= self.buffer_size

    def step(self, model: GlobalModel) -> Step:
        rate = float(self.parameters["server_learning_rate"]) / self._count
        for block, (_, total) in zip(self._blocks, self._sum.sums(), strict=True):
            yield block, as_dtype(_numbers(model, block) + rate * total, block.dtype)
        self._sum.reset()
        self._count = 0


@dataclass
class Tier:
    """Learners of one speed: each pass waits for all of them, and no tier waits for another."""

    model: Numbers | None = None
    """(layout.nbytes,) uint8: the mean of the tier's last pass, flat; None before its first."""
    passes: int = 0
    examples: float = 0.0
    """Behind its model."""
    pace_s: float | None = None
    """The median of what its learners took in its last pass."""
    waiting_for: dict[str, float] = field(default_factory=dict)
    """Learners at work in this pass, and when they were asked."""
    took_s: list[float] = field(default_factory=list)
    """Of the updates that have arrived in this pass."""
    mean: WeightedMean | None = None


class FedAT(Mixing):
    """Tiers by speed: synchronous inside, asynchronous between; slower tiers weigh more.

    All learners begin in the quickest tier. A tier that has waited half as long again as its last answer took
    closes without those that are still at work: they belong to the next tier. From then on each learner
    works with the quickest tier whose pace it can keep, by its smoothed answer time. After each pass of a
    tier the global model is the mean of all tiers' models, each weighted by its examples times the number of
    passes of the opposite tier: the quickest by those of the slowest, and so on. Tiers without a pass so far,
    or without learners, have no say.

    In memory: 8 bytes a parameter and one model for each tier.

    Source:
        Chai et al. 2021, arXiv:2010.05958, Algorithms 1 and 2. It measures speeds beforehand and makes tiers
        of equally many learners, so it does not weigh examples; and its tiers without a pass stand for the
        initial model. ``proximal_mu`` is its lambda; the learners' code has to apply it.
    """

    def __init__(
        self, parameters: Mapping[str, Any], blocks: Blocks, answer_s: Callable[[str], float | None]
    ) -> None:
        """Args: answer_s tells how long a learner takes, smoothed; None where that is not known."""
        super().__init__(parameters, blocks)
        self._answer_s = answer_s
        self.tiers = [Tier() for _ in range(parameters["tiers"])]
        self._tier_of: dict[str, int] = {}
        self._nbytes = blocks[-1].end if blocks else 0

    def may_ask(self, idle: Sequence[str]) -> list[str]:
        # A pass takes in whoever comes before its first update; later ones wait for the next.
        return [learner for learner in idle if not self.tiers[self.tier_of(learner)].took_s]

    def asked(self, learner: str, now: float) -> None:
        place = self.tier_of(learner)
        self._tier_of[learner] = place
        self.tiers[place].waiting_for[learner] = now

    def tier_of(self, learner: str) -> int:
        """The tier that a learner works in, or would if it were asked now; 0 is the quickest."""
        place = self._tier_of.get(learner, 0)
        if learner in self.tiers[place].waiting_for:
            return place
        takes_s = self._answer_s(learner)
        if takes_s is None:
            return place
        for number, tier in enumerate(self.tiers):
            if tier.pace_s is None or takes_s <= _with_gap(tier.pace_s):
                return number
        return len(self.tiers) - 1

    def take(self, update: Update, base: GlobalModel, staleness: int, took_s: float) -> float:
        place = self._tier_of.setdefault(update.learner, self.tier_of(update.learner))
        tier = self.tiers[place]
        tier.waiting_for.pop(update.learner, None)
        if tier.mean is None:
            tier.mean = WeightedMean(self._blocks)
        tier.mean.fold(update.body, float(update.num_examples))
        update.body.release()
        tier.took_s.append(took_s)
        return 1.0

    def lost(self, learner: str) -> None:
        place = self._tier_of.pop(learner, None)
        if place is not None:
            self.tiers[place].waiting_for.pop(learner, None)

    def due(self, now: float) -> bool:
        return any(now >= self._closes_at(number) for number in range(len(self.tiers)))

    def look_again(self, now: float) -> float:
        return min(self._closes_at(number) for number in range(len(self.tiers)))

    def _closes_at(self, number: int) -> float:
        """When a tier ends its pass, if nobody says anything more."""
        tier = self.tiers[number]
        if not tier.took_s:
            return math.inf
        if not tier.waiting_for:
            return -math.inf
        if number == len(self.tiers) - 1:
            return math.inf
        return max(tier.waiting_for.values()) + _with_gap(max(tier.took_s))

    def step(self, model: GlobalModel) -> Step:
        number = min(range(len(self.tiers)), key=self._closes_at)
        self._close(number)
        active = [
            tier for place, tier in enumerate(self.tiers) if tier.passes and place in self._tier_of.values()
        ]
        shares = [
            passes * tier.examples
            for passes, tier in zip(reversed([tier.passes for tier in active]), active, strict=True)
        ]
        weights = [share / sum(shares) for share in shares]
        for block in self._blocks:
            total = np.zeros(block.count, np.float64)
            for weight, tier in zip(weights, active, strict=True):
                assert tier.model is not None
                total += weight * block.view(tier.model[block.offset : block.end].data)
            yield block, as_dtype(total, block.dtype)

    def _close(self, number: int) -> None:
        """End a tier's pass; who is still at work goes on in the next tier."""
        tier = self.tiers[number]
        assert tier.mean is not None
        flat = np.empty(self._nbytes, np.uint8)
        for block, mean in tier.mean.result():
            flat[block.offset : block.end] = mean.view(np.uint8)
        tier.model = flat
        tier.examples = tier.mean.total_weight
        tier.mean.reset()
        tier.passes += 1
        tier.pace_s = float(np.median(tier.took_s))
        tier.took_s = []
        if tier.waiting_for:
            self._tier_of.update(dict.fromkeys(tier.waiting_for, number + 1))
            self.tiers[number + 1].waiting_for.update(tier.waiting_for)
            tier.waiting_for = {}

    def state(self) -> dict[str, Numbers]:
        arrays: dict[str, Numbers] = {
            "passes": np.array([tier.passes for tier in self.tiers]),
            "examples": np.array([tier.examples for tier in self.tiers]),
            "pace_s": np.array([-1.0 if tier.pace_s is None else tier.pace_s for tier in self.tiers]),
        }
        for number, tier in enumerate(self.tiers):
            if tier.model is not None:
                arrays[f"tier/{number}"] = tier.model
        return arrays

    def restore(self, state: Mapping[str, Numbers]) -> None:
        for number, tier in enumerate(self.tiers):
            if f"tier/{number}" in state:
                tier.model = state[f"tier/{number}"]
                tier.passes = int(state["passes"][number])
                tier.examples = float(state["examples"][number])
                tier.pace_s = float(state["pace_s"][number])


def make_mixing(
    name: str, parameters: Mapping[str, Any], blocks: Blocks, answer_s: Callable[[str], float | None]
) -> Mixing:
    """The mixing of a strategy.

    Raises:
        InvalidInputError: a parameter that it does not take.
    """
    values = asynchronous_parameters(name, parameters)
    if name == "FedAT":
        return FedAT(values, blocks, answer_s)
    return {"FedAsync": FedAsync, "FedBuff": FedBuff}[name](values, blocks)


class _Difference:
    """An update minus the model it was made from, computed block by block."""

    def __init__(self, body: Body, base: GlobalModel) -> None:
        self._body, self._base = body, base

    def read(self, block: Block) -> Numbers:
        difference = self._body.read(block).astype(np.float64)
        difference -= _numbers(self._base, block)
        return difference

    def arrays(self) -> list[Numbers]:
        raise AssertionError("a difference is read block by block")

    def release(self) -> None:
        self._body.release()


def _numbers(model: GlobalModel, block: Block) -> Numbers:
    return block.view(model.body[block.offset : block.end])


def _with_gap(seconds: float) -> float:
    return max(_GAP * seconds, seconds + _GAP_S)
