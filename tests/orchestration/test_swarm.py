"""The `swarm` adapter with a real swarm of three nodes: where services run, what they may, who may die."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flops.core.errors import ConflictError, FailedError, InvalidInputError, UnavailableError
from flops.core.ids import ServiceName
from flops.orchestration import File, Node, ServiceSpec, ServiceStatus, Volume
from flops.orchestration import swarm_objects as objects
from flops.orchestration.containers import Names, home_id
from flops.orchestration.deployments import Deployment
from flops.orchestration.swarm import SwarmOrchestrator
from flops.orchestration.swarm_objects import Task
from tests.engines import PrivateEngine
from tests.swarms import PrivateSwarm, SwarmNode

pytestmark = pytest.mark.swarm

A, B = ServiceName("p-test-agent-1"), ServiceName("p-test-agent-2")
PYTHON = "/usr/bin/python3"

WaitUntil = Callable[[Callable[[], bool]], None]
OpenSwarm = Callable[..., SwarmOrchestrator]

# Listens on the port it is given and says hello.
SERVER = """
import socket, sys
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("ready", flush=True)
while True:
    caller, _ = server.accept()
    caller.sendall(b"hello")
    caller.close()
"""

# Tries to reach each HOST:PORT it is given, and the world's names, and says what became of that.
CALLER = """
import socket, sys
for place in sys.argv[1:]:
    host, port = place.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=3) as connection:
            print(place, "reached", connection.recv(10))
    except OSError as error:
        print(place, "not reached")
