"""Tasks that are asked again, given up, or no longer waited for; members that come back late."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flops.core.clock import SystemClock
from flops.federation import Link, Member, Plan, wire
from flops.federation import cluster as clusters
from flops.federation.collect import TrainCollection
from flops.federation.conversation import Conversation, Declined, Trained
from flops.federation.hub import GlobalModel, Hub, Said, Session
from flops.federation.model_file import ModelWriter, layout_digest
from flops.federation.reports import Reporter
from flops.federation.roster import InterruptedByTask, Roster
from flops.federation.updates import Spool
from flops_worker.tensors import Layout

Start = Callable[..., Any]
Clusters = Callable[..., Any]
ONE = {"min_available_learners": 1, "min_fit_learners": 1, "min_evaluate_learners": 1}
LAYOUT = Layout.of([np.zeros(50_000, np.float32)])


class _Writer:
    """The sending half of an exchange, which remembers what was said."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def write_metadata(self, metadata: bytes) -> None:
        self.said.append(json.loads(metadata))

    def write_with_metadata(self, batch: Any, metadata: bytes) -> None:
        self.said.append(json.loads(metadata))

    @property
    def kinds(self) -> list[str]:
        return [header["t"] for header in self.said]


def _model_fd() -> int:
    file = ModelWriter(LAYOUT).finish()
    fd = os.dup(file.fd)
    file.close()
    return fd


def _ask(conversation: Conversation, kind: str, number: int) -> None:
    conversation._model = (number, _model_fd())
    header = {"t": kind, "task": f"{kind}-1", "round": 1, "seed": 1, "version": 0, "model": number}
    conversation._hear(wire.Received(header, None))


def _trained() -> Trained:
    return Trained(10, LAYOUT, _model_fd(), len(LAYOUT.file_header()))


def test_an_update_that_was_answered_again_can_still_be_fetched() -> None:
    """The evaluation still waited for its turn when the aggregator was killed before it had committed."""
    conversation = Conversation(Link("grpc://x", "a", "t"))
    first, second = _Writer(), _Writer()
    conversation._enter(first, LAYOUT)
    _ask(conversation, "train", 1)
    task = conversation.next_task(0)
    assert task is not None
    conversation.answer(task, _trained())
    _ask(conversation, "evaluate", 2)
    conversation._enter(second, LAYOUT)
    _ask(conversation, "train", 1)
    assert second.kinds == ["result"]
    assert conversation.next_task(0) is None
    conversation._hear(wire.Received({"t": "send", "task": "train-1"}, None))
    assert "body" in second.kinds


def test_a_task_that_was_given_up_is_done_when_it_is_wanted_again() -> None:
    conversation = Conversation(Link("grpc://x", "a", "t"))
    writer = _Writer()
    conversation._enter(writer, LAYOUT)
    _ask(conversation, "train", 1)
    task = conversation.next_task(0)
    assert task is not None
    _ask(conversation, "evaluate", 2)
    assert conversation.has_newer_task
    _ask(conversation, "train", 1)  # the aggregator was killed and is back where it was
    conversation.give_up(task)
    again = conversation.next_task(0)
    assert again is not None
    assert again.name == "train-1"
    conversation.answer(again, _trained())
    assert writer.kinds == ["result"]


def test_what_was_declined_is_tried_when_it_is_asked_again() -> None:
    conversation = Conversation(Link("grpc://x", "a", "t"))
    first, second = _Writer(), _Writer()
    conversation._enter(first, LAYOUT)
    _ask(conversation, "train", 1)
    task = conversation.next_task(0)
    assert task is not None
    conversation.answer(task, Declined("nobody is here"))
    assert first.kinds == ["declined"]
    conversation._enter(second, LAYOUT)
    _ask(conversation, "train", 1)
    assert second.kinds == []
    again = conversation.next_task(0)
    assert again is not None
    os.close(again.model_fd)


def _roster(
    folder: Path, members: dict[str, Member], interrupted: Callable[[], bool] = lambda: False
) -> tuple[Roster, Hub, Reporter]:
    hub = Hub("p", LAYOUT, members)
    reporter = Reporter(folder / "reports.jsonl", None, SystemClock())
    return Roster("p", Plan(), members, hub, reporter, SystemClock(), interrupted), hub, reporter


def test_a_wake_up_that_was_heard_already_still_interrupts(tmp_path: Path) -> None:
    roster, hub, reporter = _roster(tmp_path, {"a": Member("t")}, lambda: True)
    hub.wake()
    roster.take_notes()  # as whoever waits for members does first
    begin = time.monotonic()
    with pytest.raises(InterruptedByTask):
        roster.hear(5.0)
    assert time.monotonic() - begin < 2
    reporter.close()


def test_an_ejected_member_stays_out_whatever_it_had_said_before(tmp_path: Path) -> None:
    roster, hub, reporter = _roster(tmp_path, {"a": Member("t"), "b": Member("u")})
    roster.begin({}, {"b": "it floods"})
    hub.inbox.put(Said("b", "ready", {}))
    roster.take_notes()
    assert roster.expected == 1
    reporter.close()


