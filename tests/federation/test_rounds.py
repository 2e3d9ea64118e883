"""The round loop against learners that behave, fail, leave, come back, come late, or never come."""

import threading
import time
from typing import Any

import numpy as np
import pytest

Start = Any


def test_the_global_model_is_the_mean_weighted_by_examples(start: Start) -> None:
    federation = start(learners=2, rounds=1)
    federation.learner("a", fit=lambda parameters, _: ([p + 1 for p in parameters], 10))
    federation.learner("b", fit=lambda parameters, _: ([p + 4 for p in parameters], 30))
    federation.result()
    np.testing.assert_array_equal(federation.model()[0], np.full((3, 2), 3.25, np.float32))


def test_every_round_starts_from_the_model_of_the_round_before(start: Start) -> None:
    federation = start(learners=2, rounds=4)
    for name in "ab":
        federation.learner(name, evaluate=lambda parameters, r: (1.0 / r, 0.1 * r, 5))
    outcome = federation.result()
    assert (outcome.rounds, outcome.best_round) == (4, 4)
    np.testing.assert_array_equal(federation.model()[0], np.full((3, 2), 4.0, np.float32))
    assert [round(data["metrics"]["loss"], 3) for data in federation.reports("round.finished")] == [
        1.0,
        0.5,
        0.333,
        0.25,
    ]


def test_the_best_round_is_kept_by_the_rule_of_the_spec(start: Start) -> None:
    losses = {1: 0.9, 2: 0.2, 3: 0.7}
    federation = start(learners=1, rounds=3)
    federation.learner("a", evaluate=lambda parameters, r: (losses[r], 0.5, 5))
    outcome = federation.result()
    assert (outcome.best_round, outcome.metrics["loss"]) == (2, 0.2)
    np.testing.assert_array_equal(federation.model()[0], np.full((3, 2), 2.0, np.float32))


def test_metrics_are_weighted_by_the_evaluated_examples(start: Start) -> None:
    federation = start(learners=2, rounds=1)
    federation.learner("a", evaluate=lambda parameters, _: (1.0, 0.0, 1))
    federation.learner("b", evaluate=lambda parameters, _: (2.0, 1.0, 3))
    outcome = federation.result()
    assert dict(outcome.metrics) == {"loss": 1.75, "accuracy": 0.75}


def test_single_learners_metrics_are_not_shown_unless_the_spec_asks(start: Start) -> None:
    for asked in (False, True):
        federation = start(learners=1, rounds=1, learner_metrics=asked)
        federation.learner("a")
        federation.result()
        (data,) = federation.reports("round.finished")
        assert ("learners" in data) is asked


def test_large_models_travel_in_blocks_both_ways(start: Start) -> None:
    rng = np.random.default_rng(1)
    arrays: list[Any] = [rng.standard_normal((700, 1000), np.float32), np.arange(5), rng.standard_normal(3)]
    federation = start(learners=3, rounds=2, arrays=arrays, fraction_evaluate=0.0)
    for name in "abc":
        federation.learner(name)
    federation.result()
    model = federation.model()
    np.testing.assert_allclose(model[0], arrays[0] + 2, rtol=1e-6)
    np.testing.assert_array_equal(model[1], np.arange(5) + 2)
    assert [array.dtype for array in model] == [np.float32, np.int64, np.float64]


def test_a_learner_whose_code_fails_is_left_out_and_the_round_goes_on(start: Start) -> None:
    federation = start(
        learners=3, rounds=2, min_available_learners=2, min_fit_learners=2, min_evaluate_learners=2
    )
    for name in "ab":
        federation.learner(name)
    broken = federation.learner(
        "c", change=lambda header: {"t": "failed", "where": "fit_model", "message": "boom"}
    )
    federation.result()
    assert broken.stopped.wait(5)
    (left,) = [data for data in federation.reports("learner.left") if data["final"]]
    assert (left["learner"], left["reason"], left["where"]) == ("c", "boom", "fit_model")
    assert [data["participants"] for data in federation.reports("round.finished")] == [2, 2]


def test_a_training_below_its_quorum_fails_and_says_why(start: Start) -> None:
    federation = start(learners=2, rounds=2)
    federation.learner("a")
    federation.learner("b", change=lambda header: {"t": "failed", "where": "fit_model", "message": "boom"})
    # It fails as soon as the quorum is out of reach, whether a's update is here by then or not.
    assert federation.failure() in {
        f"round 1 of project p-test needs 2 updates, {count} of 2 learners returned a usable one; b: boom"
        for count in (0, 1)
    }
    assert federation.reports("round.finished") == []


def test_a_training_without_enough_learners_fails_at_its_deadline(start: Start) -> None:
    federation = start(learners=2, rounds=1, start_deadline_s=0.5)
    federation.learner("a")
    assert federation.failure() == (
        "round 1 of project p-test needs 2 learners, 1 is connected after 0.5 s - lower "
        "training.min_available_learners, or see 'flops logs p-test'"
    )
    waiting = federation.reports("training.waiting")[-1]
    assert (waiting["connected"], waiting["needed"]) == (1, 2)


def test_a_training_starts_with_enough_learners_when_the_rest_never_comes(start: Start) -> None:
    federation = start(
        learners=3,
        rounds=1,
        start_deadline_s=0.5,
        min_available_learners=2,
        min_fit_learners=2,
        min_evaluate_learners=2,
    )
    for name in "ab":
        federation.learner(name)
    federation.result()
    assert federation.reports("round.finished")[0]["cohort"] == 2


