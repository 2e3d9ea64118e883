"""Asynchronous trainings against real learners that are slow, stale, hostile, gone, or killed."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flops.federation import asynchronous, roster

Start = Any
Header = dict[str, Any]
STRATEGIES = ("FedAsync", "FedBuff", "FedAT")
ONE = {"min_available_learners": 1, "min_fit_learners": 1, "min_evaluate_learners": 1}


def _plus(value: float, seconds: float = 0.0) -> Any:
    def fit(parameters: list[Any], _: int) -> tuple[list[Any], int]:
        time.sleep(seconds)
        return [p + value for p in parameters], 10

    return fit


def _discount(staleness: int) -> float:
    return float((staleness + 1) ** -0.5)


class Steps:
    """Learners that answer when a test says so: ``go`` lets a learner's next fit return."""

    def __init__(self, federation: Any) -> None:
        self.federation = federation
        self.gates: dict[str, threading.Semaphore] = {}
        self.given: dict[str, list[float]] = {}
        self.began = threading.Condition()

    def learner(self, name: str, value: float, **behaviour: Any) -> Any:
        gate = self.gates[name] = threading.Semaphore(0)
        self.given[name] = []

        def fit(parameters: list[Any], _: int) -> tuple[list[Any], int]:
            with self.began:
                self.given[name].append(float(parameters[0].flat[0]))
                self.began.notify_all()
            assert gate.acquire(timeout=20)
            return [np.full_like(p, value) for p in parameters], 10

        return self.federation.learner(name, fit=fit, **behaviour)

    def wait_for(self, name: str, times: int) -> None:
        """Until this learner has been given a model so many times."""
        with self.began:
            assert self.began.wait_for(lambda: len(self.given[name]) >= times, 20), self.given

    def go(self, name: str) -> None:
        """Let it answer, and wait until it was given its next model."""
        times = len(self.given[name])
        self.gates[name].release()
        self.wait_for(name, times + 1)

    def end(self) -> None:
        for gate in self.gates.values():
            gate.release(100)


# -- arithmetic, end to end


def test_fedasync_mixes_as_in_its_paper_and_records_where_updates_came_from(start: Start) -> None:
    federation = start(
        learners=2,
        rounds=2,
        fraction_evaluate=0.0,
        strategy="FedAsync",
        strategy_parameters={"alpha": 0.5, "updates_per_round": 2},
    )
    steps = Steps(federation)
    steps.learner("a", 8.0)
    steps.learner("b", -4.0)
    steps.wait_for("a", 1)
    steps.wait_for("b", 1)
    steps.go("a")
    steps.go("a")
    steps.go("b")
    steps.gates["a"].release()
    federation.result()
    steps.end()
    x = [0.0]
    for value, staleness in ((8.0, 0), (8.0, 0), (-4.0, 2), (8.0, 1)):
        weight = 0.5 * _discount(staleness)
        x.append((1 - weight) * x[-1] + weight * value)
    np.testing.assert_allclose(federation.model()[0], np.full((3, 2), x[-1], np.float32), rtol=1e-6)
    np.testing.assert_allclose(steps.given["a"][:3], x[:3], rtol=1e-6)
    np.testing.assert_allclose(steps.given["b"][:2], [x[0], x[3]], rtol=1e-6)
    first, second = federation.reports("round.finished")
    assert (first["version"], second["version"]) == (2, 4)
    assert first["staleness"] == {"mean": 0.0, "max": 0}
    assert second["staleness"] == {"mean": 1.5, "max": 2}
    assert [(u["learner"], u["version"], u["staleness"]) for u in second["updates"]] == [
        ("b", 0, 2),
        ("a", 2, 1),
    ]
    assert second["updates"][0]["discount"] == pytest.approx(3**-0.5, abs=1e-6)


def test_fedbuff_adds_differences_to_the_version_that_each_learner_got(start: Start) -> None:
    federation = start(
        learners=3,
        rounds=2,
        fraction_evaluate=0.0,
        strategy="FedBuff",
        strategy_parameters={"buffer_size": 2},
    )
    steps = Steps(federation)
    for name, value in (("a", 8.0), ("b", 4.0), ("c", -6.0)):
        steps.learner(name, value)
    for name in "abc":
        steps.wait_for(name, 1)
    steps.go("a")
    steps.go("b")  # the buffer is full: (8 + 4) / 2
    assert steps.given["b"] == [0.0, 6.0]
    assert steps.given["a"] == [0.0, 0.0]
    steps.go("a")  # a's second update, made from version 0
    steps.gates["c"].release()
    federation.result()
    steps.end()
    expected = 6.0 + (8.0 * _discount(1) + -6.0 * _discount(1)) / 2
    np.testing.assert_allclose(federation.model()[0], np.full((3, 2), expected, np.float32), rtol=1e-6)
    assert [data["version"] for data in federation.reports("round.finished")] == [1, 2]
    assert [data["staleness"]["max"] for data in federation.reports("round.finished")] == [0, 1]


