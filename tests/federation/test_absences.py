"""Learners that are away: each absence costs its time once, and nothing waits without end."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flops.core.clock import SystemClock
from flops.core.errors import FailedError
from flops.federation import roster
from flops.federation.checkpoint import Checkpoint, Committed
from flops.federation.hub import Said
from flops.federation.model_file import ModelFile
from flops.federation.reports import Reporter

Start = Any
ONE = {"min_available_learners": 1, "min_fit_learners": 1, "min_evaluate_learners": 1}


def _cut(header: dict[str, Any]) -> dict[str, Any]:
    raise StopIteration


def test_an_evaluation_with_fewer_than_a_round_needs_is_not_waited_for_without_end(start: Start) -> None:
    """Flower's sampling would: its minimum of available nodes counts for every phase."""
    federation = start(
        learners=3,
        rounds=1,
        min_available_learners=3,
        min_fit_learners=3,
        quorum=2,
        min_evaluate_learners=2,
    )
    for name in "ab":
        federation.learner(name)
    federation.learner("c", change=lambda header: {"t": "failed", "message": "boom"})
    federation.result()
    assert federation.reports("round.finished")[0]["participants"] == 2


def test_a_learner_that_never_comes_costs_the_start_deadline_once(start: Start) -> None:
    federation = start(learners=2, rounds=5, start_deadline_s=1.5, **ONE)
    federation.learner("a")
    begin = time.monotonic()
    federation.result()
    assert 1.4 < time.monotonic() - begin < 4.0


def test_a_learner_that_is_gone_for_good_costs_its_grace_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "RECONNECT_S", 1.5)
    federation = start(learners=2, rounds=6, **ONE)
    federation.learner("a")
    federation.learner("b", change=_cut)
    begin = time.monotonic()
    federation.result()
    assert 1.4 < time.monotonic() - begin < 4.5
    (reason,) = federation.reports("round.finished")[0]["left_out"].values()
    assert reason.startswith("it went and did not come back in time")


def test_a_learner_without_whom_a_round_fails_is_waited_for_until_the_deadline(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "RECONNECT_S", 0.2)
    federation = start(learners=2, rounds=2, min_fit_learners=2, min_evaluate_learners=2)
    federation.learner("a")
    federation.learner("b", change=_cut)
    federation.wait_for("learner.left")
    time.sleep(1.0)
    federation.learner("b")
    federation.result()
    assert [data["participants"] for data in federation.reports("round.finished")] == [2, 2]


def test_a_failed_learner_that_stays_connected_is_not_counted_as_ready(start: Start) -> None:
    federation = start(
        learners=3,
        rounds=2,
        min_available_learners=2,
        min_fit_learners=2,
        min_evaluate_learners=1,
        start_deadline_s=20,
    )
    federation.learner("a")
    # Fails before anybody else is there, and does not take the stop for an answer.
    failed = federation.learner("b")
    federation.wait_for("learner.connected", 2)
    federation.hub.inbox.put(Said("b", "failed", {"message": "boom"}))
    federation.wait_for("learner.left")
    federation.learner("c")
    federation.result()
    assert failed.stopped.wait(5)
    assert [sorted(data["fit_s"]) for data in federation.reports("round.finished")] == [["a", "c"]] * 2


def test_waiting_for_a_learner_that_hangs_does_not_lengthen_the_next_deadline(start: Start) -> None:
    federation = start(learners=2, rounds=1, round_deadline_s=2.0, **ONE)
    federation.learner("a")

    def hang(parameters: list[Any], _: int) -> tuple[list[Any], int]:
        federation.thread.join(30)
        return parameters, 1

    federation.learner("b", fit=hang)
    federation.result()
    slowest_s = Checkpoint(
        federation.state, federation.state.parent / "initial.safetensors"
    ).committed.slowest_s
    assert slowest_s is not None
    assert slowest_s < 1.5


def test_a_learner_that_connects_again_while_it_answers_counts_once(start: Start) -> None:
    """The former session is still open when the new one comes, as after a cut that only the learner saw."""
    federation = start(learners=2, rounds=1, arrays=[np.zeros(3_000_000, np.float32)], round_deadline_s=20.0)
    federation.learner("a")

    def reconnect(header: dict[str, Any]) -> dict[str, Any]:
        federation.learner("b")
        return header

    federation.learner("b", change=reconnect)
    federation.result()
    (data,) = federation.reports("round.finished")
    assert data["participants"] == 2
    assert federation.reports("update.refused") == []
    np.testing.assert_array_equal(federation.model()[0], np.ones(3_000_000, np.float32))


