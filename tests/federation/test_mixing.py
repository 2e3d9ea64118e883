"""The arithmetic of asynchronous strategies against a plain numpy oracle, and their parameters."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core.errors import InvalidInputError
from flops.core.spec import ASYNCHRONOUS_STRATEGIES
from flops.federation.blocks import blocks
from flops.federation.hub import GlobalModel
from flops.federation.mixing import FedAT, Mixing, discount, make_mixing
from flops.federation.strategies import ASYNCHRONOUS, Reduction, check_strategy
from flops.federation.updates import MemoryBody, Update
from flops_worker.tensors import Layout

ARRAYS: list[Any] = [np.zeros((3, 5), np.float32), np.zeros(4, np.int64), np.zeros((2, 2), np.float64)]
LAYOUT = Layout.of(ARRAYS)
BLOCKS = blocks(LAYOUT)
Numbers = list[Any]


def _bytes(arrays: Numbers) -> bytes:
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def _model(version: int, arrays: Numbers) -> GlobalModel:
    return GlobalModel(version + 1, version, memoryview(_bytes(arrays)), BLOCKS)


def _update(arrays: Numbers, learner: str = "a", num_examples: int = 10) -> Update:
    return Update(learner, num_examples, {}, MemoryBody(LAYOUT, BLOCKS, _bytes(arrays)))


def _random(rng: np.random.Generator) -> Numbers:
    return [
        rng.standard_normal((3, 5)).astype(np.float32),
        rng.integers(-50, 50, 4),
        rng.standard_normal((2, 2)),
    ]


def _stored(array: Any, like: Any) -> Any:
    """How a number is kept: integers rounded to the nearest, floats in their own precision."""
    return np.rint(array).astype(like.dtype) if like.dtype.kind == "i" else array.astype(like.dtype)


def _step(mixing: Mixing, model: GlobalModel) -> Numbers:
    flat = bytearray(LAYOUT.nbytes)
    for block, values in mixing.step(model):
        assert values.dtype == block.dtype
        flat[block.offset : block.end] = values.tobytes()
    return [
        np.frombuffer(bytes(flat), tensor.numpy_dtype, int(np.prod(tensor.shape)), tensor.offset).reshape(
            tensor.shape
        )
        for tensor in LAYOUT.tensors
    ]


def _assert_equal(got: Numbers, expected: Numbers) -> None:
    for ours, theirs, like in zip(got, expected, ARRAYS, strict=True):
        np.testing.assert_allclose(ours, _stored(theirs, like), rtol=1e-6, atol=1e-7)


def _make(name: str, answer_s: Any = lambda learner: None, **parameters: Any) -> Mixing:
    return make_mixing(name, parameters, BLOCKS, answer_s)


# -- discounts


@pytest.mark.parametrize(
    ("function", "a", "b", "expected"),
    [
        ("constant", None, 4, [1, 1, 1, 1]),
        ("polynomial", None, 4, [1, 1 / np.sqrt(2), 1 / np.sqrt(6), 1 / np.sqrt(11)]),
        ("polynomial", 1.0, 4, [1, 1 / 2, 1 / 6, 1 / 11]),
        ("hinge", None, 4, [1, 1, 1 / 11, 1 / 61]),
        ("hinge", 1.0, 0, [1, 1 / 2, 1 / 6, 1 / 11]),
    ],
)
def test_discounts(function: str, a: float | None, b: float, expected: list[float]) -> None:
    np.testing.assert_allclose([discount(function, s, a, b) for s in (0, 1, 5, 10)], expected)


@given(
    function=st.sampled_from(["constant", "hinge", "polynomial"]),
    a=st.none() | st.floats(0, 1000) | st.integers(0, 1000),
    b=st.floats(0, 1e6),
    staleness=st.integers(0, 1_000_000),
)
def test_a_staler_update_never_counts_more(function: str, a: float | None, b: float, staleness: int) -> None:
    assert discount(function, 0, a, b) == 1.0
    assert 0.0 <= discount(function, staleness + 1, a, b) <= discount(function, staleness, a, b) <= 1.0


# -- FedAsync


def test_fedasync_mixes_each_update_by_its_staleness() -> None:
    rng = np.random.default_rng(1)
    mixing = _make("FedAsync", alpha=0.6, staleness="polynomial", a=0.5)
    current = _random(rng)
    for version, staleness in enumerate([0, 3, 1, 7]):
        update = _random(rng)
        share = mixing.take(_update(update), _model(version, current), staleness, 1.0)
        assert share == (staleness + 1) ** -0.5
        assert mixing.due(0.0)
        weight = 0.6 * share
        expected = [(1 - weight) * x + weight * y for x, y in zip(current, update, strict=True)]
        current = _step(mixing, _model(version, current))
        _assert_equal(current, expected)
        assert not mixing.due(0.0)


def test_fedasync_ends_a_round_after_as_many_updates_as_learners_work_at_once() -> None:
    rng = np.random.default_rng(2)
    for parameters, every in (({}, 3), ({"updates_per_round": 2}, 2)):
        mixing = _make("FedAsync", **parameters)
        mixing.at_once = 3
        ends = []
        for version in range(7):
            mixing.take(_update(_random(rng)), _model(version, ARRAYS), 0, 1.0)
            ends.append(mixing.ends_round)
            _step(mixing, _model(version, ARRAYS))
            if ends[-1]:
                mixing.round_ended()
        assert ends == [number % every == 0 for number in range(1, 8)]


# -- FedBuff


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_fedbuff_adds_the_discounted_differences_when_the_buffer_is_full(rate: float) -> None:
    rng = np.random.default_rng(3)
    mixing = _make("FedBuff", buffer_size=4, server_learning_rate=rate)
    current = _random(rng)
    for _ in range(2):
        bases = [_random(rng) for _ in range(4)]
        updates = [_random(rng) for _ in range(4)]
        staleness = [0, 1, 4, 9]
        expected = [array.astype(np.float64) for array in current]
        for base, update, age in zip(bases, updates, staleness, strict=True):
            assert not mixing.due(0.0)
            mixing.take(_update(update), _model(0, base), age, 1.0)
            for position in range(len(expected)):
                difference = update[position].astype(np.float64) - base[position]
                expected[position] = expected[position] + rate / 4 / np.sqrt(1 + age) * difference
        assert mixing.due(0.0)
        current = _step(mixing, _model(0, current))
        _assert_equal(current, expected)


def test_fedbuff_of_fresh_updates_is_their_mean() -> None:
    """Without staleness, and as large as the cohort, it is FedAvg of equally many examples."""
    rng = np.random.default_rng(4)
    base, updates = _random(rng), [_random(rng) for _ in range(3)]
    mixing = _make("FedBuff", buffer_size=3)
    for update in updates:
        mixing.take(_update(update), _model(0, base), 0, 1.0)
    got = _step(mixing, _model(0, base))
    mean = [np.mean([update[i] for update in updates], axis=0) for i in range(3)]
    for ours, theirs, like in zip(got, mean, ARRAYS, strict=True):
        np.testing.assert_allclose(ours, _stored(theirs, like), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("at_once", "size"), [(1, 1), (2, 1), (5, 3), (10, 5), (1000, 10)])
def test_fedbuffs_buffer_follows_the_number_of_learners(at_once: int, size: int) -> None:
    mixing = _make("FedBuff")
    mixing.at_once = at_once
    assert mixing.buffer_size == size  # type: ignore[attr-defined]


# -- FedAT


class Speeds:
    """A clock, and learners that take as long as they take."""

    def __init__(self, tiers: int = 3) -> None:
        self.known: dict[str, float] = {}
        self.now = 0.0
        made = _make("FedAT", self.known.get, tiers=tiers)
        assert isinstance(made, FedAT)
        self.mixing = made

    def ask(self, *learners: str) -> None:
        for learner in learners:
            self.mixing.asked(learner, self.now)

    def answer(self, learner: str, took_s: float, arrays: Numbers, num_examples: int = 10) -> None:
        self.known[learner] = took_s
        self.mixing.take(_update(arrays, learner, num_examples), _model(0, ARRAYS), 0, took_s)


def test_fedat_finds_tiers_by_speed_and_never_waits_for_a_slower_one() -> None:
    speeds = Speeds()
    mixing = speeds.mixing
    model = _model(0, ARRAYS)
    speeds.ask("a", "b", "c", "d")
    speeds.now = 1.0
    speeds.answer("a", 1.0, ARRAYS)
    assert not mixing.due(speeds.now)
    assert mixing.look_again(speeds.now) == 1.5
    speeds.now = 1.1
    speeds.answer("b", 1.1, ARRAYS)
    assert mixing.look_again(speeds.now) == pytest.approx(1.65)
    assert mixing.due(1.66)
    _step(mixing, model)
    assert [mixing.tier_of(learner) for learner in "abcd"] == [0, 0, 1, 1]
    assert mixing.may_ask(["a", "b"]) == ["a", "b"]
    speeds.now = 4.0
    speeds.answer("c", 4.0, ARRAYS)
    assert mixing.may_ask(["c"]) == []  # its tier still waits for d
    assert mixing.due(6.0)
    _step(mixing, model)
    speeds.now = 20.0
    speeds.answer("d", 20.0, ARRAYS)
    assert mixing.due(speeds.now)
    _step(mixing, model)
    assert [mixing.tier_of(learner) for learner in "abcd"] == [0, 0, 1, 2]
    assert not mixing.due(1e9)


def test_the_slowest_tier_waits_for_all_its_learners() -> None:
    speeds = Speeds(tiers=2)
    speeds.ask("a", "b", "c")
    speeds.answer("a", 1.0, ARRAYS)
    _step(speeds.mixing, _model(0, ARRAYS))
    speeds.answer("b", 5.0, ARRAYS)
    assert not speeds.mixing.due(1e9)
    speeds.mixing.lost("c")  # its deadline has passed
    assert speeds.mixing.due(5.0)


def test_a_learner_that_becomes_quick_joins_the_quick_tier() -> None:
    speeds = Speeds()
    speeds.ask("a", "b")
    speeds.answer("a", 1.0, ARRAYS)
    _step(speeds.mixing, _model(0, ARRAYS))
    speeds.answer("b", 9.0, ARRAYS)
    _step(speeds.mixing, _model(0, ARRAYS))
    assert speeds.mixing.tier_of("b") == 1
    speeds.known["b"] = 1.2
    assert speeds.mixing.tier_of("b") == 0


def test_fedat_weighs_tiers_by_their_examples_and_the_passes_of_the_opposite_ones() -> None:
    rng = np.random.default_rng(5)
    speeds = Speeds(tiers=2)
    mixing = speeds.mixing
    tier_models: dict[int, Numbers] = {}
    passes = [0, 0]

    def merged() -> Numbers:
        present = sorted(tier_models)
        counts = [passes[number] for number in present][::-1]
        shares = [count * (40, 5)[number] for count, number in zip(counts, present, strict=True)]
        weights = [share / sum(shares) for share in shares]
        return [
            sum(
                weight * tier_models[number][i].astype(np.float64)
                for weight, number in zip(weights, present, strict=True)
            )
            for i in range(3)
        ]

    speeds.ask("a", "b", "slow")
    for turn in range(4):
        first, second = _random(rng), _random(rng)
        speeds.answer("a", 1.0, first, 10)
        speeds.answer("b", 1.1, second, 30)
        assert mixing.due(speeds.now + 10)
        tier_models[0] = [
            _stored((10 * x.astype(np.float64) + 30 * y) / 40, x) for x, y in zip(first, second, strict=True)
        ]
        passes[0] += 1
        _assert_equal(_step(mixing, _model(0, ARRAYS)), merged())
        if turn == 2:
            late = _random(rng)
            speeds.answer("slow", 10.0, late, 5)
            tier_models[1] = late
            passes[1] += 1
            _assert_equal(_step(mixing, _model(0, ARRAYS)), merged())
            speeds.ask("slow")
        speeds.ask("a", "b")
    assert passes == [4, 1]


def test_a_tier_without_learners_has_no_say() -> None:
    speeds = Speeds(tiers=2)
    mixing = speeds.mixing
    speeds.ask("a", "slow")
    ones: Numbers = [np.ones_like(array) for array in ARRAYS]
    speeds.answer("a", 1.0, ARRAYS)
    _step(mixing, _model(0, ARRAYS))
    speeds.answer("slow", 10.0, ones)
    _step(mixing, _model(0, ARRAYS))
    speeds.ask("slow", "a")
    mixing.lost("slow")
    speeds.answer("a", 1.0, ARRAYS)
    _assert_equal(_step(mixing, _model(0, ARRAYS)), ARRAYS)


def test_fedat_goes_on_with_the_tiers_that_it_had() -> None:
    rng = np.random.default_rng(6)
    first, second = Speeds(), Speeds()
    for speeds in (first, second):
        speeds.ask("a", "slow")
        speeds.known["slow"] = 10.0
    quick, slow = _random(rng), _random(rng)
    first.answer("a", 1.0, quick)
    _step(first.mixing, _model(0, ARRAYS))
    first.answer("slow", 10.0, slow)
    _step(first.mixing, _model(0, ARRAYS))
    restored = Speeds()
    restored.known = first.known
    made = _make("FedAT", restored.known.get, tiers=3)
    assert isinstance(made, FedAT)
    restored.mixing = made
    made.restore(first.mixing.state())
    newest = _random(rng)
    for speeds in (first, restored):
        speeds.ask("a", "slow")
        speeds.answer("a", 1.0, newest)
    _assert_equal(_step(restored.mixing, _model(0, ARRAYS)), _step(first.mixing, _model(0, ARRAYS)))


# -- parameters


def test_the_spec_and_the_strategies_name_the_same() -> None:
    assert set(ASYNCHRONOUS_STRATEGIES) == set(ASYNCHRONOUS)
    assert {check_strategy(name, {}) for name in ASYNCHRONOUS} == {Reduction.ONE_BY_ONE}


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("FedAsync", {"alhpa": 0.5}, "strategy FedAsync has no parameter alhpa - did you mean alpha?"),
        ("FedAT", {"x": 1}, "strategy FedAT has no parameter x - it has tiers, max_staleness, proximal_mu"),
        (
            "FedAsync",
            {"alpha": 0.0},
            "strategy parameter alpha of FedAsync must be a number above 0 and at most 1 (is 0.0)",
        ),
        (
            "FedAsync",
            {"alpha": "much"},
            "strategy parameter alpha of FedAsync must be a number above 0 and at most 1 (is much)",
        ),
        (
            "FedBuff",
            {"buffer_size": 0},
            "strategy parameter buffer_size of FedBuff must be a whole number from 1 to 10000 (is 0)",
        ),
        (
            "FedBuff",
            {"buffer_size": 2.5},
            "strategy parameter buffer_size of FedBuff must be a whole number from 1 to 10000 (is 2.5)",
        ),
        (
            "FedBuff",
            {"buffer_size": True},
            "strategy parameter buffer_size of FedBuff must be a whole number from 1 to 10000 (is True)",
        ),
        (
            "FedBuff",
            {"staleness": "linear"},
            "strategy parameter staleness of FedBuff must be one of constant, hinge, polynomial (is linear)",
        ),
        (
            "FedAT",
            {"tiers": 1},
            "strategy parameter tiers of FedAT must be a whole number from 2 to 20 (is 1)",
        ),
        (
            "FedAsync",
            {"max_staleness": -1},
            "strategy parameter max_staleness of FedAsync must be a whole number from 0 to 1000000 (is -1)",
        ),
        ("FedAsync", {"a": float("inf")}, "strategy parameter a must be a finite number (is inf)"),
    ],
)
def test_wrong_parameters_are_refused_by_name(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        check_strategy(name, parameters)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("FedAsync", {"alpha": 1, "staleness": "hinge", "a": 10, "b": 4, "updates_per_round": 7}),
        ("FedBuff", {"buffer_size": 10, "server_learning_rate": 0.5, "max_staleness": 0}),
        ("FedAT", {"tiers": 5, "proximal_mu": 0.4}),
    ],
)
def test_parameters_within_their_bounds_are_taken(name: str, parameters: dict[str, Any]) -> None:
    made = _make(name, **parameters)
    assert {key: made.parameters[key] for key in parameters} == parameters
