from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flops.core.clock import ManualClock
from flops.core.events import EventKind
from flops.core.ids import ProjectId, ServiceName
from flops.manager.reports import Report
from flops.manager.rows import Service
from flops.manager.store import Store
from flops.manager.top import Top
from flops.orchestration import FakeOrchestrator, Node, PermittedOrchestrator, ServiceSpec, ServiceUsage

ANNS, BOBS = ProjectId("p-ann234"), ProjectId("p-bob234")
NODES = (Node("north", "linux/amd64", 4, 8000), Node("south", "linux/arm64", 2, 4000, ready=False))
Seen = dict[str, Any]
See = Callable[..., Seen]


class World:
    """Two projects, each with an aggregator and an agent, on two nodes; time passes when somebody waits."""

    def __init__(self, store: Store, clock: ManualClock) -> None:
        self.store, self.clock = store, clock
        self.orchestrator = FakeOrchestrator(NODES, clock)
        self.top = Top(store, self.orchestrator, self.orchestrator, clock, wait=clock.advance)
        for project, owner in ((ANNS, "ann"), (BOBS, "bob")):
            store.create_project(
                project,
                name="n",
                spec={"training": {"mode": "classic"}},
                source="s",
                rounds_total=5,
                owner=owner,
            )
            for role in ("aggregator", "agent"):
                self.orchestrator.deploy(ServiceSpec(self.name(project, role), ("serve",), role, project))
            store.want_services(project, [Service(self.name(project, "aggregator"), "aggregator", None)])
        self.orchestrator.deploy(ServiceSpec(ServiceName("flops-data"), ("serve",), "data", "flops"))

    def name(self, project: ProjectId, role: str) -> ServiceName:
        return ServiceName(f"{project}-{role}")

    def use(self, name: ServiceName, **values: Any) -> None:
        self.orchestrator.use(name, ServiceUsage(name, **values))

    def view(self, user: str | None = None) -> Seen:
        return self.top.view(lambda owner, team: user in (None, owner), own=user is None)

    def services(self, user: str | None = None) -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in self.view(user)["services"]}


@pytest.fixture
def world(store: Store, clock: ManualClock) -> World:
    return World(store, clock)


def test_rates_are_made_of_two_looks(world: World) -> None:
    name = world.name(ANNS, "agent")
    world.use(name, cpu_s=1.0, memory_bytes=5_000_000, threads=3, received_bytes=100, sent_bytes=10)
    first = world.services()[name]
    assert (first["cpu_percent"], first["received_bytes_per_s"]) == (0.0, 0.0)
    world.clock.advance(2.0)
    world.use(name, cpu_s=4.0, memory_bytes=6_000_000, threads=4, received_bytes=300, sent_bytes=10)
    then = world.services()[name]
    assert (then["cpu_percent"], then["memory_bytes"], then["threads"]) == (150.0, 6_000_000, 4)
    assert (then["received_bytes_per_s"], then["sent_bytes_per_s"]) == (100.0, 0.0)
    assert (then["received_bytes"], then["sent_bytes"]) == (300, 10)


def test_looks_at_the_same_time_are_one(world: World) -> None:
    name = world.name(ANNS, "agent")
    world.view()
    world.clock.advance(1.0)
    world.use(name, cpu_s=0.5)
    assert world.services()[name]["cpu_percent"] == 50.0
    world.clock.advance(0.1)
    world.use(name, cpu_s=5.0)
    assert world.services()[name]["cpu_percent"] == 50.0


def test_a_service_that_began_anew_has_no_rate_until_the_next_look(world: World) -> None:
    name = world.name(ANNS, "agent")
    world.use(name, cpu_s=9.0)
    world.view()
    world.clock.advance(1.0)
    world.use(name, cpu_s=0.5)
    assert world.services()[name]["cpu_percent"] is None
    world.clock.advance(1.0)
    world.use(name, cpu_s=0.75)
    assert world.services()[name]["cpu_percent"] == 25.0