def test_fedat_lets_quick_learners_go_on_and_gives_the_slow_ones_more_weight(start: Start) -> None:
    federation = start(
        learners=3, rounds=5, fraction_evaluate=0.0, strategy="FedAT", strategy_parameters={"tiers": 2}
    )
    steps = Steps(federation)
    for name, value in (("a", 2.0), ("b", 4.0), ("c", 100.0)):
        steps.learner(name, value)
    for name in "abc":
        steps.wait_for(name, 1)
    steps.gates["a"].release()
    steps.go("b")  # the quick tier closes without c
    for turn in range(2, 5):
        steps.wait_for("a", turn)
        steps.wait_for("b", turn)
        steps.gates["a"].release()
        if turn < 4:
            steps.go("b")
        else:
            steps.gates["b"].release()
    federation.wait_for("round.finished", 4)
    steps.gates["c"].release()
    federation.result()
    steps.end()
    done = federation.reports("round.finished")
    assert [sorted({update["learner"] for update in data["updates"]}) for data in done] == [
        ["a", "b"]
    ] * 4 + [["c"]]
    expected = (3.0 * 1 * 20 + 100.0 * 4 * 10) / (1 * 20 + 4 * 10)
    np.testing.assert_allclose(federation.model()[0], np.full((3, 2), expected, np.float32), rtol=1e-6)