def test_many_rounds_leave_no_files_threads_or_sessions_behind(start: Start) -> None:
    import threading

    def count() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    federation = start(learners=2, rounds=120, arrays=[np.zeros(40_000, np.float32)])
    for name in "ab":
        federation.learner(name)
    federation.wait_for("round.finished", 20)
    before = count()
    federation.wait_for("round.finished", 110, timeout_s=40)
    after = count()
    federation.result()
    assert after[0] <= before[0] + 3
    assert after[1] <= before[1] + 1
    names = {path.name for path in federation.state.iterdir()}
    assert names == {
        "state.json",
        "reports.jsonl",
        "model.safetensors",
        "global-120.safetensors",
        "best-1.safetensors",
    }


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam", "FedMedian", "FedTrimmedAvg"])
@pytest.mark.parametrize(
    "arrays",
    [
        [],
        [np.zeros((0, 3), np.float32)],
        [np.array(2.0), np.array(3, np.int64)],
        [np.array([True, False]), np.ones(3, np.float16), np.zeros((0,), np.int8), np.ones(2, np.uint8)],
    ],
    ids=["no arrays", "an empty array", "scalars", "small types"],
)
def test_models_of_odd_arrays_are_averaged(start: Start, arrays: list[Any], strategy: str) -> None:
    federation = start(learners=3, rounds=2, arrays=arrays, strategy=strategy)
    for name in "abc":
        federation.learner(name, fit=lambda parameters, _: (parameters, 3))
    federation.result()
    model = federation.model()
    assert [(array.dtype, array.shape) for array in model] == [(a.dtype, a.shape) for a in arrays]
    if strategy != "FedAdam":
        for ours, initial in zip(model, arrays, strict=True):
            np.testing.assert_array_equal(ours, initial)


# -- what a killed life leaves behind


def _commit(folder: Path, initial: Path, losses: list[float]) -> Checkpoint:
    from flops.federation.model_file import write_arrays

    checkpoint = Checkpoint(folder, initial)
    model = ModelFile.open(initial)
    for number, loss in enumerate(losses, start=1):
        arrays = [np.full(4, number, np.float32)]
        write_arrays(model.layout, arrays, checkpoint.model_path(number), durable=False).close()
        before = checkpoint.committed
        better = not before.best_metrics or loss < before.best_metrics["loss"]
        state = Committed(
            number,
            {"loss": loss},
            number if better else before.best_round,
            {"loss": loss} if better else before.best_metrics,
        )
        checkpoint.commit(state, {}, better)
    model.close()
    return checkpoint


@pytest.fixture
def initial(tmp_path: Path) -> Path:
    from flops_worker.tensors import Layout, write

    path = tmp_path / "initial.safetensors"
    with path.open("wb") as file:
        arrays = [np.zeros(4, np.float32)]
        write(file.fileno(), Layout.of(arrays), arrays)
    return path


def _best(checkpoint: Checkpoint) -> float:
    file = ModelFile.open(checkpoint.best_model())
    value = float(np.frombuffer(file.body, np.float32)[0])
    file.close()
    return value


def test_the_best_model_is_that_of_a_committed_round(tmp_path: Path, initial: Path) -> None:
    """A life that was killed between naming its best model and the commit did not count."""
    folder = tmp_path / "state"
    _commit(folder, initial, [0.5])
    state = (folder / "state.json").read_text()
    model = (folder / "global-1.safetensors").read_bytes(), (folder / "best-1.safetensors").read_bytes()
    _commit(folder, initial, [0.5, 0.1])
    (folder / "state.json").write_text(state)
    (folder / "global-1.safetensors").write_bytes(model[0])
    (folder / "best-1.safetensors").write_bytes(model[1])
    again = Checkpoint(folder, initial)
    assert (again.committed.best_round, _best(again)) == (1, 1.0)


def test_a_committed_model_that_is_missing_is_said_so(tmp_path: Path, initial: Path) -> None:
    folder = tmp_path / "state"
    checkpoint = _commit(folder, initial, [0.5, 0.7])
    assert _best(checkpoint) == 1.0
    checkpoint.model_path(2).unlink()
    with pytest.raises(FailedError, match="the model of round 2 cannot be opened"):
        Checkpoint(folder, initial).model()
    (folder / "best-1.safetensors").unlink()
    with pytest.raises(FailedError, match="the best model, of round 1, cannot be opened"):
        Checkpoint(folder, initial)


def test_a_round_that_was_committed_but_not_reported_is_reported_after_the_restart(start: Start) -> None:
    first = start(learners=1, rounds=2)
    first.learner("a")
    first.result()
    reports = first.state / "reports.jsonl"
    lines = reports.read_bytes().splitlines(keepends=True)
    reports.write_bytes(b"".join(lines[:-1]) + lines[-1][:-5])  # torn in the middle of round 2
    assert b"round.finished" in lines[-1]
    second = start(learners=1, rounds=3, state=first.state)
    second.learner("a")
    second.result()
    assert [data["round"] for data in second.reports("round.finished")] == [1, 2, 3]


def test_reports_are_not_waited_for_when_the_manager_does_not_want_them(tmp_path: Path) -> None:
    import http.server
    import socketserver
    import threading

    from flops.core.events import EventKind
    from flops.federation import ReportTo

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

    path = str(tmp_path / "m.sock")
    with socketserver.UnixStreamServer(path, Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        reporter = Reporter(tmp_path / "reports.jsonl", ReportTo("t", "/reports", path), SystemClock())
        reporter.report(EventKind.ROUND_STARTED, round=1)
        begin = time.monotonic()
        assert not reporter.flush(60)
        assert time.monotonic() - begin < 10
        reporter.close()
        server.shutdown()
        thread.join()
