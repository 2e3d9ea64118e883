"""Cohorts: laws that hold for every history, and frequencies against exact probabilities."""

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flops.core.errors import InvalidInputError
from flops.federation.cohorts import FLOOR, History, choose, cohort_size, merits

POLICIES = ("random", "round-robin", "data-size", "availability")
LEARNERS = [f"l-{number:03}" for number in range(12)]

_seconds = st.floats(0.0, 1e6)
_events = st.lists(
    st.tuples(st.sampled_from(["ask", "answer", "miss", "refuse"]), st.sampled_from(LEARNERS), _seconds),
    max_size=60,
)


def _history(events: list[tuple[str, str, float]]) -> History:
    history = History(LEARNERS)
    for number, (event, learner, seconds) in enumerate(events, start=1):
        if event == "ask":
            history.ask([learner], number)
        elif event == "answer":
            history.answer(learner, seconds)
        elif event == "miss":
            history.miss(learner, seconds)
        else:
            history.refuse(learner)
    return history


def _choose(policy: str, ready: list[str], target: int, **more: Any) -> list[str]:
    defaults: dict[str, Any] = {
        "round_number": 1,
        "seed": 0,
        "history": History(LEARNERS),
        "max_examples": {},
    }
    return choose(policy, ready=ready, target=target, **{**defaults, **more})


# -- laws


@given(
    policy=st.sampled_from(POLICIES),
    events=_events,
    ready=st.lists(st.sampled_from(LEARNERS), unique=True),
    target=st.integers(0, 14),
    seed=st.integers(0, 2**32 - 1),
    round_number=st.integers(1, 100_000),
    examples=st.dictionaries(st.sampled_from(LEARNERS), st.none() | st.integers(0, 2**40)),
)
def test_a_cohort_has_its_size_keeps_the_order_and_comes_out_again(
    policy: str,
    events: list[tuple[str, str, float]],
    ready: list[str],
    target: int,
    seed: int,
    round_number: int,
    examples: dict[str, int | None],
) -> None:
    def again(history: History) -> list[str]:
        return choose(
            policy,
            round_number=round_number,
            seed=seed,
            ready=ready,
            target=target,
            history=history,
            max_examples=examples,
        )

    history = _history(events)
    np.random.seed(target)  # no global generator has a say
    chosen = again(history)
    assert len(chosen) == min(target, len(ready))
    assert chosen == [learner for learner in ready if learner in chosen]
    kept = History.from_json(LEARNERS, json.loads(json.dumps(history.to_json())))
    assert again(kept) == chosen


@given(events=_events)
def test_a_history_survives_its_way_through_json(events: list[tuple[str, str, float]]) -> None:
    history = _history(events)
    kept = History.from_json(LEARNERS, json.loads(json.dumps(history.to_json())))
    assert [kept.of(learner) for learner in LEARNERS] == [history.of(learner) for learner in LEARNERS]


def test_a_history_keeps_members_only() -> None:
    history = _history([("ask", "l-000", 0.0), ("ask", "l-001", 0.0)])
    assert set(History.from_json(["l-001", "new"], history.to_json()).to_json()) == {"l-001"}
    with pytest.raises(KeyError):
        history.ask(["nobody"], 1)
    with pytest.raises(TypeError):
        History.from_json(["l-001"], {"l-001": {"asked": 1, "unheard of": 2}})


@given(events=_events, ready=st.lists(st.sampled_from(LEARNERS), min_size=1, unique=True))
def test_merits_lie_between_nothing_and_one_and_somebody_has_some(
    events: list[tuple[str, str, float]], ready: list[str]
) -> None:
    values = merits([_history(events).of(learner) for learner in ready])
    assert ((values >= 0) & (values <= 1)).all()
    assert values.sum() > 0


@given(
    rounds=st.lists(
        st.tuples(st.sets(st.sampled_from(LEARNERS), min_size=1), st.integers(1, 12)), max_size=40
    )
)
def test_round_robin_asks_who_waited_longest_whoever_comes_and_goes(
    rounds: list[tuple[set[str], int]],
) -> None:
    history = History(LEARNERS)
    for number, (ready, target) in enumerate(rounds, start=1):
        chosen = _choose("round-robin", sorted(ready), target, round_number=number, history=history)
        left = ready - set(chosen)
        latest = max(history.of(learner).last_asked for learner in chosen)
        assert all(history.of(learner).last_asked >= latest for learner in left)
        if any(history.of(learner).asked == 0 for learner in left):
            assert all(history.of(learner).asked == 0 for learner in chosen)
        history.ask(chosen, number)


