"""Stages: one orchestrator each, with the levers the contract suite needs to make services end."""

import os
import queue
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import docker
import pytest

from flops.core.ids import ServiceName
from flops.orchestration import (
    FakeOrchestrator,
    Orchestrator,
    ProcessOrchestrator,
    ServiceSpec,
    ServiceState,
    ServiceStatus,
    ServiceUsage,
)
from flops.orchestration.containers import home_id
from flops.orchestration.docker import DockerOrchestrator
from flops.orchestration.linux import sweep
from flops.orchestration.swarm import SwarmOrchestrator
from tests.conftest import Require
from tests.engines import IMAGE, PrivateEngine, can_run_engines, private_engine
from tests.swarms import PrivateSwarm, can_run_swarms, private_swarm

DEADLINE_S = 20.0
WORK = "n=0; while [ $n -lt 300000 ]; do n=$((n+1)); done"
"""What a shell takes at least 0.05 s of processor time for."""


class Stage(Protocol):
    """One adapter, ready to be tested."""

    orchestrator: Orchestrator

    def spec(self, name: str, *, project: str = "p-test", restart: bool = False) -> ServiceSpec:
        """A service that runs until `end` is called."""
        ...

    def impossible(self, name: str) -> ServiceSpec:
        """A service that cannot start."""
        ...

    def end(self, name: str, code: int) -> None:
        """Make the running service end by itself: a code, or minus a signal."""
        ...

    def say(self, name: str, text: str) -> None:
        """Make the running service print something."""
        ...

    def work(self, name: str) -> None:
        """Make the running service use at least 0.05 s of processor time."""
        ...


class FakeStage:
    def __init__(self) -> None:
        self.fake = FakeOrchestrator()
        self.fake.refuse("/no/such/program")
        self.orchestrator: Orchestrator = self.fake

    def spec(self, name: str, *, project: str = "p-test", restart: bool = False) -> ServiceSpec:
        return ServiceSpec(
            ServiceName(name),
            ("serve",),
            "agent",
            project,
            restart="on-failure" if restart else "never",
            max_restarts=2,
        )

    def impossible(self, name: str) -> ServiceSpec:
        return ServiceSpec(ServiceName(name), ("/no/such/program",), "agent", "p-test")

    def end(self, name: str, code: int) -> None:
        self.fake.exit(ServiceName(name), code)

    def say(self, name: str, text: str) -> None:
        self.fake.write_log(ServiceName(name), text)

    def work(self, name: str) -> None:
        self.fake.use(ServiceName(name), ServiceUsage(ServiceName(name), 0.1, 2_000_000, 1))


class ProcessStage:
    """Services are shells that evaluate what is written to their pipe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.orchestrator: Orchestrator = ProcessOrchestrator(
            folder / "state", folder / "logs", backoff_s=0.02
        )

    def _pipe(self, name: str) -> Path:
        return self._folder / f"{name}.pipe"

    def spec(self, name: str, *, project: str = "p-test", restart: bool = False) -> ServiceSpec:
        if not self._pipe(name).exists():
            os.mkfifo(self._pipe(name))
        script = 'while true; do read -r order < "$0"; eval "$order"; done'
        return ServiceSpec(
            ServiceName(name),
            ("/bin/sh", "-c", script, str(self._pipe(name))),
            "agent",
            project,
            restart="on-failure" if restart else "never",
            max_restarts=2,
        )

    def impossible(self, name: str) -> ServiceSpec:
        return ServiceSpec(ServiceName(name), ("/no/such/program",), "agent", "p-test")

    def _order(self, name: str, text: str) -> None:
        self._pipe(name).write_text(text + "\n")  # waits until the service opens its end

    def end(self, name: str, code: int) -> None:
        self._order(name, f"exit {code}" if code >= 0 else f"kill {code} $$")

    def work(self, name: str) -> None:
        self._order(name, WORK)

    def say(self, name: str, text: str) -> None:
        receipt = self._folder / f"{name}.receipt"
        os.mkfifo(receipt)
        escaped = text.replace("\n", "\\n")  # an order is one line
        self._order(name, f"printf %b '{escaped}'; echo done > {receipt}")
        receipt.read_text()
        receipt.unlink()


class ContainerStage:
    """Services are shells in containers, which evaluate what is written to their pipe.

    Args:
        home: by which containers are known.
        clients: of the engines that they may be on.
    """

    def __init__(
        self, orchestrator: Orchestrator, home: str, image: str, clients: Sequence[docker.APIClient]
    ) -> None:
        self.orchestrator = orchestrator
        self.home = home
        self._image = image
        self._clients = clients

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def spec(self, name: str, *, project: str = "p-test", restart: bool = False) -> ServiceSpec:
        script = 'mkfifo /tmp/orders; while true; do read -r order < /tmp/orders; eval "$order"; done'
        return ServiceSpec(
            ServiceName(name),
            ("/bin/sh", "-c", script),
            "agent",
            project,
            restart="on-failure" if restart else "never",
            max_restarts=2,
            image=self._image,
        )

    def impossible(self, name: str) -> ServiceSpec:
        return ServiceSpec(ServiceName(name), ("/no/such/program",), "agent", "p-test", image=self._image)

    def _order(self, name: str, text: str) -> None:
        labels = [f"flops.home={self.home}", f"flops.service={name}"]
        ((client, container),) = (
            (client, container)
            for client in self._clients
            for container in client.containers(filters={"label": labels})
        )
        script = 'until test -p /tmp/orders; do sleep 0.01; done; printf "%s\\n" "$0" > /tmp/orders'
        order = client.exec_create(container["Id"], ["/bin/sh", "-c", script, text])
        client.exec_start(str(order["Id"]))

    def end(self, name: str, code: int) -> None:
        self._order(name, f"exit {code}" if code >= 0 else f"kill {code} $$")

    def work(self, name: str) -> None:
        self._order(name, WORK)

    def say(self, name: str, text: str) -> None:
        before = self.orchestrator.logs(ServiceName(name))
        escaped = text.replace("\n", "\\n")  # an order is one line
        self._order(name, f"printf %b '{escaped}'")
        deadline = time.monotonic() + DEADLINE_S
        # The engine passes on whole lines, when it can.
        while text.endswith("\n") and self.orchestrator.logs(ServiceName(name)) != before + text:
            assert time.monotonic() < deadline, "it was not printed in time"
            time.sleep(0.01)


def docker_stage(folder: Path, engine: PrivateEngine) -> ContainerStage:
    home = secrets.token_hex(4)
    orchestrator = DockerOrchestrator(
        folder / "state", folder / "logs", home=home, url=engine.url, backoff_s=0.02
    )
    return ContainerStage(orchestrator, home, IMAGE, [engine.client()])


def swarm_stage(folder: Path, swarm: PrivateSwarm) -> ContainerStage:
    orchestrator = SwarmOrchestrator(swarm.manager.url, folder, advertise=swarm.host, backoff_s=0.02)
    clients = [node.open_client() for node in swarm.nodes]
    return ContainerStage(orchestrator, home_id(folder), swarm.image, clients)


class History:
    """The state changes seen by a watcher."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._seen: queue.Queue[ServiceStatus] = queue.Queue()
        self.subscription = orchestrator.watch(self._seen.put)

    def next(self) -> ServiceStatus:
        return self._seen.get(timeout=DEADLINE_S)

    def until(self, name: str, state: ServiceState) -> ServiceStatus:
        """The next change that brings the service into the state."""
        while (status := self.next()).name != name or status.state != state:
            pass
        return status

    def nothing_more(self) -> bool:
        return self._seen.empty()


