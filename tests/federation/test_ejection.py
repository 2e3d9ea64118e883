"""Learners that are broken or hostile: refused, counted, shown, and after a threshold ejected."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from flops.federation import wire
from flops.federation.model_file import layout_digest

Start = Callable[..., Any]
ONE = {"min_available_learners": 1, "min_fit_learners": 1, "min_evaluate_learners": 1}


def _pausing(seconds: float) -> Callable[[Any, int], tuple[Any, int]]:
    def fit(parameters: Any, _: int) -> tuple[Any, int]:
        time.sleep(seconds)
        return parameters, 10

    return fit


def _bad(parameters: Any, _: int) -> tuple[Any, int]:
    return [p * np.float32("nan") for p in parameters], 10


def test_a_learner_whose_answers_are_refused_is_ejected_and_stays_out(start: Start) -> None:
    federation = start(learners=2, rounds=6, eject_after=3, **ONE)
    federation.learner("a")
    bad = federation.learner("b", fit=_bad)
    federation.result()
    assert len(federation.reports("update.refused")) == 3
    (ejected,) = federation.reports("learner.ejected")
    assert (ejected["learner"], ejected["refusals"]) == ("b", 3)
    assert "NaN or infinite" in ejected["reason"]
    assert bad.stopped.wait(5)
    cohorts = [data["cohort"] for data in federation.reports("round.finished")]
    assert cohorts == [2, 2, 2, 1, 1, 1]
    again = federation.learner("b")
    assert again.stopped.wait(5)
    assert len(federation.reports("round.finished")) == 6


def test_an_ejected_learner_stays_out_after_a_restart_of_the_aggregator(start: Start) -> None:
    federation = start(learners=2, rounds=3, eject_after=2, **ONE)
    federation.learner("a")
    federation.learner("b", fit=_bad)
    federation.result()
    again = start(learners=2, rounds=5, eject_after=2, state=federation.state, **ONE)
    again.learner("a")
    returned = again.learner("b")
    again.result()
    assert returned.stopped.wait(5)
    assert [data["cohort"] for data in again.reports("round.finished")] == [2, 2, 1, 1, 1]


def test_a_project_that_loses_its_quorum_to_ejection_says_so(start: Start) -> None:
    federation = start(learners=2, rounds=9, eject_after=1, quorum=1, min_fit_learners=1)
    federation.learner("a")
    federation.learner("b", fit=_bad)
    failure = federation.failure()
    assert "needs 2 learners" in failure
    assert "it was ejected: 1 of its answers were refused" in failure


def test_late_answers_are_dropped_but_do_not_lead_to_ejection(start: Start) -> None:
    federation = start(learners=2, rounds=8, eject_after=1, round_deadline_s=0.3, **ONE)

    federation.learner("a", fit=_pausing(0.05))
    federation.learner("b", fit=_pausing(0.5))
    federation.result()
    assert federation.reports("update.refused")
    assert not federation.reports("learner.ejected")


def test_over_sampled_rounds_close_with_enough_answers(start: Start) -> None:
    """Three of four are asked for two answers; who was too slow is not punished."""
    federation = start(
        learners=4, rounds=3, fraction_fit=0.5, over_sample=1.5, eject_after=1, fraction_evaluate=0.0, **ONE
    )
    stuck = threading.Event()

    def wait(parameters: Any, _: int) -> tuple[Any, int]:
        stuck.wait(20)
        return parameters, 10

    for name in "abc":
        federation.learner(name)
    federation.learner("d", fit=wait)
    begin = time.monotonic()
    federation.result()
    assert time.monotonic() - begin < 10
    stuck.set()
    for data in federation.reports("round.finished"):
        assert (data["cohort"], data["participants"]) == (3, 2)
        assert set(data["left_out"].values()) == {"enough others were quicker"}
    assert not federation.reports("learner.ejected")


def test_an_update_beyond_the_norm_gate_is_refused(start: Start) -> None:
    federation = start(learners=2, rounds=1, max_update_norm=10.0, **ONE)
    federation.learner("a", fit=lambda parameters, _: ([p + 1 for p in parameters], 10))
    federation.learner("b", fit=lambda parameters, _: ([p + 100 for p in parameters], 10))
    federation.result()
    (refused,) = federation.reports("update.refused")
    assert refused["learner"] == "b"
    assert refused["reason"] == "it is 244.9 away from the global model (max_update_norm is 10)"
    np.testing.assert_array_equal(federation.model()[0], np.ones((3, 2), np.float32))


def test_the_norm_gate_holds_for_updates_that_travel_in_blocks(start: Start) -> None:
    arrays = [np.zeros((600, 1000), np.float32)]
    federation = start(learners=2, rounds=1, arrays=arrays, max_update_norm=800.0, **ONE)
    federation.learner("a", fit=lambda parameters, _: ([p + 1 for p in parameters], 10))
    federation.learner("b", fit=lambda parameters, _: ([p - 2 for p in parameters], 10))
    federation.result()
    assert [data["learner"] for data in federation.reports("update.refused")] == ["b"]
    np.testing.assert_array_equal(federation.model()[0], np.ones((600, 1000), np.float32))


def _read_to_the_end(reader: Any) -> None:
    while True:
        wire.receive(reader)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 7}, "it was made from version 7 of the model, not from 0"),
        ({"version": None}, "it was made from version None of the model"),
        ({"task": "train-0"}, "it answers train-0, not train-1"),
    ],
)
def test_an_update_of_another_version_or_task_is_refused_and_counts(
    start: Start, change: dict[str, Any], reason: str
) -> None:
    federation = start(learners=2, rounds=1, eject_after=1, round_deadline_s=2.0, **ONE)
    federation.learner("a")
    client, writer, reader, layout = federation.exchange("b")
    asked = wire.receive(reader)
    answer = {"t": "result", "task": asked.header["task"], "version": asked.header["version"]}
    answer |= {"num_examples": 10, "metrics": {}, "digest": layout_digest(layout), **change}
    wire.send(writer, answer, bytes(layout.nbytes))
    federation.result()
    (refused,) = federation.reports("update.refused")
    assert refused["reason"].startswith(reason)
    assert federation.reports("learner.ejected")
    reader.cancel()
    client.close()


def test_answers_that_nobody_asked_for_end_the_session_and_count(start: Start) -> None:
    """Duplicates and replays within one session: more answers than tasks are no protocol of ours."""
    federation = start(learners=2, rounds=40, eject_after=2, **ONE)
    federation.learner("a", fit=_pausing(0.05))
    for _ in range(2):
        client, writer, reader, layout = federation.exchange("b")
        asked = wire.receive(reader)
        answer = {"t": "result", "task": asked.header["task"], "version": asked.header["version"]}
        answer |= {"num_examples": 10, "metrics": {}, "digest": layout_digest(layout)}
        with contextlib.suppress(pa.ArrowException, OSError):
            for _ in range(50):
                wire.send(writer, answer, bytes(layout.nbytes))
        with pytest.raises((StopIteration, flight.FlightError, OSError)):
            _read_to_the_end(reader)
        client.close()
    federation.wait_for("learner.ejected")
    federation.result()
    assert federation.reports("learner.ejected")[0]["learner"] == "b"


def test_a_learner_that_connects_over_and_over_is_ejected(start: Start) -> None:
    federation = start(learners=2, rounds=4000, **ONE)
    federation.learner("a", fit=_pausing(0.02))
    for _ in range(150):
        client, _, reader, _ = federation.exchange("b")
        reader.cancel()
        client.close()
        if federation.reports("learner.ejected"):
            break
    (ejected,) = federation.wait_for("learner.ejected")
    assert "it connected 100 times" in ejected["reason"]