@given(learners=st.integers(1, 12), targets=st.lists(st.integers(1, 12), max_size=40), seed=st.integers(0, 9))
def test_round_robin_asks_everybody_equally_often(learners: int, targets: list[int], seed: int) -> None:
    history = History(LEARNERS)
    ready = LEARNERS[:learners]
    for number, target in enumerate(targets, start=1):
        history.ask(
            _choose("round-robin", ready, target, round_number=number, seed=seed, history=history), number
        )
        times = [history.of(learner).asked for learner in ready]
        assert max(times) - min(times) <= 1


@given(
    ready=st.integers(0, 10_000),
    fraction=st.floats(1e-6, 1.0),
    minimum=st.integers(1, 10_000),
    over_sample=st.floats(1.0, 10.0),
)
def test_as_many_are_asked_as_are_needed_and_there(
    ready: int, fraction: float, minimum: int, over_sample: float
) -> None:
    asked, needed = cohort_size(ready, fraction, minimum, over_sample)
    assert 0 <= needed <= asked <= ready
    assert needed >= min(ready, minimum)
    assert needed >= min(ready, ready * fraction - 1e-6)


@pytest.mark.parametrize(
    ("ready", "fraction", "minimum", "over_sample", "expected"),
    [
        (10, 0.3, 1, 1.0, (3, 3)),
        (10, 0.3, 1, 1.1, (4, 3)),
        (10, 1.0, 1, 2.0, (10, 10)),
        (100, 0.29, 1, 1.0, (29, 29)),  # 28.999999999999996 in binary
        (100, 0.1, 1, 1.1, (11, 10)),  # 11.000000000000002
        (10, 0.01, 2, 1.5, (3, 2)),
        (3, 0.5, 5, 1.0, (3, 3)),
        (0, 0.5, 1, 1.3, (0, 0)),
    ],
)
def test_sizes(
    ready: int, fraction: float, minimum: int, over_sample: float, expected: tuple[int, int]
) -> None:
    assert cohort_size(ready, fraction, minimum, over_sample) == expected


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"'fastest' is unknown - .* random, round-robin, data-size"):
        _choose("fastest", LEARNERS, 1)


# -- frequencies


def _frequencies(policy: str, ready: list[str], target: int, rounds: int, **more: Any) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for number in range(1, rounds + 1):
        counts.update(_choose(policy, ready, target, round_number=number, **more))
    return {learner: counts[learner] / rounds for learner in ready}


def _inclusion(weights: list[float], target: int) -> list[float]:
    """How likely each is among the first draws without replacement: the sum over all orders of drawing."""
    result = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), target):
        probability, left = 1.0, sum(weights)
        for place in order:
            probability *= weights[place] / left
            left -= weights[place]
        for place in order:
            result[place] += probability
    return result


def _assert_close(frequencies: dict[str, float], expected: list[float], rounds: int) -> None:
    for frequency, probability in zip(frequencies.values(), expected, strict=True):
        sigma = (probability * (1 - probability) / rounds) ** 0.5
        assert abs(frequency - probability) < 4.5 * sigma + 1e-12


def test_every_subset_is_equally_likely_at_random() -> None:
    rounds, ready = 6000, LEARNERS[:5]
    counts = Counter(
        tuple(_choose("random", ready, 2, round_number=number, seed=3)) for number in range(1, rounds + 1)
    )
    assert len(counts) == 10
    expected = rounds / 10
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("target", [1, 2, 3])
def test_examples_decide_how_often_a_learner_is_chosen(target: int) -> None:
    rounds, ready = 5000, LEARNERS[:5]
    examples: dict[str, int | None] = dict(zip(ready, [10, 20, 30, 100, 400], strict=True))
    frequencies = _frequencies("data-size", ready, target, rounds, seed=5, max_examples=examples)
    _assert_close(frequencies, _inclusion([10, 20, 30, 100, 400], target), rounds)


def test_a_learner_of_unknown_size_counts_like_the_mean_of_the_others() -> None:
    rounds, ready = 4000, LEARNERS[:3]
    examples = {ready[0]: 100, ready[1]: None, ready[2]: 300}
    frequencies = _frequencies("data-size", ready, 1, rounds, seed=1, max_examples=examples)
    _assert_close(frequencies, [1 / 6, 2 / 6, 3 / 6], rounds)
    nobody_knows = _frequencies("data-size", ready, 1, rounds, seed=2)
    _assert_close(nobody_knows, [1 / 3] * 3, rounds)


