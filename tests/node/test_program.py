"""A node says what is there, hears what is wanted, and goes on whatever its manager does."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flops.core.consent import Consent
from flops.core.errors import FailedError, UnauthorizedError, UnavailableError
from flops.core.ids import ServiceName
from flops.data import Fragment
from flops.data.fragments import FragmentId
from flops.node.data import holdings_of
from flops.node.home import NodeHome
from flops.node.journal import read_journal
from flops.node.program import Program
from flops.orchestration import FakeOrchestrator
from tests.node.conftest import MEMBERSHIP, PROJECT, FakeManager, wanted

NAME = ServiceName(f"{PROJECT}-agent-1")


class Running:
    """A program in a thread."""

    def __init__(self, home: Path, environments: Path, consent: Consent | None = None) -> None:
        self.home = NodeHome(home)
        self.home.make()
        self.home.settings.environments_dir.symlink_to(environments)
        self.home.keep_membership(MEMBERSHIP)
        if consent is not None:
            self.home.keep_consent(consent)
        self.manager = FakeManager()
        self.orchestrator = FakeOrchestrator()
        self.program = Program(self.home, MEMBERSHIP, self.orchestrator, self.manager, data_ready_s=0.0)
        self.ended: list[str | None] = []
        self.thread = threading.Thread(target=lambda: self.ended.append(self.program.run()))

    def start(self) -> "Running":
        self.thread.start()
        return self

    def wait_until(self, what: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline, (self.home.status(), self.manager.reports[-1:])
            time.sleep(0.01)

    def said(self, state: str) -> Callable[[], bool]:
        """Whether the manager has heard of a service in that state."""
        return lambda: any(
            service["state"] == state for report in self.manager.reports for service in report["services"]
        )

    def end(self) -> None:
        self.program.end()
        if self.thread.ident is not None:
            self.thread.join(60)
            assert not self.thread.is_alive()
        self.program.close()


@pytest.fixture
def running(tmp_path: Path, environments: Path) -> Iterator[Running]:
    running = Running(tmp_path, environments, Consent(tags=("mnist",)))
    yield running
    running.end()


def test_what_is_wanted_runs_and_the_manager_hears_of_it(running: Running) -> None:
    running.manager.answer = {"number": 4, "wanted": [wanted()], "logs": []}
    running.start()
    running.wait_until(running.said("running"))
    first = running.manager.reports[0]
    assert (first["known"], first["wait_s"], first["services"]) == (-1, 0.0, [])
    assert first["policy"] == {"tags": ["mnist"], "owners": [], "teams": [], "repositories": []}
    assert running.manager.reports[-1]["known"] == 4
    running.orchestrator.exit(NAME, 0)
    running.wait_until(running.said("exited"))


def test_a_manager_that_is_away_is_tried_again_and_learners_go_on(running: Running) -> None:
    running.manager.answer = {"number": 4, "wanted": [wanted()], "logs": []}
    running.start()
    running.wait_until(running.said("running"))
    running.manager.errors = [
        UnavailableError("away"),
        FailedError("an inner fault"),
        UnavailableError("away"),
    ]
    running.wait_until(lambda: not running.manager.errors)
    running.wait_until(lambda: running.home.status().get("connected"))
    (status,) = running.orchestrator.list(PROJECT)
    assert status.state == "running"


def test_an_answer_that_cannot_be_understood_changes_nothing(running: Running) -> None:
    running.manager.answer = {"number": 4, "wanted": [wanted()], "logs": []}
    running.start()
    running.wait_until(running.said("running"))
    running.manager.answer = {"number": 5, "wanted": None}
    running.wait_until(lambda: "cannot be understood" in running.home.status().get("error", ""))
    (status,) = running.orchestrator.list(PROJECT)
    assert status.state == "running"


def test_a_node_that_its_manager_does_not_know_any_more_ends_everything(running: Running) -> None:
    running.manager.answer = {"number": 4, "wanted": [wanted()], "logs": []}
    running.start()
    running.wait_until(running.said("running"))
    running.manager.errors = [UnauthorizedError("this credential is not good")] * 1000
    running.thread.join(60)
    assert running.ended == ["this credential is not good"]
    assert running.orchestrator.list(PROJECT) == []
    kept = running.home.membership()
    assert kept is not None
    assert (kept.ejected, kept.credential) == ("this credential is not good", "")
    (entry,) = read_journal(running.home.journal_file)
    assert entry["reason"] == "the manager does not know this node any more"


def test_once_refused_is_not_yet_ejected(running: Running) -> None:
    running.manager.errors = [UnauthorizedError("no")] * 2
    running.start()
    running.wait_until(lambda: running.home.status().get("connected"))
    assert running.ended == []


def test_logs_are_sent_when_they_are_asked_for(running: Running) -> None:
    running.manager.answer = {"number": 4, "wanted": [wanted()], "logs": []}
    running.start()
    running.wait_until(running.said("running"))
    assert all(report["logs"] == {} for report in running.manager.reports)
    running.orchestrator.write_log(NAME, "connected\n")
    running.manager.answer = {"number": 4, "wanted": [wanted()], "logs": [NAME, "of-nobody", 5]}
    running.wait_until(
        lambda: any("connected" in report["logs"].get(NAME, "") for report in running.manager.reports)
    )


def test_what_the_owner_changes_is_acted_on_and_told(running: Running) -> None:
    running.manager.answer = {"number": 4, "wanted": [wanted()], "logs": []}
    running.start()
    running.wait_until(running.said("running"))
    running.home.keep_consent(Consent(owners=("bob",)))
    running.program.look_again()
    running.wait_until(running.said("failed"))
    running.wait_until(lambda: running.manager.reports[-1]["policy"]["owners"] == ["bob"])
    assert running.orchestrator.list(PROJECT) == []


def test_a_stopped_node_begins_nothing_again(running: Running) -> None:
    running.manager.answer = {"number": 4, "wanted": [wanted()], "logs": []}
    running.start()
    running.wait_until(running.said("running"))
    running.program.stop_learners("the node was stopped by its owner")
    running.manager.answer = {"number": 5, "wanted": [wanted(attempt=2)], "logs": []}
    running.wait_until(lambda: running.manager.reports[-1]["known"] == 5)
    assert running.orchestrator.list(PROJECT) == []


def _fragment(number: int, tags: set[str], **changes: Any) -> Fragment:
    facts: dict[str, Any] = {
        "site": "north",
        "num_examples": 10,
        "size_bytes": 100,
        "columns": {"diagnosis": "string"},
        "allow_metrics": False,
        "labels": {"region": "n"},
    }
    return Fragment(
        id=FragmentId(f"f-{number:032x}"),
        tags=frozenset(tags),
        created=0.0,
        content_hash="h",
        **{**facts, **changes},
    )


def test_of_the_data_nothing_is_told_but_allowed_tags_and_counts() -> None:
    fragments = [
        _fragment(1, {"mnist", "secret"}),
        _fragment(2, {"mnist"}, num_examples=5),
        _fragment(3, {"secret"}),
        _fragment(4, {"mnist"}, site="south", allow_metrics=True, labels={}),
    ]
    told = holdings_of(fragments, Consent(tags=("mnist",)))
    common = {"tags": ["mnist"], "size_bytes": 200}
    assert told == [
        {**common, "site": "north", "num_examples": 15, "allow_metrics": False, "labels": {"region": "n"}},
        {
            **common,
            "size_bytes": 100,
            "site": "south",
            "num_examples": 10,
            "allow_metrics": True,
            "labels": {},
        },
    ]
    assert "secret" not in json.dumps(told)
    assert "diagnosis" not in json.dumps(told)
    assert len(holdings_of(fragments, Consent())) == 4
