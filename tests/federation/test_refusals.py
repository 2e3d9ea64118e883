"""Updates that must not count: each is refused by name and reason, and never reaches the model."""

import math
from typing import Any

import numpy as np
import pytest

Start = Any
Header = dict[str, Any]

SHAPE = (3, 2)


def _with(**changes: Any) -> Any:
    return lambda header: {**header, **changes}


@pytest.mark.parametrize(
    ("fit", "change", "reason"),
    [
        (lambda p, _: ([np.full(SHAPE, np.nan, np.float32)], 5), None, "it contains NaN or infinite values"),
        (lambda p, _: ([np.full(SHAPE, np.inf, np.float32)], 5), None, "it contains NaN or infinite values"),
        (
            lambda p, _: ([np.zeros((2, 3), np.float32)], 5),
            None,
            "after training it has array 0 has shape (2, 3) instead of (3, 2)",
        ),
        (
            lambda p, _: ([np.zeros(SHAPE)], 5),
            None,
            "after training it has array 0 has dtype F64 instead of F32",
        ),
        (
            lambda p, _: ([np.zeros(SHAPE, np.float32)] * 2, 5),
            None,
            "after training it has 2 arrays instead of 1",
        ),
        (lambda p, _: (p, 0), None, "it claims 0 training examples (1 to 1000 are possible)"),
        (lambda p, _: (p, -3), None, "it claims -3 training examples (1 to 1000 are possible)"),
        (lambda p, _: (p, 10**9), None, "it claims 1000000000 training examples (1 to 1000 are possible)"),
        (None, _with(num_examples=1.5), "it claims 1.5 training examples (1 to 1000 are possible)"),
        (None, _with(num_examples=True), "it claims True training examples (1 to 1000 are possible)"),
        (None, _with(digest="0" * 32), "its parameters are not those that were asked for"),
        (
            None,
            _with(digest="0" * 32, layout={"0": {"dtype": "F32"}}),
            "its description of the parameters is",
        ),
    ],
)
def test_a_bad_update_is_refused_with_its_reason(start: Start, fit: Any, change: Any, reason: str) -> None:
    federation = start(
        learners=2,
        rounds=1,
        max_examples=1000,
        min_available_learners=1,
        min_fit_learners=1,
        min_evaluate_learners=1,
    )
    federation.learner("a")
    bad = federation.learner("b", fit=fit, change=change)
    federation.result()
    (refused,) = federation.reports("update.refused")
    assert refused["learner"] == "b"
    assert refused["reason"].startswith(reason)
    assert bad.refusals == [refused["reason"]]
    np.testing.assert_array_equal(federation.model()[0], np.ones(SHAPE, np.float32))
    assert federation.reports("round.finished")[0]["participants"] == 1


def test_nan_in_the_last_block_of_a_large_update_is_found_before_it_counts(start: Start) -> None:
    shape = (1 << 20,)

    def poisoned(parameters: list[Any], _: int) -> tuple[list[Any], int]:
        array = parameters[0] + 7
        array[-1] = math.nan
        return [array], 5

    federation = start(
        learners=2,
        rounds=1,
        arrays=[np.zeros(shape, np.float32)],
        min_available_learners=1,
        min_fit_learners=1,
        min_evaluate_learners=1,
    )
    federation.learner("a", fit=poisoned)
    federation.learner("b")
    federation.result()
    assert [data["learner"] for data in federation.reports("update.refused")] == ["a"]
    np.testing.assert_array_equal(federation.model()[0], np.ones(shape, np.float32))


def test_an_answer_to_another_round_is_refused(start: Start) -> None:
    federation = start(learners=1, rounds=1, round_deadline_s=1.0)
    federation.learner("a", change=_with(task="train-7"))
    assert "0 of 1 learners returned a usable one" in federation.failure()
    (refused,) = federation.reports("update.refused")
    assert refused["reason"] == "it answers train-7, not train-1: too late, or from another round"


def test_non_finite_metrics_of_user_code_are_dropped(start: Start) -> None:
    federation = start(learners=1, rounds=1)
    federation.learner("a", change=_with(metrics={"good": 2.0, "bad": "x", "worse": [1]}))
    federation.result()
    assert federation.reports("round.finished")[0]["train_metrics"] == {"good": 2.0}


@pytest.mark.parametrize("garbage", [{"t": "nonsense"}, {"no": "type"}, {"t": "body", "task": "x"}])
def test_garbage_ends_only_the_sender(start: Start, garbage: Header) -> None:
    federation = start(
        learners=2,
        rounds=1,
        min_available_learners=1,
        min_fit_learners=1,
        min_evaluate_learners=1,
        round_deadline_s=1.0,
    )
    federation.learner("a")
    federation.learner("b", change=lambda header: garbage)
    federation.result()
    np.testing.assert_array_equal(federation.model()[0], np.ones(SHAPE, np.float32))