@pytest.fixture(scope="session")
def docker_engine(require: Require) -> Iterator[PrivateEngine]:
    """A Docker engine of our own, shared by the tests that leave it running."""
    require(can_run_engines(), "a Docker engine that we may start (root, docker.io, Debian's python3)")
    with private_engine(bridge=True) as engine:
        yield engine


@pytest.fixture(scope="session")
def swarm(require: Require) -> Iterator[PrivateSwarm]:
    """A Docker Swarm of our own, shared by the tests that leave it as it was."""
    require(can_run_swarms(), "a Docker Swarm that we may start (root, docker.io, docker-registry, iproute2)")
    with private_swarm() as swarm:
        yield swarm


ADAPTERS = (
    "fake",
    "process",
    pytest.param("docker", marks=pytest.mark.docker),
    pytest.param("swarm", marks=pytest.mark.swarm),
)


@pytest.fixture(params=ADAPTERS)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    stage: FakeStage | ProcessStage | ContainerStage
    if request.param == "fake":
        stage = FakeStage()
    elif request.param == "process":
        stage = ProcessStage(tmp_path)
    elif request.param == "docker":
        stage = docker_stage(tmp_path, request.getfixturevalue("docker_engine"))
    else:
        stage = swarm_stage(tmp_path, request.getfixturevalue("swarm"))
    yield stage
    orchestrator = stage.orchestrator
    orchestrator.stop_many([status.name for status in orchestrator.list()], grace_s=0.0)
    for project in {status.project for status in orchestrator.list()}:
        orchestrator.remove_project(project)
    orchestrator.close()
    if isinstance(stage, ContainerStage):
        stage.close()


@pytest.fixture
def history(stage: Stage) -> History:
    return History(stage.orchestrator)


@pytest.fixture
def watch() -> Callable[[Orchestrator], History]:
    return History


@pytest.fixture
def open_processes(tmp_path: Path) -> Iterator[Callable[[], ProcessOrchestrator]]:
    """Opens process orchestrators on one pair of folders; whatever they started is gone afterwards."""
    opened: list[ProcessOrchestrator] = []

    def open_one() -> ProcessOrchestrator:
        opened.append(ProcessOrchestrator(tmp_path / "state", tmp_path / "logs", backoff_s=0.02))
        return opened[-1]

    yield open_one
    for orchestrator in opened:
        orchestrator.close()
    with_everything = open_one()
    names = [status.name for status in with_everything.list()]
    with_everything.stop_many(names, grace_s=0.0)
    for name in names:
        with_everything.remove(name)
    home = with_everything._home
    with_everything.close()
    sweep(lambda marker: marker.endswith(f"@{home}"))


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Looks at something outside our processes (a file of a service, say) until it holds."""

    def wait(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            assert time.monotonic() < deadline, "it did not become true in time"
            time.sleep(0.005)

    return wait