def _slow_and_unreliable() -> History:
    """Six learners: usual, a bit slow, ten times slower, answers every second time, never answers, new."""
    history = History(LEARNERS)
    for number in range(1, 21):
        history.ask(LEARNERS[:5], number)
        history.answer(LEARNERS[0], 1.0)
        history.answer(LEARNERS[1], 1.25)
        history.answer(LEARNERS[2], 10.0)
        if number % 2:
            history.answer(LEARNERS[3], 1.0)
        history.miss(LEARNERS[4], 100.0)
    return history


def test_merits_follow_reliability_and_speed() -> None:
    history = _slow_and_unreliable()
    values = merits([history.of(learner) for learner in LEARNERS[:6]])
    np.testing.assert_allclose(values, [1.0, 1.0, 1.25**2 / 100, 11 / 21, 1.25**2 / 100**2 / 21, 1.0])


def test_availability_prefers_who_answers_quickly() -> None:
    rounds, ready = 4000, LEARNERS[:6]
    history = _slow_and_unreliable()
    merit = merits([history.of(learner) for learner in ready])
    weights = [float((1 - FLOOR) * value / merit.sum() + FLOOR / 6) for value in merit]
    frequencies = _frequencies("availability", ready, 2, rounds, seed=9, history=history)
    _assert_close(frequencies, _inclusion(weights, 2), rounds)
    assert frequencies[ready[0]] > 3 * frequencies[ready[2]] > 0


@pytest.mark.parametrize(("learners", "target"), [(3, 1), (6, 2), (12, 3)])
def test_the_worst_learner_does_not_wait_longer_than_the_bound(learners: int, target: int) -> None:
    """Everybody else is perfect, and it never answers: no history can be worse."""
    ready = LEARNERS[:learners]
    history = History(LEARNERS)
    for number in range(1, 1001):
        history.ask(ready, number)
        for learner in ready[1:]:
            history.answer(learner, 0.001)
        history.miss(ready[0], 1e6)
    rounds = 5000
    frequency = _frequencies("availability", ready, target, rounds, seed=4, history=history)[ready[0]]
    least = 1 - (1 - FLOOR / learners) ** target
    assert frequency > least - 4.5 * (least * (1 - least) / rounds) ** 0.5
    bound = 1 + learners / (FLOOR * target)
    assert 1 / least <= bound
    assert 1 / frequency < bound


@given(learners=st.integers(2, 500), target=st.integers(1, 499))
def test_the_bound_of_the_wait_follows_from_the_floor(learners: int, target: int) -> None:
    assert 1 / (1 - (1 - FLOOR / learners) ** target) <= 1 + learners / (FLOOR * target) + 1e-9


@settings(max_examples=30)
@given(events=_events, learners=st.integers(2, 6), target=st.integers(1, 5))
def test_nobody_falls_below_the_floor_whatever_its_history(
    events: list[tuple[str, str, float]], learners: int, target: int
) -> None:
    history = _history(events)
    merit = merits([history.of(learner) for learner in LEARNERS[:learners]])
    weights = [float((1 - FLOOR) * value / merit.sum() + FLOOR / learners) for value in merit]
    target = min(target, learners - 1)
    least = 1 - (1 - FLOOR / learners) ** target
    assert min(_inclusion(weights, target)) >= least - 1e-12


def test_waits_of_a_slow_learner_stay_within_the_bound_while_histories_grow() -> None:
    """The history follows from the choices, as in a training."""
    ready, target, slow = LEARNERS[:8], 2, LEARNERS[3]
    history = History(LEARNERS)
    waits, since = [], 0
    for number in range(1, 3001):
        chosen = _choose("availability", ready, target, round_number=number, seed=11, history=history)
        history.ask(chosen, number)
        for learner in chosen:
            history.answer(learner, 10.0 if learner == slow else 1.0)
        since += 1
        if slow in chosen:
            waits.append(since)
            since = 0
    assert sum(waits) / len(waits) < 1 + len(ready) / (FLOOR * target)
    assert history.of(slow).asked < min(history.of(learner).asked for learner in ready if learner != slow)