print(sorted(name for _, name in socket.if_nameindex()))
"""

# Takes more memory than it may.
GLUTTON = "hoard = []\nwhile True: hoard.append(bytearray(10_000_000))"


@pytest.fixture
def open_swarm(swarm: PrivateSwarm, tmp_path: Path) -> Iterator[OpenSwarm]:
    """Opens orchestrators of one home; whatever they started is gone afterwards."""
    opened: list[SwarmOrchestrator] = []

    def open_one(**more: Any) -> SwarmOrchestrator:
        arguments: dict[str, Any] = {"advertise": swarm.host, "backoff_s": 0.02, "python": PYTHON, **more}
        opened.append(SwarmOrchestrator(swarm.manager.url, tmp_path, **arguments))
        return opened[-1]

    yield open_one
    for orchestrator in opened:
        orchestrator.close()
    with closing(open_one()) as with_everything:
        for project in {status.project for status in with_everything.list()} | {"p-test"}:
            with_everything.remove_project(project)


@pytest.fixture
def home(tmp_path: Path) -> str:
    return home_id(tmp_path)


@pytest.fixture
def spec(swarm: PrivateSwarm) -> Callable[..., ServiceSpec]:
    def make(*command: str, name: str = A, **more: Any) -> ServiceSpec:
        more = {"image": swarm.image} | more
        return ServiceSpec(ServiceName(name), command, "agent", "p-test", **more)

    return make


def only(orchestrator: SwarmOrchestrator) -> ServiceStatus:
    (status,) = orchestrator.list()
    return status


def container_of(node: SwarmNode, home: str, name: str) -> dict[str, Any]:
    """What the engine of a node says of a service."""
    (container,) = node.containers({"flops.home": home, "flops.service": name})
    with node.client() as client:
        details: dict[str, Any] = client.inspect_container(container["Id"])
    return details


def things_of(swarm: PrivateSwarm, home: str) -> dict[str, list[str]]:
    """All that the swarm and its nodes have of a home."""
    filters = Names(home).mine()
    with swarm.manager.client() as manager:
        api: Any = manager
        things = {
            "services": [service["Spec"]["Name"] for service in api.services(filters=filters)],
            "secrets": [secret["Spec"]["Name"] for secret in api.secrets(filters=filters)],
            "configs": [config["Spec"]["Name"] for config in api.configs(filters=filters)],
            "networks": [network["Name"] for network in api.networks(filters=filters)],
        }
    things["containers"] = [
        container["Id"]
        for node in swarm.nodes
        for container in node.containers({"flops.home": home}, ended=True)
    ]
    return {kind: names for kind, names in things.items() if names}


# nodes and places
def test_nodes_tell_their_names_addresses_and_labels(swarm: PrivateSwarm, open_swarm: OpenSwarm) -> None:
    orchestrator = open_swarm()
    _describe_node(swarm, "worker-1", Labels={"data-fruit": "yes", "kind": "best"})

    nodes = {node.name: node for node in orchestrator.nodes()}

    assert [*nodes] == ["manager", "worker-1", "worker-2"]
    assert [node.address for node in nodes.values()] == [node.address for node in swarm.nodes]
    assert nodes["manager"].labels == {"kind": "manager"}
    assert nodes["worker-1"].labels == {"data-fruit": "yes", "kind": "best"}
    assert nodes["worker-2"].labels == {"kind": "worker"}
    assert orchestrator.host == swarm.host
    assert orchestrator.runs_images


def test_services_run_where_they_are_wanted_and_reach_each_other(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, watch: Any, home: str
) -> None:
    orchestrator = open_swarm()
    history = watch(orchestrator)
    servers = [
        spec(
            PYTHON,
            "-c",
            SERVER,
            str(7100 + i),
            name=f"server-{i}",
            node=node.name,
            port=7100 + i,
            publish=True,
        )
        for i, node in enumerate(swarm.nodes)
    ]
    for server in servers:
        orchestrator.deploy(server)
        history.until(server.name, "running")
    addresses = [orchestrator.address(server) for server in servers]

    assert addresses == [f"{node.address}:{7100 + i}" for i, node in enumerate(swarm.nodes)]
    for status, node, address in zip(orchestrator.list(), swarm.nodes, addresses, strict=True):
        assert (status.node, status.endpoint) == (node.name, address)
        assert container_of(node, home, status.name)["State"]["Running"]
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            assert connection.recv(10) == b"hello"

    orchestrator.deploy(spec(PYTHON, "-c", CALLER, *addresses, node="worker-1"))
    history.until(A, "exited")
    log = orchestrator.logs(A)
    assert [line for line in log.splitlines() if "reached" in line] == [
        f"{address} reached b'hello'" for address in addresses
    ]


def test_address_needs_a_node_that_is_known(open_swarm: OpenSwarm, spec: Any) -> None:
    orchestrator = open_swarm()

    for wrong, message in (
        (spec("x", port=7000), "name its node"),
        (spec("x", node="worker-1"), "listens on no port"),
        (spec("x", port=7000, node="worker-1", network="none"), "the network of its project"),
        (spec("x", port=7000, node="worker-9"), "no node of the swarm is called worker-9"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            orchestrator.address(wrong)


def test_service_that_has_no_place_waits_and_says_why(
    open_swarm: OpenSwarm, spec: Any, watch: Any, swarm: PrivateSwarm, home: str
) -> None:
    orchestrator = open_swarm()
    history = watch(orchestrator)

    orchestrator.deploy(spec("sleep", "600", node="worker-9"))
    orchestrator.deploy(spec("sleep", "600", name=B, memory_mb=9_000_000))

    assert history.until(A, "pending").reason == "waits for a node: none is called worker-9"
    assert history.until(B, "pending").reason == (
        "waits for a node: no suitable node (insufficient resources on 3 nodes)"
    )
    assert [(s.state, s.node, s.started_at) for s in orchestrator.list()] == [("pending", "", None)] * 2
    orchestrator.stop_many([A, B])
    assert [(s.state, s.reason) for s in orchestrator.list()] == [("exited", "stopped")] * 2


def test_service_gets_its_place_when_there_is_one(
    open_swarm: OpenSwarm, spec: Any, watch: Any, swarm: PrivateSwarm
) -> None:
    orchestrator = open_swarm()
    history = watch(orchestrator)
    _set_availability(swarm, "worker-2", "drain")
    try:
        orchestrator.deploy(spec("sleep", "600", node="worker-2"))
        waiting = history.until(A, "pending")
    finally:
        _set_availability(swarm, "worker-2", "active")

    assert waiting.reason == "waits for a node: worker-2 is down, or takes no services"
    running = history.until(A, "running")
    assert (running.node, running.reason) == ("worker-2", "")


def _set_availability(swarm: PrivateSwarm, name: str, availability: str) -> None:
    _describe_node(swarm, name, Availability=availability)


def _describe_node(swarm: PrivateSwarm, name: str, **changes: Any) -> None:
    with swarm.manager.client() as manager:
        api: Any = manager
        for value in api.nodes():
            if value["Description"]["Hostname"] == name:
                api.update_node(value["ID"], value["Version"]["Index"], {**value["Spec"], **changes})


# what services are given, and what they may
def test_service_is_confined(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, home: str, watch: Any
) -> None:
    orchestrator = open_swarm()
    script = (
        'id -u; id -g; cat /proc/self/status; touch /x 2>/dev/null || echo "root is read-only";'
        ' echo text > /tmp/x; cat /tmp/x; echo "$COLOUR" "$HOME"; sleep 600'
    )

    orchestrator.deploy(
        spec(
            *("/bin/sh", "-c", script),
            node="worker-1",
            memory_mb=100,
            cpus=0.5,
            environment={"COLOUR": "blue"},
            directory=Path("/tmp"),
        )
    )

    details = container_of(swarm.node("worker-1"), home, A)
    limits = details["HostConfig"]
    assert (limits["Memory"], limits["NanoCpus"], limits["PidsLimit"]) == (100_000_000, 500_000_000, 4096)
    assert limits["ReadonlyRootfs"]
    assert not limits["Privileged"]
    assert details["Config"]["User"] == "10001:10001"
    assert details["Config"]["WorkingDir"] == "/tmp"
    _wait(lambda: "blue /tmp" in orchestrator.logs(A))
    log = orchestrator.logs(A)
    assert log.startswith("10001\n10001\n")
    assert "CapBnd:\t0000000000000000" in log
    assert "root is read-only\ntext\nblue /tmp\n" in log


def test_more_processors_than_there_are_means_all_of_them(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, home: str
) -> None:
    orchestrator = open_swarm()
    cpus = next(node.cpus for node in orchestrator.nodes() if node.name == "worker-1")

    orchestrator.deploy(spec("sleep", "600", node="worker-1", cpus=1000))

    details = container_of(swarm.node("worker-1"), home, A)
    assert details["HostConfig"]["NanoCpus"] == cpus * 1_000_000_000


def test_files_reach_the_service_and_nobody_else(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, home: str, watch: Any
) -> None:
    orchestrator = open_swarm()
    history = watch(orchestrator)
    files = (File("config.json", b'{"token": "open sesame"}'), File("binary", bytes(range(256)) * 1000))
    script = "cat /run/secrets/config.json; stat -c %s /run/secrets/binary; stat -c '%u %g %a' /run/secrets/*"

    orchestrator.deploy(spec("/bin/sh", "-c", f"{script}; sleep 600", files=files, node="worker-1"))

    _wait(lambda: orchestrator.logs(A).count("\n") >= 2)
    assert orchestrator.logs(A) == '{"token": "open sesame"}256000\n10001 10001 400\n10001 10001 400\n'
    on_node = json.dumps(container_of(swarm.node("worker-1"), home, A))
    with swarm.manager.client() as manager:
        api: Any = manager
        in_swarm = json.dumps([api.services(), api.tasks(), api.secrets()])
    assert "sesame" not in on_node
    assert "sesame" not in in_swarm
    assert len(things_of(swarm, home)["secrets"]) == 2

    orchestrator.stop(A)
    history.until(A, "exited")
    again = (File("config.json", b'{"token": "shazam"}'),)
    orchestrator.deploy(spec("/bin/sh", "-c", "cat /run/secrets/config.json; echo; sleep 600", files=again))
    _wait(lambda: "shazam" in orchestrator.logs(A))
    _wait(lambda: len(things_of(swarm, home)["secrets"]) == 1)
    orchestrator.remove(A)
    assert "secrets" not in things_of(swarm, home)


def test_empty_file_is_refused(swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, home: str) -> None:
    orchestrator = open_swarm()

    with pytest.raises(InvalidInputError, match=r"file nothing of service .* is empty"):
        orchestrator.deploy(spec("sleep", "600", files=(File("some", b"thing"), File("nothing", b""))))

    assert orchestrator.list() == []
    _wait(lambda: things_of(swarm, home) == {})


def test_service_without_network_reaches_nobody(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, home: str, watch: Any
) -> None:
    orchestrator = open_swarm()
    history = watch(orchestrator)
    node = swarm.node("worker-1")
    orchestrator.deploy(spec(PYTHON, "-c", SERVER, "7201", name="server", node="worker-1", port=7201))
    orchestrator.deploy(spec(PYTHON, "-c", SERVER, "7202", name=B, node="worker-1", network="none"))
    other = container_of(node, home, B)["NetworkSettings"]["Networks"]
    ((name, attached),) = other.items()
    assert name.endswith(B)

    places = (
        f"{node.address}:7201",
        swarm.registry,
        f"{attached['IPAddress']}:7202",
        f"{B}:7202",
        f"{node.address}:22",
        "172.30.201.1:7201",
        "127.0.0.1:7201",
    )
    orchestrator.deploy(spec(PYTHON, "-c", CALLER, *places, node="worker-1", network="none"))
    history.until(A, "exited")

    log = orchestrator.logs(A).splitlines()
    assert log[:-1] == [f"{place} not reached" for place in places]
    for service in ("server", A, B):
        orchestrator.remove(ServiceName(service))
    _wait(lambda: things_of(swarm, home) == {})


def test_volumes_stay_on_their_node_and_go_with_their_project(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, home: str, watch: Any
) -> None:
    orchestrator = open_swarm()
    history = watch(orchestrator)
    volume = Volume("p-test-data", "/var/lib/flops")
    kept = Volume("p-testing-data", "/var/lib/flops")
    write = (
        "mkdir /var/lib/flops/deep && echo text > /var/lib/flops/deep/file; echo x > /var/lib/flops/.hidden"
    )
    for node in ("manager", "worker-1"):
        for name, one in ((f"{node}-write", volume), (f"{node}-keep", kept)):
            orchestrator.deploy(spec("/bin/sh", "-c", write, name=name, node=node, volumes=(one,)))
            history.until(name, "exited")
    orchestrator.deploy(
        spec("/bin/sh", "-c", "cat /var/lib/flops/deep/file", node="worker-1", volumes=(volume,))
    )
    history.until(A, "exited")
    assert orchestrator.logs(A) == "text\n"

    orchestrator.remove_project("p-test")

    assert orchestrator.list() == []
    names = Names(home)
    assert names.of(volume.name) not in swarm.manager.volumes()
    assert names.of(kept.name) in swarm.manager.volumes()
    folder = swarm.folder / "worker-1" / "volumes"
    assert [*(folder / names.of(volume.name) / "_data").iterdir()] == []
    assert len([*(folder / names.of(kept.name) / "_data").iterdir()]) == 2
    _wait(lambda: set(things_of(swarm, home)) == {"configs"})
    assert len(things_of(swarm, home)["configs"]) == 2  # of the volumes that are not this project's
    orchestrator.remove_project("p-testing")
    _wait(lambda: things_of(swarm, home) == {})


def test_volume_of_a_dead_node_is_emptied_once_it_is_back(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, home: str, watch: Any
) -> None:
    first = open_swarm()
    history = watch(first)
    worker = swarm.node("worker-2")
    volume = Volume("p-test-data", "/var/lib/flops")
    first.deploy(spec("touch", "/var/lib/flops/file", node="worker-2", volumes=(volume,)))
    history.until(A, "exited")
    data = swarm.folder / "worker-2" / "volumes" / Names(home).of(volume.name) / "_data"
    assert [path.name for path in data.iterdir()] == ["file"]

    worker.kill()
    try:
        first.remove_project("p-test")
        first.close()
        assert [path.name for path in data.iterdir()] == ["file"]
    finally:
        worker.start()
    _wait(lambda: set(things_of(swarm, home)) == {"configs"})

    open_swarm()
    _wait(lambda: things_of(swarm, home) == {})

    assert [*data.iterdir()] == []


# ends
def test_memory_limit_kills_and_is_named(open_swarm: OpenSwarm, spec: Any, watch: Any) -> None:
    orchestrator = open_swarm()
    history = watch(orchestrator)

    orchestrator.deploy(
        spec(PYTHON, "-c", GLUTTON, memory_mb=100, restart="on-failure", max_restarts=1, node="worker-1")
    )

    words = "killed by SIGKILL, probably by its memory limit (100 MB)"
    assert history.until(A, "pending").reason == f"{words}; restart 1 of 1 in 0.02 s"
    assert history.until(A, "running").reason == f"restarted after {words}"
    failed = history.until(A, "failed")
    assert (failed.exit_code, failed.reason) == (-9, f"{words}; given up after 1 restarts")


def test_stubborn_service_is_killed(open_swarm: OpenSwarm, spec: Any, watch: Any) -> None:
    orchestrator = open_swarm(stop_grace_s=1.0)
    script = "trap '' TERM; while true; do sleep 0.1; done"
    orchestrator.deploy(spec("/bin/sh", "-c", script))

    orchestrator.stop(A)

    status = only(orchestrator)
    assert (status.state, status.reason, status.exit_code) == ("exited", "stopped", -9)


def test_service_that_somebody_removed_is_lost(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, watch: Any, home: str
) -> None:
    orchestrator = open_swarm()
    history = watch(orchestrator)
    orchestrator.deploy(spec("sleep", "600"))

    with swarm.manager.client() as client:
        client.remove_service(things_of(swarm, home)["services"][0])  # type: ignore[no-untyped-call]

    lost = history.until(A, "lost")
    assert lost.reason == "its service was removed from the swarm by somebody"
    orchestrator.deploy(spec("sleep", "600"))
    assert history.until(A, "running").restarts == 0


def test_service_of_a_drained_node_is_lost(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, watch: Any
) -> None:
    orchestrator = open_swarm()
    history = watch(orchestrator)
    orchestrator.deploy(spec("sleep", "600", node="worker-2"))

    _set_availability(swarm, "worker-2", "drain")
    try:
        lost = history.until(A, "lost")
    finally:
        _set_availability(swarm, "worker-2", "active")

    assert lost.reason == "the swarm ended it, as when node worker-2 is drained"


# images
def test_missing_image_and_missing_registry_are_told_apart(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, home: str
) -> None:
    orchestrator = open_swarm()
    digest = "sha256:" + "0" * 64

    with pytest.raises(FailedError, match=f"service {A} cannot start: image .* cannot be pulled: .*unknown"):
        orchestrator.deploy(spec("sleep", "600", image=f"{swarm.registry}/flops-test@{digest}"))
    with pytest.raises(UnavailableError, match="connection refused"):
        orchestrator.deploy(spec("sleep", "600", image=f"{swarm.host}:5999/flops-test@{digest}"))

    assert orchestrator.list() == []
    _wait(lambda: things_of(swarm, home) == {})


def test_node_that_dies_while_it_pulls_fails_the_deployment(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, home: str
) -> None:
    orchestrator = open_swarm()
    worker = swarm.node("worker-2")
    elsewhere = _other_image(swarm)
    with swarm.stalled_registry():
        killer = _later(2.0, worker.kill)
        with pytest.raises(UnavailableError) as caught:
            orchestrator.deploy(spec("sleep", "600", node="worker-2", image=elsewhere))
        killer.join()
    worker.start()

    assert str(caught.value) == (
        f"service {A} cannot start: node worker-2 is down - start it, or choose another"
    )
    assert orchestrator.list() == []
    _wait(lambda: all(node.ready for node in orchestrator.nodes()))
    orchestrator.deploy(spec("sleep", "600", node="worker-2", image=elsewhere))
    assert only(orchestrator).state == "running"


def _other_image(swarm: PrivateSwarm) -> str:
    return swarm.publish("flops-other", {"purpose": "nobody has pulled it yet"})


def _later(seconds: float, action: Callable[[], None]) -> Any:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


# nodes that die
def test_services_of_a_dead_node_are_lost_and_end_when_it_comes_back(
    swarm: PrivateSwarm, open_swarm: OpenSwarm, spec: Any, watch: Any, home: str
) -> None:
    orchestrator = open_swarm()
    history = watch(orchestrator)
    worker = swarm.node("worker-2")
    for name, node in ((A, "worker-2"), (B, "worker-1")):
        orchestrator.deploy(spec("sleep", "600", name=name, node=node, restart="on-failure"))
        history.until(name, "running")

    worker.kill()
    killed_at = time.monotonic()
    lost = history.until(A, "lost")

    assert time.monotonic() - killed_at < 15
    assert (lost.reason, lost.exit_code, lost.node) == ("node worker-2 is down", None, "worker-2")
    assert [node.ready for node in orchestrator.nodes()] == [True, True, False]
    assert orchestrator.logs(A) == ""
    assert [status.state for status in orchestrator.list()] == ["lost", "running"]
    orchestrator.deploy(spec("sleep", "600", node="manager"))
    moved = history.until(A, "running")
    assert (moved.node, moved.restarts) == ("manager", 0)
    worker.start()
    _wait(lambda: all(node.ready for node in orchestrator.nodes()))
    time.sleep(2.0)  # it would start now, if Swarm still wanted it to run
    assert worker.containers({"flops.home": home}) == []
    orchestrator.deploy(spec("sleep", "600", name="another", node="worker-2"))
    assert {status.state for status in orchestrator.list()} == {"running"}


def test_services_survive_the_death_of_the_swarms_manager(
    swarm: PrivateSwarm,
    open_swarm: OpenSwarm,
    spec: Any,
    watch: Any,
    home: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    orchestrator = open_swarm()
    history = watch(orchestrator)
    orchestrator.deploy(spec("sleep", "600", node="worker-1"))
    script = "sleep 3; exit 4"
    orchestrator.deploy(spec("/bin/sh", "-c", script, name=B, node="worker-1"))
    before = container_of(swarm.node("worker-1"), home, A)["Id"]

    swarm.manager.kill()
    try:
        _wait(lambda: _is_away(orchestrator))
        with pytest.raises(UnavailableError, match=r"the Docker engine at .* does not answer"):
            orchestrator.deploy(spec("sleep", "600", name="another"))
        with pytest.raises(UnavailableError):
            orchestrator.stop(A)
    finally:
        swarm.manager.start()

    _wait(lambda: not _is_away(orchestrator))  # and workers may take twenty seconds to come back to it
    _wait(lambda: [status.state for status in orchestrator.list()] == ["running", "failed"])
    failed = history.until(B, "failed")
    assert (failed.exit_code, failed.reason) == (4, "exit code 4")
    assert "answers again" in caplog.text
    assert container_of(swarm.node("worker-1"), home, A)["Id"] == before
    orchestrator.stop(A)
    _wait(lambda: all(node.ready for node in orchestrator.nodes()))


def _is_away(orchestrator: SwarmOrchestrator) -> bool:
    try:
        orchestrator.list()
    except UnavailableError:
        return True
    return False


# managers that come and go
def test_next_manager_adopts_what_runs_and_learns_what_ended(
    open_swarm: OpenSwarm, spec: Any, swarm: PrivateSwarm, home: str
) -> None:
    first = open_swarm()
    first.deploy(spec("sleep", "600", node="worker-1", port=7301, publish=True, files=(File("f", b"x"),)))
    first.deploy(spec("/bin/sh", "-c", "echo here; sleep 2; exit 3", name=B, node="worker-2"))
    before = first.list()
    first.close()
    assert [status.state for status in before] == ["running", "running"]
    _wait(lambda: swarm.node("worker-2").containers({"flops.home": home}) == [])

    second = open_swarm()

    assert second.list()[0] == before[0]
    _wait(lambda: second.list()[1].state != "running")  # its node tells the swarm some time after the end
    ended = second.list()[1]
    assert (ended.state, ended.exit_code, ended.reason) == ("failed", 3, "exit code 3")
    assert second.logs(B) == "here\n"
    second.deploy(spec("sleep", "600", node="worker-1", port=7301, publish=True, files=(File("f", b"x"),)))
    assert second.list()[0] == before[0]
    with pytest.raises(ConflictError, match="with another spec"):
        second.deploy(spec("sleep", "600", node="worker-1", port=7301, publish=True))
    second.close()
    assert [status.state for status in open_swarm().list()] == ["running", "failed"]


def test_restart_that_was_due_when_the_manager_left_takes_place(
    open_swarm: OpenSwarm, spec: Any, watch: Any
) -> None:
    first = open_swarm(backoff_s=30.0)
    history = watch(first)
    first.deploy(spec("/bin/sh", "-c", "sleep 0.5; exit 5", restart="on-failure", max_restarts=1))
    pending = history.until(A, "pending")
    assert pending.reason == "exit code 5; restart 1 of 1 in 30 s"
    _wait(lambda: not any(service.unsaved for service in first._services.values()))
    first.close()

    second = open_swarm()
    history = watch(second)

    failed = history.until(A, "failed")
    assert (failed.restarts, failed.reason) == (1, "exit code 5; given up after 1 restarts")


def test_stop_that_was_interrupted_is_completed(
    open_swarm: OpenSwarm, spec: Any, swarm: PrivateSwarm, home: str
) -> None:
    first = open_swarm()
    first.deploy(spec("sleep", "600"))
    service = first._services[A]
    with first._orders:
        first._ask_to_end(service)
    first.close()

    second = open_swarm()

    _wait(lambda: only(second).state == "exited")
    assert only(second).reason == "stopped"


def test_service_that_nobody_can_read_is_removed(
    open_swarm: OpenSwarm, spec: Any, swarm: PrivateSwarm, home: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_swarm()
    first.deploy(spec("sleep", "600"))
    first.close()
    with swarm.manager.client() as client:
        api: Any = client
        (service,) = api.services(filters=Names(home).mine())
        labels = service["Spec"]["Labels"] | {objects.DEPLOYMENT: '{"format": 1, "spe'}
        api.update_service(
            service["ID"],
            service["Version"]["Index"],
            task_template=service["Spec"]["TaskTemplate"],
            name=service["Spec"]["Name"],
            labels=labels,
            mode=service["Spec"]["Mode"],
            endpoint_spec=service["Spec"]["EndpointSpec"],
        )

    second = open_swarm()

    assert second.list() == []
    assert "its label cannot be read" in caplog.text
    _wait(lambda: things_of(swarm, home) == {})


def test_engine_that_manages_no_swarm_is_refused(
    swarm: PrivateSwarm, docker_engine: PrivateEngine, tmp_path: Path
) -> None:
    with pytest.raises(FailedError, match="is in no swarm - 'docker swarm init' makes one"):
        SwarmOrchestrator(docker_engine.url, tmp_path)
    with pytest.raises(FailedError, match="is not a manager of its swarm"):
        SwarmOrchestrator(swarm.node("worker-1").url, tmp_path)


def test_other_homes_are_left_alone(
    open_swarm: OpenSwarm, spec: Any, swarm: PrivateSwarm, tmp_path: Path
) -> None:
    first = open_swarm()
    first.deploy(spec("sleep", "600", files=(File("f", b"x"),)))

    with closing(SwarmOrchestrator(swarm.manager.url, tmp_path / "other", python=PYTHON)) as other:
        assert other.list() == []
        assert other.host == swarm.manager.address
        other.deploy(spec("sleep", "600"))
        other.remove_project("p-test")

    assert only(first).state == "running"
    assert len(things_of(swarm, home_id(tmp_path))["secrets"]) == 1


# words
def test_names_fit_swarm_and_stay_apart() -> None:
    names = Names("0123456789ab")
    long, other = "p-" + "a" * 57 + "1", "p-" + "a" * 57 + "2"

    assert objects.name_of(names, "short") == "flops-0123456789ab-short"
    assert len(objects.name_of(names, long)) == 63
    assert objects.name_of(names, long) != objects.name_of(names, other)


def test_longest_name_can_run_alone(open_swarm: OpenSwarm, spec: Any) -> None:
    orchestrator = open_swarm()
    name = "p-" + "a" * 58

    orchestrator.deploy(spec("sleep", "600", name=name, network="none"))

    assert (only(orchestrator).name, only(orchestrator).state) == (name, "running")


def test_nodes_with_one_host_name_are_told_apart() -> None:
    def node(number: str, addr: str) -> dict[str, Any]:
        return {
            "ID": number * 10,
            "Spec": {"Labels": None, "Availability": "active"},
            "Status": {"State": "ready", "Addr": addr},
            "Description": {
                "Hostname": "twin",
                "Platform": {"OS": "linux", "Architecture": "aarch64"},
                "Resources": {"NanoCPUs": 4_000_000_000, "MemoryBytes": 8_000_000_000},
                "Engine": {},
            },
        }

    first = node("a", "0.0.0.0") | {"ManagerStatus": {"Addr": "10.0.0.1:2377"}}
    nodes = objects.nodes_of([first, node("b", "10.0.0.2")])

    assert nodes["a" * 10] == Node("twin-aaaaaaaa", "linux/arm64", 4, 8000, address="10.0.0.1")
    assert nodes["b" * 10].name == "twin-bbbbbbbb"


def test_log_of_a_service_is_that_of_its_attempts_in_their_order() -> None:
    def task(number: int) -> Task:
        return Task(f"t{number}", "s", "", "n", "failed", "", 1, True, 0.0, created=f"2026-01-0{number}")

    def message(number: int, text: bytes) -> bytes:
        return b"com.docker.swarm.node.id=n,com.docker.swarm.service.id=s,com.docker.swarm.task.id=t%d %s" % (
            number,
            text,
        )

    messages = [
        message(2, b"third\n"),
        message(1, b"first\n"),
        b"error from daemon in stream: some logs could not be retrieved\n",
        message(1, b"second com.docker.swarm.task.id=t9 \n"),
        message(2, b""),
    ]
    assert objects.log_of(messages, [task(2), task(1)]) == (
        b"first\nsecond com.docker.swarm.task.id=t9 \nthird\n"
    )


def test_label_says_what_the_next_manager_has_to_know() -> None:
    names = Names("0123456789ab")
    spec = ServiceSpec(
        A,
        ("serve",),
        "agent",
        "p-test",
        image="x",
        memory_mb=5,
        environment={"TOKEN": "sesame"},
        restart="on-failure",
    )
    deployment = Deployment.of(spec)

    labels = objects.labels_of(names, deployment)

    assert objects.deployment_in(labels[objects.DEPLOYMENT]) == deployment
    assert "sesame" not in json.dumps(labels)


def _wait(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.1)