# -- nobody is waited for


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_straggler_never_blocks_and_its_updates_count_discounted(start: Start, strategy: str) -> None:
    federation = start(learners=4, rounds=12, strategy=strategy, **ONE)
    for name in "abc":
        federation.learner(name, fit=_plus(1.0, 0.02))
    federation.learner("d", fit=_plus(1.0, 0.8))
    begin = time.monotonic()
    federation.result()
    assert time.monotonic() - begin < 6.0  # twelve rounds of the slow one would take ten seconds
    done = federation.reports("round.finished")
    assert [data["round"] for data in done] == list(range(1, 13))
    slow = [update for data in done for update in data["updates"] if update["learner"] == "d"]
    assert len(slow) <= 6
    if strategy != "FedAT":
        assert all(update["discount"] < 1.0 for update in slow if update["staleness"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_learner_that_hangs_is_marked_and_not_waited_for(start: Start, strategy: str) -> None:
    federation = start(learners=3, rounds=6, round_deadline_s=0.5, strategy=strategy, **ONE)
    for name in "ab":
        federation.learner(name, fit=_plus(1.0, 0.1))

    def hang(parameters: list[Any], _: int) -> tuple[list[Any], int]:
        federation.thread.join(30)
        return parameters, 1

    federation.learner("c", fit=hang)
    federation.result()
    reasons = [data["left_out"].get("c") for data in federation.reports("round.finished")]
    assert "it did not answer within 0.5 s" in reasons


def test_a_late_answer_counts_and_is_discounted(start: Start) -> None:
    federation = start(
        learners=2,
        rounds=14,
        round_deadline_s=0.3,
        strategy="FedBuff",
        strategy_parameters={"buffer_size": 1},
        fraction_evaluate=0.0,
        **ONE,
    )
    federation.learner("a", fit=_plus(1.0, 0.1))
    federation.learner("b", fit=_plus(100.0, 0.9))
    federation.result()
    done = federation.reports("round.finished")
    late = [update for data in done for update in data["updates"] if update["learner"] == "b"]
    assert late
    assert late[0]["staleness"] >= 3
    assert "it did not answer within 0.3 s" in {data["left_out"].get("b") for data in done}
    assert federation.reports("update.refused") == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_updates_that_are_too_stale_are_dropped_but_held_against_nobody(start: Start, strategy: str) -> None:
    federation = start(
        learners=2,
        rounds=5,
        strategy=strategy,
        strategy_parameters={"max_staleness": 2},
        fraction_evaluate=0.0,
        eject_after=1,
        **ONE,
    )
    steps = Steps(federation)
    stale = steps.learner("b", 1000.0)
    steps.wait_for("b", 1)
    answered = threading.Event()

    def wait_after_three_rounds(parameters: list[Any], _: int) -> tuple[list[Any], int]:
        if len(federation.reports("round.finished")) >= 3:
            assert answered.wait(20)
        return [p + 1.0 for p in parameters], 10

    federation.learner("a", fit=wait_after_three_rounds)
    federation.wait_for("round.finished", 3)
    steps.go("b")
    answered.set()
    federation.result()
    steps.end()
    assert federation.reports("learner.ejected") == []
    assert stale.refusals[0].startswith("it was made from version 0 of the model, ")
    assert stale.refusals[0].endswith(" versions ago (max_staleness is 2)")
    assert federation.model()[0].max() < 1000.0
    refused = (
        federation.reports("round.finished")[3]["left_out"]
        | federation.reports("round.finished")[4]["left_out"]
    )
    assert refused["b"] == stale.refusals[0]


def test_as_many_learners_work_at_once_as_the_spec_says(start: Start) -> None:
    federation = start(
        learners=6,
        rounds=8,
        strategy="FedBuff",
        fraction_fit=0.5,
        cohort="round-robin",
        fraction_evaluate=0.0,
        **ONE,
    )
    at_work, most, lock = set[str](), [0], threading.Lock()

    def fit(name: str) -> Any:
        def work(parameters: list[Any], _: int) -> tuple[list[Any], int]:
            with lock:
                at_work.add(name)
                most[0] = max(most[0], len(at_work))
            time.sleep(0.05)
            with lock:
                at_work.discard(name)
            return [p + 1 for p in parameters], 10

        return work

    for name in "abcdef":
        federation.learner(name, fit=fit(name))
    federation.result()
    assert most[0] == 3
    done = federation.reports("round.finished")
    assert {update["learner"] for data in done for update in data["updates"]} == set("abcdef")


# -- what must not count


def test_wrong_versions_are_refused_counted_and_lead_to_ejection(start: Start) -> None:
    federation = start(learners=2, rounds=6, strategy="FedBuff", eject_after=3, **ONE)
    federation.learner("a", fit=_plus(1.0, 0.1))
    hostile = federation.learner(
        "b", fit=_plus(1000.0), change=lambda header: {**header, "version": header["version"] + 1}
    )
    federation.result()
    refused = federation.reports("update.refused")
    assert len(refused) == 3
    assert refused[0]["reason"].startswith("it was made from version 1 of the model, not from 0")
    (ejected,) = federation.reports("learner.ejected")
    assert (ejected["learner"], ejected["refusals"]) == ("b", 3)
    assert hostile.stopped.wait(5)
    assert federation.model()[0].max() < 100.0


@pytest.mark.parametrize("version", [None, "0", True, -1, 1 << 70])
def test_unknown_versions_are_refused(start: Start, version: Any) -> None:
    federation = start(learners=2, rounds=3, strategy="FedAsync", eject_after=1, **ONE)
    federation.learner("a", fit=_plus(1.0, 0.1))
    federation.learner("b", change=lambda header: {**header, "version": version})
    federation.result()
    assert [data["learner"] for data in federation.reports("learner.ejected")] == ["b"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("fit", "change", "reason"),
    [
        (lambda p, _: ([np.full((3, 2), np.nan, np.float32)], 5), None, "it contains NaN or infinite values"),
        (lambda p, _: ([np.zeros((2, 3), np.float32)], 5), None, "after training it has array 0 has shape"),
        (lambda p, _: (p, 10**9), None, "it claims 1000000000 training examples (1 to 1000 are possible)"),
        (None, lambda header: {**header, "task": "train-7"}, "it answers train-7, which it was not asked"),
        (None, lambda header: {**header, "t": "evaluated"}, "is of another kind"),
        (None, lambda header: {"t": "declined", "task": header["task"]}, "it declines to work"),
    ],
)
def test_bad_answers_are_refused_and_their_senders_ejected(
    start: Start, strategy: str, fit: Any, change: Any, reason: str
) -> None:
    federation = start(
        learners=2, rounds=4, strategy=strategy, eject_after=2, max_examples=1000, round_deadline_s=5.0, **ONE
    )
    federation.learner("a", fit=_plus(1.0, 0.1))
    bad = federation.learner("b", fit=fit, change=change)
    federation.result()
    assert reason in bad.refusals[0]
    refused = federation.reports("update.refused")
    assert {data["learner"] for data in refused} == {"b"}
    if "train-7" not in reason:  # that one leaves its task open, and is not asked again
        assert len(refused) == 2
        assert [data["learner"] for data in federation.reports("learner.ejected")] == ["b"]


def test_updates_beyond_the_norm_are_measured_from_the_version_they_were_made_from(start: Start) -> None:
    federation = start(
        learners=2,
        rounds=30,
        strategy="FedBuff",
        strategy_parameters={"buffer_size": 1, "staleness": "constant"},
        max_update_norm=3.0,
        fraction_evaluate=0.0,
        **ONE,
    )
    federation.learner("a", fit=_plus(1.0, 0.02))  # sqrt(6) away
    federation.learner("b", fit=_plus(-1.0, 0.3))  # stale, and no farther away from where it began
    federation.result()
    assert federation.reports("update.refused") == []
    assert any(
        update["learner"] == "b" and update["staleness"] > 3
        for data in federation.reports("round.finished")
        for update in data["updates"]
    )


def test_a_second_answer_to_the_same_task_is_refused(start: Start) -> None:
    """The large model's update still travels when it is announced again, from a new session."""
    arrays = [np.zeros(200_000, np.float32)]
    federation = start(learners=2, rounds=4, arrays=arrays, strategy="FedBuff", eject_after=10, **ONE)
    federation.learner("a", fit=_plus(1.0, 0.1))
    last: list[Header] = []

    def again(header: Header) -> Header:
        if last:
            header, last[0] = {**header, "task": last[0]["task"]}, header
        else:
            last.append(header)
        return header

    repeating = federation.learner("b", change=again)
    federation.wait_for("update.refused")
    federation.result()
    assert "which it was not asked or has answered already" in repeating.refusals[0]


# -- large models, and what is left behind


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_large_models_travel_in_blocks_and_old_versions_go(start: Start, strategy: str) -> None:
    rng = np.random.default_rng(1)
    arrays: list[Any] = [rng.standard_normal((700, 1000), np.float32), np.arange(5), rng.standard_normal(3)]
    federation = start(learners=3, rounds=40, arrays=arrays, strategy=strategy, **ONE)
    for name in "abc":
        federation.learner(name, fit=lambda parameters, _: (parameters, 3))

    def versions() -> int:
        maps = Path("/proc/self/maps").read_text()
        return sum("(deleted)" in line and str(federation.state) in line for line in maps.splitlines())

    federation.wait_for("round.finished", 10)
    early = versions()
    federation.result(60)
    assert early <= 8
    assert versions() <= 8
    for ours, initial in zip(federation.model(), arrays, strict=True):
        np.testing.assert_allclose(ours, initial, rtol=1e-5)
    left = {path.name.split("-")[0] for path in federation.state.iterdir()}
    assert left == {"state.json", "reports.jsonl", "model.safetensors", "global", "best", "strategy"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "arrays",
    [
        [],
        [np.array(2.0), np.array(3, np.int64)],
        [np.array([True, False]), np.ones(3, np.float16), np.zeros((0,), np.int8), np.ones(2, np.uint8)],
    ],
    ids=["no arrays", "scalars", "small types"],
)
def test_models_of_odd_arrays_are_mixed(start: Start, arrays: list[Any], strategy: str) -> None:
    federation = start(learners=2, rounds=3, arrays=arrays, strategy=strategy, **ONE)
    for name in "ab":
        federation.learner(name, fit=lambda parameters, _: (parameters, 3))
    federation.result()
    model = federation.model()
    assert [(array.dtype, array.shape) for array in model] == [(a.dtype, a.shape) for a in arrays]
    for ours, initial in zip(model, arrays, strict=True):
        np.testing.assert_allclose(ours, initial)


# -- evaluation beside training


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_commit_is_evaluated_without_blocking_and_the_best_is_kept(start: Start, strategy: str) -> None:
    losses = {1: 0.9, 2: 0.5, 3: 0.2, 4: 0.6, 5: 0.8}
    federation = start(learners=3, rounds=5, strategy=strategy, **ONE)
    for name in "abc":
        federation.learner(name, fit=_plus(1.0, 0.1), evaluate=lambda p, r: (losses[r], 0.5, 10))
    outcome = federation.result()
    assert (outcome.rounds, outcome.best_round, outcome.metrics["loss"]) == (5, 3, pytest.approx(0.2))
    done = federation.reports("round.finished")
    assert [data["metrics"]["loss"] for data in done] == pytest.approx([losses[n] for n in range(1, 6)])
    assert all(data["evaluated"] >= 1 for data in done)
    assert done[-1]["evaluated"] == 3
    best = (federation.state / "best-3.safetensors").read_bytes()
    assert best == (federation.state / "model.safetensors").read_bytes()


def test_a_learner_evaluates_the_model_that_was_committed(start: Start) -> None:
    seen: dict[int, set[float]] = {}

    def evaluate(parameters: list[Any], round_number: int) -> tuple[float, float, int]:
        seen.setdefault(round_number, set()).add(float(parameters[0][0, 0]))
        return 1.0, 0.5, 10

    federation = start(learners=3, rounds=6, strategy="FedAsync", fraction_evaluate=1.0, **ONE)
    for name in "abc":
        federation.learner(name, fit=_plus(1.0, 0.05), evaluate=evaluate)
    federation.result()
    assert all(len(values) == 1 for values in seen.values())
    assert sorted(seen) == list(range(1, 7))


def test_a_commit_whose_evaluation_nobody_finished_is_reported_without_metrics(start: Start) -> None:
    release = threading.Event()

    def slow(parameters: list[Any], round_number: int) -> tuple[float, float, int]:
        if round_number < 3:
            release.wait(20)
        return 0.5, 0.5, 10

    federation = start(
        learners=2,
        rounds=3,
        strategy="FedBuff",
        strategy_parameters={"buffer_size": 1},
        **{**ONE, "min_available_learners": 2, "min_evaluate_learners": 2},
    )
    federation.learner("a", fit=_plus(1.0, 0.05))
    federation.learner("b", fit=_plus(1.0, 0.05), evaluate=slow)
    federation.wait_for("round.finished", 2)
    release.set()
    outcome = federation.result()
    done = federation.reports("round.finished")
    assert done[0]["metrics"] == {}
    assert (outcome.best_round, done[2]["evaluated"]) == (3, 2)


def test_the_last_commit_is_not_finished_on_fewer_evaluations_than_were_asked_for(start: Start) -> None:
    federation = start(learners=2, rounds=1, strategy="FedBuff")
    federation.learner("a")
    federation.learner("b", evaluate=lambda parameters, _: (float("nan"), 0.5, 5))
    assert federation.failure() == (
        "round 1 of project p-test needs 2 evaluations, 1 of 2 learners returned a usable one; "
        "b: its loss is nan"
    )


def test_the_last_evaluation_needs_only_those_who_evaluate(start: Start) -> None:
    """One learner leaves for good with the last commit: the other one is enough to judge it."""
    federation = start(
        learners=2,
        rounds=1,
        strategy="FedBuff",
        start_deadline_s=3.0,
        **{**ONE, "min_available_learners": 2},
    )

    def leave(parameters: list[Any], _: int) -> tuple[float, float, int]:
        raise StopIteration

    federation.learner("a", evaluate=leave)
    federation.learner("b", fit=_plus(1.0, 0.3))
    outcome = federation.result()
    assert outcome.rounds == 1
    assert federation.reports("round.finished")[0]["evaluated"] == 1


# -- who is there


def test_a_training_without_enough_learners_fails_at_its_deadline(start: Start) -> None:
    federation = start(learners=2, rounds=1, start_deadline_s=0.5, strategy="FedBuff")
    federation.learner("a")
    assert federation.failure() == (
        "round 1 of project p-test needs 2 learners, 1 is connected after 0.5 s - lower "
        "training.min_available_learners, or see 'flops logs p-test'"
    )
    waiting = federation.reports("training.waiting")[-1]
    assert (waiting["connected"], waiting["needed"]) == (1, 2)


def test_a_training_does_not_wait_for_learners_that_it_does_not_need(start: Start) -> None:
    federation = start(learners=3, rounds=3, start_deadline_s=20, strategy="FedAsync", **ONE)
    begin = time.monotonic()
    federation.learner("a")
    federation.result()
    assert time.monotonic() - begin < 5


def test_learners_that_all_hang_fail_the_training_with_the_reason(start: Start) -> None:
    federation = start(learners=2, rounds=2, start_deadline_s=0.5, round_deadline_s=0.5, strategy="FedBuff")

    def hang(parameters: list[Any], _: int) -> tuple[list[Any], int]:
        federation.thread.join(30)
        return parameters, 1

    for name in "ab":
        federation.learner(name, fit=hang)
    assert "needs 2 learners, 0 are connected after 0.5 s" in federation.failure()


def test_a_learner_whose_code_fails_ends_its_part_only(start: Start) -> None:
    federation = start(learners=3, rounds=4, strategy="FedAT", **ONE)
    for name in "ab":
        federation.learner(name, fit=_plus(1.0, 0.05))
    broken = federation.learner(
        "c", change=lambda header: {"t": "failed", "where": "fit_model", "message": "boom"}
    )
    federation.result()
    assert broken.stopped.wait(5)
    (left,) = [data for data in federation.reports("learner.left") if data["final"]]
    assert (left["learner"], left["reason"]) == ("c", "boom")
    assert "boom" in {data["left_out"].get("c") for data in federation.reports("round.finished")}


def test_when_too_few_are_left_the_training_fails_with_the_first_reason(start: Start) -> None:
    federation = start(learners=2, rounds=50, strategy="FedBuff")
    federation.learner("a", fit=_plus(1.0, 0.05))
    federation.learner("b", change=lambda header: {"t": "failed", "message": "boom"})
    assert "b ended: boom" in federation.failure()


def test_a_learner_that_comes_back_answers_the_task_that_it_had(start: Start) -> None:
    federation = start(learners=2, rounds=3, strategy="FedAT", fraction_evaluate=0.0)
    federation.learner("a", fit=_plus(1.0, 0.05))
    tasks: list[str] = []

    def cut(header: Header) -> Header:
        tasks.append(header["task"])
        raise StopIteration

    lost = federation.learner("b", change=cut)
    assert lost.stopped.wait(10)

    def note(header: Header) -> Header:
        tasks.append(header["task"])
        return header

    federation.learner("b", fit=_plus(1.0), change=note)
    federation.result()
    assert tasks[0] == tasks[1]
    assert len(set(tasks)) == len(tasks) - 1
    done = federation.reports("round.finished")
    assert any(update["learner"] == "b" for data in done for update in data["updates"])


def test_a_learner_that_is_gone_for_good_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "RECONNECT_S", 0.5)
    federation = start(learners=2, rounds=12, strategy="FedBuff", **ONE)

    def cut(header: Header) -> Header:
        raise StopIteration

    federation.learner("a", fit=_plus(1.0, 0.1))
    federation.learner("b", change=cut)
    federation.result()
    reasons = [data["left_out"].get("b", "") for data in federation.reports("round.finished")]
    assert any(reason.startswith("it went and did not come back in time") for reason in reasons)


def test_waiting_for_nobody_costs_no_processor_time(start: Start) -> None:
    federation = start(learners=3, rounds=3, strategy="FedBuff", **ONE)
    for name in "ab":
        federation.learner(name, fit=_plus(1.0, 0.7))
    federation.wait_for("round.started")
    begin = time.process_time()
    time.sleep(0.6)
    assert time.process_time() - begin < 0.3
    federation.result()


# -- an aggregator that is killed


class Killed(BaseException):
    """Stands for the end of the process at this very place."""


def _reports(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "reports.jsonl").read_text().splitlines()
    return [line["data"] for line in map(json.loads, lines) if line["kind"] == "round.finished"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("place", ["_open_evaluation", "_commit", "_close_evaluation", "_take_evaluation"])
def test_a_killed_aggregator_goes_on_after_its_last_commit(
    start: Start, monkeypatch: pytest.MonkeyPatch, strategy: str, place: str
) -> None:
    original = getattr(asynchronous.AsynchronousTraining, place)
    calls = [0]

    def dies(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(asynchronous.AsynchronousTraining, place, dies)
    first = start(learners=2, rounds=6, strategy=strategy, **ONE)
    for name in "ab":
        first.learner(name, fit=_plus(1.0, 0.05))
    with pytest.raises(Killed):
        first.result()
    monkeypatch.setattr(asynchronous.AsynchronousTraining, place, original)
    committed = json.loads((first.state / "state.json").read_text())["round"]
    reported = [data["round"] for data in _reports(first.state)]
    assert committed - 1 <= len(reported) <= committed
    second = start(learners=2, rounds=6, strategy=strategy, state=first.state, **ONE)
    for name in "ab":
        second.learner(name, fit=_plus(1.0, 0.05))
    outcome = second.result()
    done = _reports(second.state)
    assert [data["round"] for data in done] == [1, 2, 3, 4, 5, 6]
    versions = [data["version"] for data in done]
    assert versions == sorted(set(versions))
    assert outcome.rounds == 6
    assert all(data["metrics"] for data in done)


def test_a_training_whose_last_evaluation_was_cut_off_has_it_done_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(learners=2, rounds=2, strategy="FedBuff", **ONE)
    for name in "ab":
        first.learner(name)
    first.result()
    reports = first.state / "reports.jsonl"
    lines = reports.read_bytes().splitlines(keepends=True)
    reports.write_bytes(b"".join(line for line in lines if b'"round":2,"rounds":2' not in line))
    state = json.loads((first.state / "state.json").read_text())
    del state["report"]["metrics"]
    (first.state / "state.json").write_text(json.dumps(state))
    second = start(learners=2, rounds=2, strategy="FedBuff", state=first.state, **ONE)
    for name in "ab":
        second.learner(name, evaluate=lambda parameters, _: (0.25, 0.5, 10))
    outcome = second.result()
    assert [data["round"] for data in _reports(second.state)] == [1, 2]
    assert (outcome.best_round, outcome.metrics["loss"]) == (2, 0.25)


# -- everything at once


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_learners_that_do_anything_at_any_time_never_hang_the_training(
    start: Start, monkeypatch: pytest.MonkeyPatch, strategy: str, seed: int
) -> None:
    monkeypatch.setattr(roster, "RECONNECT_S", 0.4)
    size = 40_000 if seed % 2 else 6  # above and below what travels beside a header
    federation = start(
        learners=5,
        rounds=8,
        arrays=[np.zeros(size, np.float32)],
        strategy=strategy,
        strategy_parameters={"max_staleness": 20},
        round_deadline_s=1.0,
        start_deadline_s=5.0,
        fraction_fit=0.8,
        fraction_evaluate=0.6,
        max_update_norm=1e4,
        **ONE,
    )

    def wild(name: str, number: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, number])

        def fit(parameters: list[Any], _: int) -> tuple[list[Any], int]:
            time.sleep(float(rng.choice([0.0, 0.02, 0.1, 0.3, 1.2], p=[0.3, 0.3, 0.2, 0.15, 0.05])))
            step = rng.choice([1.0, 1e9, np.nan], p=[0.9, 0.05, 0.05])
            return [p + np.float32(step) for p in parameters], 10

        def change(header: Header) -> Header:
            deed = rng.choice(["ok", "cut", "version", "task", "fail"], p=[0.8, 0.1, 0.04, 0.04, 0.02])
            if deed == "cut":
                federation.learner(name, **wild(name, number + 100))
                raise StopIteration
            if deed == "fail":
                return {"t": "failed", "message": "boom"}
            wrong: dict[str, Header] = {"version": {"version": 10**6}, "task": {"task": "train-x"}}
            return {**header, **wrong.get(deed, {})}

        def evaluate(parameters: list[Any], _: int) -> tuple[float, float, int]:
            time.sleep(float(rng.choice([0.0, 0.05, 0.5], p=[0.7, 0.25, 0.05])))
            return float(rng.choice([1.0, np.nan], p=[0.95, 0.05])), 0.5, 10

        return {"fit": fit, "change": change, "evaluate": evaluate}

    federation.learner("a", fit=_plus(1.0, 0.1))
    for number, name in enumerate("bcde"):
        federation.learner(name, **wild(name, number))
    outcome = federation.result(45)
    assert outcome.rounds == 8
    assert [data["round"] for data in federation.reports("round.finished")] == list(range(1, 9))
    assert np.isfinite(federation.model()[0]).all()
    assert federation.model()[0].max() < 1e5


def test_learners_that_come_at_about_the_same_time_begin_together(start: Start) -> None:
    """The first one there would else spend all rounds alone."""
    federation = start(
        learners=3, rounds=30, strategy="FedBuff", strategy_parameters={"buffer_size": 3}, **ONE
    )
    for name in "abc":
        federation.learner(name)
        time.sleep(0.3)
    federation.result()
    first: dict[str, int] = {}
    for finished in federation.reports("round.finished"):
        for update in finished["updates"]:
            first.setdefault(update["learner"], update["version"])
    assert first == {"a": 0, "b": 0, "c": 0}