def test_a_straggler_is_left_out_at_the_deadline_and_its_late_update_is_refused(start: Start) -> None:
    release = threading.Event()

    def slow(parameters: list[Any], round_number: int) -> tuple[list[Any], int]:
        if round_number == 1:
            release.wait(20)
        return [p + 100 for p in parameters], 10

    federation = start(
        learners=2,
        rounds=2,
        round_deadline_s=1.0,
        min_available_learners=1,
        min_fit_learners=1,
        min_evaluate_learners=1,
    )
    seen: list[int] = []

    def evaluate(parameters: list[Any], round_number: int) -> tuple[float, float, int]:
        seen.append(round_number)
        if round_number == 1:
            release.set()
        return 1.0, 0.5, 10

    federation.learner("a", evaluate=evaluate)
    straggler = federation.learner("b", fit=slow)
    federation.result()
    first = federation.reports("round.finished")[0]
    assert first["left_out"] == {"b": "it did not answer within 1 s"}
    assert first["participants"] == 1
    assert straggler.refusals
    assert straggler.refusals[0].startswith("it answers train-1, not ")


def test_a_learner_that_comes_back_within_its_grace_finishes_the_round(start: Start) -> None:
    federation = start(learners=2, rounds=2)
    federation.learner("a")

    def cut(header: dict[str, Any]) -> dict[str, Any]:
        raise StopIteration

    lost = federation.learner("b", change=cut)
    assert lost.stopped.wait(10)
    federation.wait_for("learner.left")
    federation.learner("b")
    federation.result()
    assert [data["participants"] for data in federation.reports("round.finished")] == [2, 2]
    np.testing.assert_array_equal(federation.model()[0], np.full((3, 2), 1.0, np.float32))


def test_unusable_evaluations_fail_the_training_instead_of_finishing_it(start: Start) -> None:
    federation = start(learners=1, rounds=1)
    federation.learner("a", evaluate=lambda parameters, _: (float("nan"), 0.5, 5))
    assert federation.failure() == (
        "round 1 of project p-test needs 1 evaluation, 0 of 1 learners returned a usable one; "
        "a: its loss is nan"
    )


def test_fractions_and_seeds_choose_the_same_cohort_again(start: Start) -> None:
    cohorts = []
    for _ in range(2):
        federation = start(
            learners=6,
            rounds=3,
            fraction_fit=0.5,
            fraction_evaluate=0.0,
            min_fit_learners=3,
            min_evaluate_learners=1,
            seed=7,
        )
        for name in "abcdef":
            federation.learner(name)
        federation.result()
        cohorts.append([sorted(data["fit_s"]) for data in federation.reports("round.finished")])
    assert cohorts[0] == cohorts[1]
    assert all(len(cohort) == 3 for cohort in cohorts[0])
    assert len({tuple(cohort) for cohort in cohorts[0]}) > 1


def test_the_model_does_not_depend_on_the_order_of_arrival(start: Start) -> None:
    rng = np.random.default_rng(3)
    updates = {name: rng.standard_normal((40, 5000)).astype(np.float32) * 10 for name in "abcde"}
    models = []
    for delays in ({"a": 0.0, "e": 0.2}, {"a": 0.3, "c": 0.1}):
        federation = start(learners=5, rounds=1, arrays=[np.zeros((40, 5000), np.float32)])
        for number, name in enumerate("abcde"):

            def fit(
                parameters: list[Any],
                _: int,
                name: str = name,
                number: int = number,
                delay: float = delays.get(name, 0.0),
            ) -> tuple[list[Any], int]:
                time.sleep(delay)
                return [updates[name]], 17 + number

            federation.learner(name, fit=fit)
        federation.result()
        models.append(federation.model()[0].tobytes())
    assert models[0] == models[1]


def test_an_aggregator_goes_on_after_its_last_committed_round(start: Start) -> None:
    first = start(learners=2, rounds=2, strategy="FedAvgM", strategy_parameters={"server_momentum": 0.9})
    for name in "ab":
        first.learner(name)
    first.result()
    # The same folder with two more rounds is what a restart after a crash in round 3 looks like.
    second = start(
        learners=2,
        rounds=4,
        strategy="FedAvgM",
        strategy_parameters={"server_momentum": 0.9},
        state=first.state,
    )
    for name in "ab":
        second.learner(name)
    second.result()
    whole = start(learners=2, rounds=4, strategy="FedAvgM", strategy_parameters={"server_momentum": 0.9})
    for name in "ab":
        whole.learner(name, evaluate=lambda parameters, r: (1.0 / r, 0.5, 10))
    whole.result()
    assert [data["round"] for data in second.reports("round.finished")] == [1, 2, 3, 4]
    resumed = (second.state / "global-4.safetensors").read_bytes()
    assert resumed == (whole.state / "global-4.safetensors").read_bytes()


@pytest.mark.parametrize("token", ["", "wrong", "token-of-b"])
def test_a_caller_without_this_learners_token_is_turned_away(start: Start, token: str) -> None:
    federation = start(learners=2, rounds=1, start_deadline_s=2.0)
    learner_class = type(federation.learner("b"))
    impostor = learner_class(federation.location, "a", token)
    impostor.join()
    assert impostor.error is not None
    assert "a" not in federation.hub.ready()
    federation.failure()
