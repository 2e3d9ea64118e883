"""Services on joined nodes, as their orchestrator promises; the node is played word by word."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from flops.core.clock import ManualClock
from flops.core.errors import ConflictError, InvalidInputError, NotFoundError, UnauthorizedError
from flops.core.ids import ServiceName
from flops.fleet import JoinedNode, Seen
from flops.manager.broadcast import Broadcast
from flops.manager.joined import ASSIGNMENT, JoinedNodes
from flops.manager.placing import Placing
from flops.orchestration import FakeOrchestrator, File, ServiceSpec, ServiceStatus, ServiceUsage
from flops.persistence import open_database

A, B = ServiceName("p-222222-agent-1"), ServiceName("p-222222-agent-2")
NOTHING: dict[str, Any] = {"tags": [], "owners": [], "teams": [], "repositories": []}


def wanted(name: ServiceName = A, node: str = "clinic", project: str = "p-222222") -> ServiceSpec:
    assignment = File(ASSIGNMENT, json.dumps({"project": project, "site": "north"}).encode())
    return ServiceSpec(
        name,
        ("flops.agent",),
        "agent",
        project,
        node=node,
        files=(assignment, File("config.json", b'{"token": "s3cret"}')),
    )


class Clinic:
    """What a node does, one step at a time."""

    def __init__(self, fleet: "Fleet", name: str = "clinic") -> None:
        self._fleet = fleet
        self.node = fleet.join(name)
        self.known = -1
        self.told: dict[str, Any] = {}

    def listen(self) -> list[dict[str, Any]]:
        said = self._fleet.joined.told(self._now(), self.known, always=True)
        assert said is not None
        self.told, self.known = said, said["number"]
        services: list[dict[str, Any]] = said["wanted"]
        return services

    def say(self, *states: tuple[str, int | None], logs: dict[str, str] | None = None) -> None:
        """The states of what it was told to run, in order; of what is not named it says nothing."""
        services = [
            Seen(one["name"], one["digest"], state, code, "", 0, 1.0)
            for one, (state, code) in zip(self.told["wanted"], states, strict=False)
        ]
        self.report(*services, logs=logs)

    def report(
        self,
        *services: Seen,
        logs: dict[str, str] | None = None,
        usage: dict[ServiceName, dict[str, Any]] | None = None,
    ) -> None:
        self._fleet.joined.heard(
            self._now(),
            known=self.known,
            allowance=NOTHING,
            holdings=[],
            services=services,
            logs=logs or {},
            usage={str(name): used for name, used in (usage or {}).items()},
        )

    def _now(self) -> JoinedNode:
        return self._fleet.joined.store.node(self.node.name)


class Fleet:
    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.folder = folder
        self.database: sa.Engine = open_database(folder / "manager.db")
        self.joined = self.another()

    def another(self) -> JoinedNodes:
        """As the next manager has it."""
        return JoinedNodes(self.folder / "joined", self.database, self.clock, Broadcast())

    def join(self, name: str, owner: str = "dora") -> JoinedNode:
        _, text = self.joined.store.add_token(name, owner, 60.0)
        return self.joined.join(text, platform="linux/amd64", cpus=2, memory_mb=4000, version="1")[0]

    def status(self, name: ServiceName = A) -> ServiceStatus:
        return next(one for one in self.joined.list() if one.name == name)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.database.dispose()


@pytest.fixture
def clinic(fleet: Fleet) -> Clinic:
    return Clinic(fleet)


def test_a_service_is_pending_until_its_node_says_more(fleet: Fleet, clinic: Clinic) -> None:
    heard: list[ServiceStatus] = []
    fleet.joined.watch(heard.append)
    fleet.joined.deploy(wanted())
    assert (fleet.status().state, fleet.status().node) == ("pending", "clinic")
    (told,) = clinic.listen()
    assert told["assignment"] == {"project": "p-222222", "site": "north", "attempt": 1}
    assert base64.b64decode(told["files"]["config.json"]) == b'{"token": "s3cret"}'
    assert ASSIGNMENT not in told["files"]
    clinic.say(("running", None))
    assert fleet.status().state == "running"
    clinic.say(("exited", 0))
    assert [(one.name, one.state, one.exit_code) for one in heard] == [(A, "running", None), (A, "exited", 0)]


def test_nothing_new_is_told_twice(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    clinic.listen()
    assert fleet.joined.told(clinic.node, clinic.known) is None
    fleet.joined.deploy(wanted())  # the same
    assert fleet.joined.told(clinic.node, clinic.known) is None
    fleet.joined.deploy(wanted(B))
    assert len(clinic.listen()) == 2


def test_another_spec_under_a_live_name_is_refused(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    with pytest.raises(ConflictError, match=f"service {A} is pending with another spec - stop it first"):
        fleet.joined.deploy(wanted(project="p-333333"))


def test_images_and_programs_of_this_machine_are_not_for_joined_nodes(fleet: Fleet, clinic: Clinic) -> None:
    with pytest.raises(InvalidInputError, match="names no node"):
        fleet.joined.deploy(ServiceSpec(A, ("sh", "-c", "rm -rf /"), "agent", "p-222222"))
    with pytest.raises(NotFoundError, match="no node 'nobody' has joined"):
        fleet.joined.deploy(wanted(node="nobody"))


def test_each_attempt_is_another_one_and_words_on_older_ones_do_not_count(
    fleet: Fleet, clinic: Clinic
) -> None:
    fleet.joined.deploy(wanted())
    (first,) = clinic.listen()
    clinic.say(("failed", 1))
    assert (fleet.status().state, fleet.status().final) == ("failed", False)
    fleet.joined.deploy(wanted())
    (second,) = clinic.listen()
    assert second["assignment"]["attempt"] == 2
    assert second["digest"] != first["digest"]
    clinic.report(Seen(A, first["digest"], "failed", 1, "late", 0, 1.0))
    assert fleet.status().state == "pending"


def test_what_a_node_refuses_or_cannot_prepare_is_final(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    clinic.listen()
    clinic.say(("failed", None))
    assert fleet.status().final


def test_what_a_node_lost_itself_is_worth_another_attempt(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    clinic.listen()
    clinic.say(("running", None))
    clinic.say(("lost", None))
    assert (fleet.status().state, fleet.status().final) == ("lost", False)
    fleet.joined.deploy(wanted())
    assert clinic.listen()[0]["assignment"]["attempt"] == 2


def test_a_stop_returns_when_the_node_has_ended_the_service(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    clinic.listen()
    clinic.say(("running", None))
    stopping = threading.Thread(target=fleet.joined.stop, args=(A,))
    stopping.start()
    deadline = time.monotonic() + 60
    while clinic.listen() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert clinic.told["wanted"] == []
    clinic.say()
    stopping.join(60)
    assert not stopping.is_alive()
    assert (fleet.status().state, fleet.status().reason) == ("exited", "stopped")


def test_a_node_that_does_not_know_yet_that_a_service_is_over_has_not_ended_it(
    fleet: Fleet, clinic: Clinic
) -> None:
    fleet.joined.deploy(wanted())
    clinic.report()  # it knows of nothing yet
    assert fleet.status().state == "pending"
    clinic.listen()
    clinic.report()  # it knows, and has not begun
    assert fleet.status().state == "pending"


def test_a_node_that_is_away_keeps_its_services_and_goes_on_when_it_comes_back(
    fleet: Fleet, clinic: Clinic
) -> None:
    fleet.joined.deploy(wanted())
    clinic.listen()
    clinic.say(("running", None))
    fleet.clock.advance(31)
    assert (fleet.status().state, fleet.status().reason) == ("pending", "node clinic is away")
    clinic.say(("running", None))
    assert fleet.status().state == "running"
    fleet.clock.advance(601)
    lost = fleet.status()
    assert (lost.state, lost.final) == ("lost", True)
    assert lost.reason == "node clinic was not heard of for 10 minutes"
    clinic.say(("running", None))
    assert fleet.status().state == "running"


def test_a_stop_does_not_wait_for_a_node_that_is_away(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    clinic.listen()
    clinic.say(("running", None))
    fleet.clock.advance(31)
    fleet.joined.stop(A)
    assert (fleet.status().state, fleet.status().reason) == (
        "exited",
        "stopped; node clinic ends it when it is back",
    )
    assert clinic.listen() == []


def test_what_runs_on_a_node_that_leaves_is_lost_for_good(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    clinic.listen()
    clinic.say(("running", None))
    heard: list[ServiceStatus] = []
    fleet.joined.watch(heard.append)
    fleet.joined.leave("clinic", "it has left")
    assert [(one.state, one.final, one.reason) for one in heard] == [
        ("lost", True, "node clinic is gone: it has left")
    ]
    with pytest.raises(UnauthorizedError):
        fleet.joined.told(clinic.node, -1, always=True)
    fleet.joined.deploy(wanted())
    assert fleet.status().final
    again = Clinic(fleet)
    assert again.listen() == []
    fleet.joined.deploy(wanted())
    assert len(again.listen()) == 1
    assert fleet.status().state == "pending"


def test_who_waits_for_news_is_woken_by_what_is_wanted_and_by_the_end(fleet: Fleet, clinic: Clinic) -> None:
    woken: list[str] = []
    end = fleet.joined.listen("clinic", lambda: woken.append("news"))
    fleet.joined.deploy(wanted())
    assert woken == ["news"]
    fleet.clock.advance(31)
    fleet.joined.stop(A)
    assert len(woken) == 2
    fleet.joined.leave("clinic", "admin has ejected it")
    assert len(woken) == 3
    end()
    fleet.joined.deploy(wanted())
    assert len(woken) == 3


def test_a_node_says_nothing_of_the_services_of_others(fleet: Fleet, clinic: Clinic) -> None:
    other = Clinic(fleet, "farm")
    fleet.joined.deploy(wanted())
    (told,) = clinic.listen()
    other.listen()
    other.report(Seen(A, told["digest"], "exited", 0, "", 0, 1.0), logs={A: "forged"})
    assert fleet.status().state == "pending"
    assert other.listen() == []
    assert fleet.joined.assignment(other.node, "p-222222") is None
    assert fleet.joined.assignment(clinic.node, "p-222222") is not None


def test_logs_are_asked_for_and_kept(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    clinic.listen()
    clinic.say(("running", None))
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(fleet.joined.logs(A)))
    asking.start()
    deadline = time.monotonic() + 60
    while asking.is_alive() and time.monotonic() < deadline:
        clinic.listen()
        if clinic.told["logs"]:
            clinic.say(("running", None), logs={A: "first\nsecond\n"})
        time.sleep(0.01)
    asking.join(60)
    fleet.clock.advance(31)
    assert fleet.joined.logs(A, tail_bytes=8) == "second\n"  # the node is away: as it was
    with pytest.raises(NotFoundError):
        fleet.joined.logs(B)


def test_the_next_manager_knows_what_was_wanted_and_seen(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    clinic.listen()
    clinic.say(("running", None))
    before = fleet.joined.list()
    fleet.joined = fleet.another()
    assert fleet.joined.list() == before
    assert fleet.joined.told(clinic.node, clinic.known) is None
    assert clinic.listen()[0]["files"]


def test_secrets_that_travel_are_private_and_in_no_row(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    (file,) = (fleet.folder / "joined").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    secret = base64.b64encode(b'{"token": "s3cret"}')
    for part in fleet.folder.glob("manager.db*"):
        content = part.read_bytes()
        assert b"s3cret" not in content
        assert secret not in content
    fleet.clock.advance(31)
    fleet.joined.remove(A)
    assert fleet.joined.list() == []
    assert list((fleet.folder / "joined").iterdir()) == []


def test_what_services_use_is_known_for_as_long_as_their_node_says_so(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    clinic.listen()
    used: dict[str, Any] = {"cpu_percent": 80.0, "memory_bytes": 5_000_000, "threads": 3, "sent_bytes": 10}
    clinic.report(usage={A: used, B: used})
    assert fleet.joined.usage() == [ServiceUsage(A, **used)]
    fleet.clock.advance(30)
    assert fleet.joined.usage() == []
    clinic.report(usage={A: used})
    fleet.joined.remove_project("p-222222")
    assert fleet.joined.usage() == []


def test_a_node_may_forget_what_ended_a_while_ago(fleet: Fleet, clinic: Clinic) -> None:
    fleet.joined.deploy(wanted())
    clinic.listen()
    clinic.say(("exited", 0))
    assert len(clinic.listen()) == 1
    fleet.clock.advance(20)
    assert len(clinic.listen()) == 1
    fleet.clock.advance(41)
    clinic.report()
    assert clinic.listen() == []
    clinic.report()
    assert (fleet.status().state, fleet.status().exit_code) == ("exited", 0)


def test_after_a_restore_nodes_are_not_told_of_services_whose_files_are_gone(
    fleet: Fleet, clinic: Clinic
) -> None:
    fleet.joined.deploy(wanted())
    (file,) = (fleet.folder / "joined").iterdir()
    file.unlink()
    assert clinic.listen() == []
    assert (fleet.status().state, fleet.status().final) == ("lost", True)
    fleet.joined.deploy(wanted())
    assert len(clinic.listen()) == 1


def test_services_go_where_their_node_is(fleet: Fleet, clinic: Clinic) -> None:
    base = FakeOrchestrator()
    both = Placing(base, fleet.joined)
    heard: list[str] = []
    subscription = both.watch(lambda status: heard.append(f"{status.name} {status.state}"))
    both.deploy(wanted())
    both.deploy(ServiceSpec(B, ("serve",), "agent", "p-222222"))
    assert [(one.name, one.node) for one in both.list("p-222222")] == [(A, "clinic"), (B, "fake-node")]
    clinic.listen()
    clinic.say(("running", None))
    assert heard == [f"{B} running", f"{A} running"]
    subscription.close()
    with pytest.raises(NotFoundError):
        both.stop_many([A, ServiceName("nobody")])
    assert [one.state for one in both.list()] == ["running", "running"]
    fleet.clock.advance(31)
    both.stop_many([A, B])
    assert [one.state for one in both.list()] == ["exited", "exited"]
    assert both.logs(B) == ""
    both.remove_project("p-222222")
    assert both.list() == []