class _Post:
    """Notes whose update is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def send(self, learner: str, header: dict[str, Any]) -> bool:
        return True

    def begin_upload(self, learner: str, task: str, body: Any) -> bool:
        self.asked.append(learner)
        return True

    def end_upload(self, learner: str) -> None:
        """Nothing is on its way."""


def test_learners_that_are_left_out_together_are_not_asked_for_their_updates(tmp_path: Path) -> None:
    post, spool = _Post(), Spool(tmp_path)
    collection = TrainCollection(
        "train-1",
        list("abcdefghij"),
        version=0,
        layout=LAYOUT,
        layouts={},
        spool=spool,
        post=post,
        max_examples={},
        take=lambda update: update.body.release(),
    )
    header = {"task": "train-1", "version": 0, "num_examples": 1, "digest": layout_digest(LAYOUT)}
    for name in "abcdefghij":
        collection.answer(Said(name, "result", header))
    assert post.asked == ["a", "b", "c"]
    collection.leave_all_out(collection.outstanding, "enough others were quicker")
    assert post.asked == ["a", "b", "c"]
    assert collection.done
    spool.close()


def _open_spool_files(folder: Path) -> int:
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(str(link.readlink()))
    return sum(str(folder) in name and "(deleted)" in name for name in names)


def test_a_declined_cycle_leaves_no_spool_files_open(start: Start, cluster: Clusters) -> None:
    members = {
        "c0": Member("token-of-c0", slot=1, kind="cluster"),
        "c1": Member("token-of-c1", slot=11, kind="cluster"),
    }
    arrays = [np.zeros((600, 100), np.float32)]
    root = start(members=members, rounds=6, arrays=arrays, fraction_evaluate=0.0, **ONE)
    good = cluster(root, "c0", {"g": 1}, rounds=1, cycles=6)
    learners = {name: 11 + place for place, name in enumerate("abcdef")}
    all_of_them = {"quorum": 6, "min_fit_learners": 6, "min_available_learners": 6}
    bad = cluster(
        root, "c1", learners, rounds=1, cycles=6, strategy="FedMedian", eject_after=100, **all_of_them
    )
    good.learner("g")
    for name in "abcde":
        bad.learner(name)

    def nan_at_last(parameters: Any, _: int) -> tuple[Any, int]:
        time.sleep(0.2)
        return [p * np.float32("nan") for p in parameters], 10

    bad.learner("f", fit=nan_at_last)
    root.result(60)
    assert len(bad.reports("update.refused")) >= 5
    assert _open_spool_files(bad.state) <= 4


def test_the_reason_of_a_learner_whose_code_does_not_load_reaches_the_root(
    start: Start, cluster: Clusters
) -> None:
    members = {"c0": Member("token-of-c0", slot=1, kind="cluster")}
    root = start(members=members, rounds=1, **{**ONE, "start_deadline_s": 3.0})
    inner = cluster(root, "c0", {"a": 1}, rounds=1, cycles=1)
    inner.learner("a", fails="model_manager.py raised ImportError")
    assert "a: model_manager.py raised ImportError" in root.failure()


def test_a_cluster_waits_for_its_learner_as_long_as_a_flat_training_does(
    start: Start, cluster: Clusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "_PATIENCE_S", 0.5)
    members = {"c1": Member("token-of-c1", slot=11, kind="cluster")}
    root = start(members=members, rounds=1, fraction_evaluate=0.0, **ONE)
    both = {"min_available_learners": 2, "min_fit_learners": 2}
    inner = cluster(root, "c1", {"c": 11, "d": 12}, rounds=2, cycles=1, **both)
    inner.learner("d")

    def leave(header: dict[str, Any]) -> dict[str, Any]:
        raise ConnectionResetError

    inner.learner("c", change=leave).stopped.wait(20)
    time.sleep(2)
    inner.learner("c")
    root.result()
    assert [data["participants"] for data in inner.reports("cluster.round")] == [2, 2]


@pytest.mark.parametrize("fraction", [0.6, 0.75])
def test_a_quorum_above_the_fraction_raises_the_cohort(start: Start, fraction: float) -> None:
    federation = start(learners=4, rounds=2, quorum=3, fraction_fit=fraction, start_deadline_s=1.0, **ONE)
    for name in "abc":
        federation.learner(name)
    federation.result()
    assert [data["cohort"] for data in federation.reports("round.finished")] == [3, 3]


def test_a_round_that_is_done_again_with_another_model_is_asked_again() -> None:
    session = Session("a", _Writer())

    def model(number: int) -> GlobalModel:
        return GlobalModel(number, 0, memoryview(bytes(4)), ())

    assert session.send({"t": "train", "task": "train-1"}, model(1))
    assert not session.send({"t": "train", "task": "train-1"}, model(1))
    assert session.send({"t": "train", "task": "train-1"}, model(2))
    session.close()
    session.join(5)


def test_reports_of_an_earlier_life_that_the_manager_has_are_not_kept_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "reports.jsonl"
    first = Reporter(file, None, SystemClock())
    for number in range(1, 6):
        first.report("round.finished", round=number)  # type: ignore[arg-type]
    first.close()
    with file.open("a") as stream:
        stream.write('{"seq":6,"time":1,"kind":"war')  # cut short by a kill
    (tmp_path / "reports.jsonl.accepted").write_text("4")
    again = Reporter(file, None, SystemClock())
    assert again.last_round == 5
    again.report("round.finished", round=6)  # type: ignore[arg-type]
    again.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["seq"] for line in lines] == [1, 2, 3, 4, 5, 6]
