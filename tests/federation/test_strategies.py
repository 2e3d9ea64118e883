"""Strategies by name: the streamed and block-wise forms against Flower's own arithmetic, and numpy's."""

import inspect
import os
from typing import Any

import numpy as np
import pytest
from flwr.serverapp import strategy as flower_strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from flops.core.errors import InvalidInputError
from flops.federation import check_strategy
from flops.federation.blocks import all_usable, blocks
from flops.federation.flower import ExchangeGrid, FlowerStrategy, claim_process
from flops.federation.mean import WeightedMean, weighted_metrics
from flops.federation.model_file import as_dtype
from flops.federation.strategies import _NOT_YET, flower_strategy_names
from flops.federation.updates import MemoryBody, Update
from flops_worker.tensors import Layout

Start = Any


def _body(arrays: list[np.ndarray[Any, Any]]) -> MemoryBody:
    layout = Layout.of(arrays)
    return MemoryBody(layout, blocks(layout), b"".join(array.tobytes() for array in arrays))


def _mean(updates: list[list[np.ndarray[Any, Any]]], weights: list[float]) -> np.ndarray[Any, Any]:
    layout = Layout.of(updates[0])
    mean = WeightedMean(blocks(layout))
    for arrays, weight in zip(updates, weights, strict=True):
        mean.fold(_body(arrays), weight)
    return np.concatenate([values.copy() for _, values in mean.result()])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda count: st.tuples(
            st.lists(st.integers(1, 5000), min_size=count, max_size=count), st.integers(0, 1 << 30)
        )
    )
)
def test_the_streamed_mean_agrees_with_numpys_average(case: tuple[list[int], int]) -> None:
    weights, seed = case
    rng = np.random.default_rng(seed)
    updates = [[rng.standard_normal(50, np.float32)] for _ in weights]
    expected = np.average(np.stack([u[0] for u in updates]).astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(_mean(updates, [float(w) for w in weights]), expected, rtol=1e-6, atol=1e-7)


def test_float16_parameters_are_summed_in_float64() -> None:
    updates = [[np.ones(4, np.float16)]] * 3
    np.testing.assert_array_equal(_mean(updates, [40_000.0] * 3), np.ones(4))


def test_integer_buffers_keep_their_type_and_are_rounded() -> None:
    layout = Layout.of([np.array([1, 2, 3])])
    mean = WeightedMean(blocks(layout))
    mean.fold(_body([np.array([1, 2, 3])]), 1.0)
    mean.fold(_body([np.array([2, 4, 6])]), 1.0)
    ((_, values),) = list(mean.result())
    assert values.dtype == np.int64
    np.testing.assert_array_equal(values, [2, 3, 4])


@given(
    st.lists(st.sampled_from(["f4", "f8", "i8", "f2", "b1"]), min_size=1, max_size=6), st.integers(0, 400_000)
)
def test_blocks_cover_a_body_exactly_once(dtypes: list[str], count: int) -> None:
    layout = Layout.of([np.zeros(count + number, dtype) for number, dtype in enumerate(dtypes)])
    position = parameters = 0
    for block in blocks(layout):
        assert (block.offset, block.start) == (position, parameters)
        assert block.nbytes == block.count * block.dtype.itemsize <= 1 << 20
        position, parameters = block.end, parameters + block.count
    assert (position, parameters) == (layout.nbytes, layout.num_parameters)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_numbers_that_no_sum_can_take_are_not_usable(dtype: str) -> None:
    assert all_usable(np.zeros(0, dtype))
    assert all_usable(np.full(1000, min(1e290, float(np.finfo(dtype).max)), dtype))
    for bad in ([1.0, -np.inf, np.inf], [0.0, np.nan], [np.inf]):
        assert not all_usable(np.array(bad, dtype))


def test_finite_numbers_that_could_overflow_the_weighted_sum_are_not_usable() -> None:
    assert not all_usable(np.array([1.0, 1e300]))
    assert not all_usable(np.array([1.0, -1e300]))


def test_a_bool_is_zero_or_one() -> None:
    assert all_usable(np.array([True, False]))
    assert not all_usable(np.frombuffer(b"\x01\x07", np.bool_))


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", "i8", "u8"])
def test_integers_stay_within_their_type(dtype: str) -> None:
    limits = np.iinfo(dtype)
    values = as_dtype(np.array([float(limits.min), float(limits.max), -1e30, 1e30]), np.dtype(dtype))
    assert values.dtype == np.dtype(dtype)
    assert values[0] == values[2] == limits.min
    assert values[1] == values[3]
    assert 0 <= int(limits.max) - int(values[1]) <= 2**11
    halves = as_dtype(np.array([1.5, 2.5], np.float32), np.dtype(dtype))
    np.testing.assert_array_equal(halves, [2, 2])


def test_metrics_near_the_largest_float_have_a_finite_mean() -> None:
    assert weighted_metrics([(2.0**40, {"x": 1e308}), (2.0**40, {"x": 1e308})]) == {"x": 1e308}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("FedAvgM", {"server_momentum": 0.9, "server_learning_rate": 0.5}),
        ("FedAdam", {"eta": 0.01}),
        ("FedYogi", {"eta": 0.01}),
        ("FedAdagrad", {"eta": 0.01}),
        ("FedMedian", {}),
        ("FedTrimmedAvg", {"beta": 0.25}),
        ("Krum", {"num_malicious_nodes": 1}),
        ("MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 2}),
        ("QFedAvg", {"client_learning_rate": 0.1, "q": 0.2}),
    ],
)
def test_a_strategy_over_the_transport_equals_flowers_own_loop(
    start: Start, name: str, parameters: dict[str, Any]
) -> None:
    rng = np.random.default_rng(5)
    initial = [rng.standard_normal((4, 3)), rng.standard_normal(3)]
    steps = {name: [rng.standard_normal(a.shape) * 0.1 for a in initial] for name in "abcdef"}
    weights = {name: 10 + 3 * number for number, name in enumerate("abcdef")}
    federation = start(learners=6, rounds=3, arrays=initial, strategy=name, strategy_parameters=parameters)
    for learner in "abcdef":

        def fit(values: list[Any], _: int, learner: str = learner) -> tuple[list[Any], int]:
            return [v + s for v, s in zip(values, steps[learner], strict=True)], weights[learner]

        federation.learner(
            learner,
            fit=fit,
            change=lambda header: {**header, "metrics": {"train_loss": 0.5}},
            evaluate=lambda values, r: (1.0 / r, 0.5, 5),
        )
    federation.result()
    expected = _flowers_own_loop(name, parameters, initial, steps, weights)
    for ours, theirs in zip(federation.model(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def _flowers_own_loop(
    name: str,
    parameters: dict[str, Any],
    initial: list[np.ndarray[Any, Any]],
    steps: dict[str, list[np.ndarray[Any, Any]]],
    weights: dict[str, int],
) -> list[np.ndarray[Any, Any]]:
    """The oracle: `Strategy.start` over a grid that computes the replies on the spot."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    claim_process()

    def carry(messages: Any, timeout: float | None) -> list[Any]:
        replies = []
        for message in messages:
            learner = "abcdef"[message.metadata.dst_node_id - 1]
            metrics: dict[str, Any] = {"num-examples": weights[learner], "train_loss": 0.5}
            records: dict[str, Any] = {"metrics": MetricRecord(metrics)}
            if message.metadata.message_type == "train":
                values = next(iter(message.content.array_records.values())).to_numpy_ndarrays()
                new = [v + s for v, s in zip(values, steps[learner], strict=True)]
                records["arrays"] = ArrayRecord(new)
            replies.append(Message(RecordDict(records), reply_to=message))
        return replies

    grid = ExchangeGrid(carry)
    grid.freeze(range(1, 7))
    strategy = getattr(flower_strategies, name)(
        min_train_nodes=6, min_evaluate_nodes=6, min_available_nodes=6, **parameters
    )
    result = strategy.start(grid, ArrayRecord(initial), num_rounds=3)
    return list(result.arrays.to_numpy_ndarrays())


def test_fedprox_sends_its_proximal_term_to_the_learners(start: Start) -> None:
    strategy = FlowerStrategy("FedProx", {"proximal_mu": 0.3})
    claim_process()
    configured = strategy.configure("train", 1, 0, [1, 2], dict)
    assert configured == {
        1: {"proximal-mu": 0.3, "server-round": 1},
        2: {"proximal-mu": 0.3, "server-round": 1},
    }


@pytest.mark.parametrize("name", flower_strategy_names())
def test_every_strategy_that_can_be_named_exists_in_flower(name: str) -> None:
    assert hasattr(flower_strategies, name)


def test_every_strategy_of_flower_is_known_to_us() -> None:
    concrete = {
        name
        for name in flower_strategies.__all__
        if inspect.isclass(getattr(flower_strategies, name)) and name not in ("Strategy", "Result")
    }
    assert concrete == set(flower_strategy_names()) | set(_NOT_YET)


def test_flowers_private_task_identity_is_where_we_think_it_is() -> None:
    from flwr.app import Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    claim_process(run_id=42)
    assert (TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id) == (42, 1, 1)
    assert Message(RecordDict(), 7, "train").metadata.run_id == 42
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("FedAvrg", {}, "strategy 'FedAvrg' is unknown - did you mean FedAvg?"),
        (
            "FedXgbBagging",
            {},
            "strategy FedXgbBagging cannot be used in this version: its model grows every round - choose",
        ),
        (
            "FedAvg",
            {"fraction_train": 0.5},
            "strategy parameter fraction_train is set by training.fraction_fit - use that field",
        ),
        (
            "FedAdam",
            {"eta": float("nan")},
            "strategy parameter eta must be a finite number (is nan)",
        ),
    ],
)
def test_a_strategy_that_cannot_be_is_refused_by_name(
    name: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError) as error:
        check_strategy(name, parameters)
    assert str(error.value).startswith(message)


def test_unknown_parameters_are_refused_when_the_strategy_is_built() -> None:
    with pytest.raises(InvalidInputError, match=r"strategy FedAdam does not accept its parameters: .*etta"):
        FlowerStrategy("FedAdam", {"etta": 1.0})


def test_metrics_that_only_some_learners_report_are_weighted_among_them() -> None:
    assert weighted_metrics([(1.0, {"x": 1.0}), (3.0, {"x": 2.0, "y": 5.0})]) == {"x": 1.75, "y": 5.0}


def test_an_update_keeps_what_it_was_given() -> None:
    update = Update("a", 3, {"m": 1.0}, _body([np.ones(2, np.float32)]))
    assert update.num_examples == 3
