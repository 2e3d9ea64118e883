"""Cohorts: which of the ready learners are asked in a round, and the history that the choice looks at.

Everything here is a function of its arguments: the same seed, round, learners and history give the same
cohort, in this life of the aggregator or the next. Nothing waits, sends or reads a clock.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from flops.core.errors import InvalidInputError

FLOOR = 0.2
"""The share of its chances that the policy *availability* gives to all learners alike."""
_NEW_SHARE = 0.25  # of the newest answer in the smoothed time: about the last seven answers count
_PENALTY = 2.0  # Oort's default exponent for learners slower than the preferred time


@dataclass
class Record:
    """What is remembered of one learner."""

    asked: int = 0
    answered: int = 0
    """Of these, how often an answer of it counted."""
    answer_s: float | None = None
    """How long it takes for an answer, smoothed; None: it never answered."""
    last_asked: int = 0
    """The last round it was asked in; 0: none."""
    refusals: int = 0
    """Answers that were refused, ever."""


class History:
    """One record for each member, never more. Owned by one thread; kept in the aggregator's checkpoint."""

    def __init__(self, members: Iterable[str]) -> None:
        self._records = {learner: Record() for learner in members}

    def of(self, learner: str) -> Record:
        """The record of a member."""
        return self._records[learner]

    def ask(self, learners: Iterable[str], round_number: int) -> None:
        """These learners are asked in this round."""
        for learner in learners:
            record = self._records[learner]
            record.asked += 1
            record.last_asked = round_number

    def answer(self, learner: str, seconds: float) -> None:
        """An answer of this learner counted, so long after it was asked."""
        record = self._records[learner]
        record.answered += 1
        record.answer_s = _smoothed(record.answer_s, seconds)

    def miss(self, learner: str, waited_s: float) -> None:
        """No answer came for so long: it takes at least that time."""
        record = self._records[learner]
        if record.answer_s is None or waited_s > record.answer_s:
            record.answer_s = _smoothed(record.answer_s, waited_s)

    def refuse(self, learner: str) -> int:
        """An answer of this learner was refused; returns how many were, so far."""
        record = self._records[learner]
        record.refusals += 1
        return record.refusals

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Values for JSON; members of whom there is nothing to say are left out."""
        return {learner: asdict(record) for learner, record in self._records.items() if record != Record()}

    @classmethod
    def from_json(cls, members: Iterable[str], data: Mapping[str, Mapping[str, Any]]) -> Self:
        """The history that `to_json` wrote; what it says of others than the members is dropped.

        Raises:
            TypeError: it was not written by `to_json`.
        """
        history = cls(members)
        for learner in history._records.keys() & data.keys():
            history._records[learner] = Record(**data[learner])
        return history


def cohort_size(ready: int, fraction: float, minimum: int, over_sample: float = 1.0) -> tuple[int, int]:
    """How many learners to ask, and how many answers close the round.

    Args:
        ready: learners that could be asked.
        fraction: of them that are wanted, rounded up.
        minimum: wanted in any case.
        over_sample: learners asked for each one that is wanted.
    Returns:
        (asked, needed), where 0 <= needed <= asked <= ready.
    """
    needed = min(ready, max(minimum, _ceil(ready * fraction)))
    return min(ready, _ceil(needed * over_sample)), needed


def choose(
    policy: str,
    *,
    round_number: int,
    seed: int,
    ready: Sequence[str],
    target: int,
    history: History,
    max_examples: Mapping[str, int | None],
) -> list[str]:
    """Choose a round's cohort.

    - ``random``: every subset of that size is equally likely.
    - ``round-robin``: who was not asked for longest. Nobody is asked twice while a ready learner was never
      asked, and while the same learners are ready nobody is asked two times more often than another.
    - ``data-size``: one after the other, each drawn in proportion to its examples; where a learner's are not
      known, it counts like the mean of the others.
    - ``availability``: one after the other, each drawn in proportion to (1 - `FLOOR`) times its share of all
      merits plus `FLOOR` / n for n ready learners. Its merit is the part of its tasks that it answered, times
      (median answer time / its answer time)^2 if it is slower than the median of those that are ready. A
      learner is therefore chosen with probability 1 - (1 - FLOOR / n)^target at least, whatever its history:
      its expected wait is at most 1 + n / (FLOOR * target) rounds in which it is ready.

    Args:
        seed: of the project; with the round it decides all chances.
        ready: the learners that could be asked, in slot order.
        target: how many to choose; all are chosen where there are fewer.
        max_examples: the training examples of each learner; None or missing: not known.
    Returns:
        the chosen learners, in the order of ``ready``.
    Raises:
        InvalidInputError: there is no such policy.
    Source:
        Draws without replacement: Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003. The penalty of
        slow learners: Lai et al. 2021 (Oort), arXiv:2010.06081, equation 1.
    """
    order = _POLICIES.get(policy)
    if order is None:
        raise InvalidInputError(
            f"cohort policy '{policy[:40]}' is unknown - set training.cohort to one of {', '.join(_POLICIES)}"
        )
    if target <= 0 or target >= len(ready):
        return list(ready) if target > 0 else []
    generator = np.random.default_rng(np.random.SeedSequence([abs(seed), round_number]))
    records = [history.of(learner) for learner in ready]
    examples = [max_examples.get(learner) for learner in ready]
    chosen = order(generator, records, examples)[:target]
    return [ready[place] for place in sorted(chosen)]


def merits(records: Sequence[Record]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What each learner's history is worth to the policy *availability*; (n,), from 0 to 1, not all 0."""
    known = [record.answer_s for record in records if record.answer_s is not None]
    usual_s = float(np.median(known)) if known else 0.0
    return np.array([_reliability(record) * _speed(record, usual_s) for record in records])