def test_bytes_that_no_network_counts_are_those_that_the_aggregator_reported(world: World) -> None:
    for number in (1, 2):
        data: dict[str, Any] = {"round": number, "bytes_up": 1000, "bytes_down": 4000, "metrics": {}}
        report = Report(number, 0.0, EventKind.ROUND_FINISHED, data)
        world.store.accept_reports(ANNS, "aggregator", [report])
    shown = world.services()
    aggregator = shown[world.name(ANNS, "aggregator")]
    assert (aggregator["received_bytes"], aggregator["sent_bytes"]) == (2000, 8000)
    assert (aggregator["round"], aggregator["rounds"]) == (2, 5)
    assert shown[world.name(ANNS, "agent")]["received_bytes"] is None
    world.clock.advance(2.0)
    data = {"round": 3, "bytes_up": 1000, "bytes_down": 4000, "metrics": {}}
    world.store.accept_reports(ANNS, "aggregator", [Report(3, 0.0, EventKind.ROUND_FINISHED, data)])
    aggregator = world.services()[world.name(ANNS, "aggregator")]
    assert (aggregator["received_bytes"], aggregator["received_bytes_per_s"]) == (3000, 500.0)


def test_everybody_sees_their_own_projects_and_who_sees_all_the_manager_too(world: World) -> None:
    anns = {world.name(ANNS, role) for role in ("aggregator", "agent")}
    bobs = {world.name(BOBS, role) for role in ("aggregator", "agent")}
    assert world.services("ann").keys() == anns
    assert world.services("eve").keys() == set()
    assert world.services().keys() >= anns | bobs | {"flops-data", "flops-manager"}
    world.use(world.name(BOBS, "agent"), memory_bytes=77)
    world.clock.advance(1.0)
    assert "77" not in str(world.view("ann"))


def test_nodes_are_the_sums_of_what_is_shown_on_them(world: World) -> None:
    world.use(world.name(ANNS, "agent"), cpu_s=0.0, memory_bytes=10)
    world.use(world.name(ANNS, "aggregator"), cpu_s=0.0, memory_bytes=32)
    view = world.view("ann")
    assert [(node["name"], node["ready"], node["services"]) for node in view["nodes"]] == [
        ("north", True, 2),
        ("south", False, 0),
    ]
    assert [(node["memory_bytes"], node["capacity_bytes"]) for node in view["nodes"]] == [
        (42, 8_000_000_000),
        (None, 4_000_000_000),
    ]
    assert (view["totals"]["services"], view["totals"]["memory_bytes"]) == (2, 42)


def test_ended_services_are_not_shown(world: World) -> None:
    world.orchestrator.stop(world.name(ANNS, "agent"))
    assert world.services("ann").keys() == {world.name(ANNS, "aggregator")}


def test_the_manager_counts_itself(world: World) -> None:
    own = world.services()["flops-manager"]
    assert own["memory_bytes"] > 1_000_000
    assert own["threads"] == len(list(Path("/proc/self/task").iterdir()))


def test_a_service_that_two_orchestrators_know_is_shown_once(world: World) -> None:
    # Wrapped, an orchestrator is another one; what it runs is the same.
    programs = PermittedOrchestrator(world.orchestrator, lambda: None)
    top = Top(world.store, programs, world.orchestrator, world.clock, wait=world.clock.advance)
    names = [one["name"] for one in top.view(lambda owner, team: True, own=True)["services"]]
    assert len(names) == len(set(names))


def test_machines_that_joined_are_nodes_too_and_count_by_themselves(world: World) -> None:
    clinic = Node("clinic", "linux/amd64", 8, 16000, address="")
    world.top = Top(
        world.store,
        world.orchestrator,
        world.orchestrator,
        world.clock,
        joined=lambda: [clinic],
        wait=world.clock.advance,
    )
    world.use(world.name(ANNS, "agent"), cpu_percent=70.0, memory_bytes=1_000_000, threads=2)
    seen = world.view()
    assert [node["name"] for node in seen["nodes"]] == ["clinic", "north", "south"]
    agent = next(one for one in seen["services"] if one["name"] == world.name(ANNS, "agent"))
    assert agent["cpu_percent"] == 70.0