def _reliability(record: Record) -> float:
    return (min(record.answered, record.asked) + 1) / (record.asked + 1)  # whoever is new has the benefit


def _speed(record: Record, usual_s: float) -> float:
    if record.answer_s is None or record.answer_s <= usual_s:
        return 1.0
    return float((usual_s / record.answer_s) ** _PENALTY)


_Generator = np.random.Generator
_Order = Callable[[_Generator, Sequence[Record], Sequence[int | None]], list[int]]


def _random(generator: _Generator, records: Sequence[Record], examples: Sequence[int | None]) -> list[int]:
    return [int(place) for place in generator.permutation(len(records))]


def _round_robin(
    generator: _Generator, records: Sequence[Record], examples: Sequence[int | None]
) -> list[int]:
    # Of those asked in the same round, whoever was asked less often had to wait longer before it.
    chance = generator.permutation(len(records))
    return sorted(
        range(len(records)),
        key=lambda place: (records[place].last_asked, records[place].asked, chance[place]),
    )


def _data_size(generator: _Generator, records: Sequence[Record], examples: Sequence[int | None]) -> list[int]:
    known = [number for number in examples if number]
    usual = sum(known) / len(known) if known else 1.0
    return _weighted(generator, np.array([float(number or usual) for number in examples]))


def _availability(
    generator: _Generator, records: Sequence[Record], examples: Sequence[int | None]
) -> list[int]:
    merit = merits(records)
    return _weighted(generator, (1 - FLOOR) * merit / merit.sum() + FLOOR / len(records))


def _weighted(generator: _Generator, weights: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
    """All places in the order in which draws without replacement, in proportion to the weights, take them."""
    # The first of exponential clocks to ring is each one in proportion to its rate, and so is the next.
    return [int(place) for place in np.argsort(generator.standard_exponential(len(weights)) / weights)]


_POLICIES: Mapping[str, _Order] = {
    "random": _random,
    "round-robin": _round_robin,
    "data-size": _data_size,
    "availability": _availability,
}


def _smoothed(before: float | None, seconds: float) -> float:
    return seconds if before is None else before + _NEW_SHARE * (seconds - before)


def _ceil(number: float) -> int:
    return math.ceil(round(number, 9))  # 10 * 1.1 is 11, not the 11.000000000000002 of binary fractions
