"""The `docker` adapter with a real engine: what containers may, and what survives whose end."""

import http.server
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import docker
import pytest

from flops.core.errors import (
    ConflictError,
    FailedError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from flops.core.ids import ServiceName
from flops.orchestration import File, ServiceSpec, ServiceStatus, Volume
from flops.orchestration.containers import Engine, Names, exit_code_of, fingerprint, home_id, last_lines
from flops.orchestration.docker import DockerOrchestrator
from tests.conftest import Require
from tests.engines import ARM64_IMAGE, IMAGE, PrivateEngine, can_run_engines, private_engine

pytestmark = pytest.mark.docker

A, B, C = ServiceName("p-test-agent-1"), ServiceName("p-test-agent-2"), ServiceName("p-test-agent-3")

WaitUntil = Callable[[Callable[[], bool]], None]

# Listens on port 8000 and answers everything with the name of its machine.
SERVER = """
import http.server, socket
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = socket.gethostname().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
server = http.server.HTTPServer(("0.0.0.0", 8000), Handler)
print("ready", flush=True)
server.serve_forever()
"""

# Tries to reach each HOST:PORT it is given, and says what became of that.
CALLER = """
import socket, sys
for place in sys.argv[1:]:
    host, port = place.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
        print(place, "answers")
    except OSError as error:
        print(place, "does not:", type(error).__name__)
print("interfaces", sorted(name for _, name in socket.if_nameindex()))
"""

# A manager: deploys the services given as JSON, says so, and waits for its end.
MANAGER = """
import json, sys, time
from pathlib import Path
from flops.orchestration import File, ServiceSpec
from flops.orchestration.docker import DockerOrchestrator
folder, home, url = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
orchestrator = DockerOrchestrator(folder / "state", folder / "logs", home=home, url=url, backoff_s=60)
for service in json.loads(sys.argv[4]):
    name, command = service.pop("name"), tuple(service.pop("command"))
    orchestrator.deploy(ServiceSpec(name, command, "agent", "p-test", **service))
print("deployed", flush=True)
time.sleep(600)
"""


def spec(*command: str, name: str = A, project: str = "p-test", **more: Any) -> ServiceSpec:
    more = {"image": IMAGE} | more
    return ServiceSpec(ServiceName(name), command, "agent", project, **more)


def shell(script: str, name: str = A, **more: Any) -> ServiceSpec:
    return spec("/bin/sh", "-c", script, name=name, **more)


def only(orchestrator: DockerOrchestrator) -> ServiceStatus:
    (status,) = orchestrator.list()
    return status


class Site:
    """One FLOPS_HOME on an engine, with a look behind the scenes."""

    def __init__(self, engine: PrivateEngine, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        self.home = secrets.token_hex(4)
        self.names = Names(self.home)
        self._opened: list[DockerOrchestrator] = []
        self._client: docker.APIClient | None = None

    @property
    def client(self) -> docker.APIClient:
        if self._client is None:
            self._client = self.engine.client()
        return self._client

    def open(self, **more: Any) -> DockerOrchestrator:
        more = {"backoff_s": 0.02} | more
        self._opened.append(
            DockerOrchestrator(
                self.folder / "state", self.folder / "logs", home=self.home, url=self.engine.url, **more
            )
        )
        return self._opened[-1]

    def containers(self) -> list[dict[str, Any]]:
        return list(self.client.containers(all=True, filters=self.names.mine()))

    def details(self, name: str = A) -> dict[str, Any]:
        (container,) = [c for c in self.containers() if c["Labels"]["flops.service"] == name]
        details: dict[str, Any] = self.client.inspect_container(container["Id"])
        return details

    def volumes(self) -> list[str]:
        return sorted(v["Name"] for v in self.client.volumes(filters=self.names.mine())["Volumes"] or [])

    def networks(self) -> list[str]:
        return sorted(n["Name"] for n in self.client.networks(filters=self.names.mine()))

    def run_killed_manager(self, *services: dict[str, Any]) -> None:
        """A manager deploys the services and dies of kill -9."""
        services = tuple({"image": IMAGE} | service for service in services)
        words = [str(self.folder), self.home, self.engine.url, json.dumps(services)]
        with subprocess.Popen([sys.executable, "-c", MANAGER, *words], stdout=subprocess.PIPE) as manager:
            assert manager.stdout is not None
            assert manager.stdout.readline() == b"deployed\n"
            manager.kill()

    def close(self) -> None:
        for orchestrator in self._opened:
            orchestrator.close()
        for container in self.containers():
            self.client.remove_container(container["Id"], force=True, v=True)
        for network in self.networks():
            self.client.remove_network(network)
        for volume in self.volumes():
            self.client.remove_volume(volume)
        if self._client is not None:
            self._client.close()


@pytest.fixture
def site(docker_engine: PrivateEngine, tmp_path: Path) -> Iterator[Site]:
    with closing(Site(docker_engine, tmp_path)) as site:
        yield site


@pytest.fixture(scope="module")
def mortal_engine(require: Require) -> Iterator[PrivateEngine]:
    """An engine that tests may end and start; it has room for four networks, one of them for this machine."""
    require(can_run_engines(), "a Docker engine that we may start (root, docker.io, Debian's python3)")
    with private_engine(["--default-address-pool", "base=10.214.77.0/27,size=29"]) as engine:
        yield engine


@pytest.fixture
def mortal_site(mortal_engine: PrivateEngine, tmp_path: Path) -> Iterator[Site]:
    with closing(Site(mortal_engine, tmp_path)) as site:
        yield site


def ended(orchestrator: DockerOrchestrator, history: Any, wanted: ServiceSpec) -> str:
    """Run a service to its good end; what it printed."""
    orchestrator.deploy(wanted)
    status = history.until(wanted.name, "exited")
    assert status.exit_code == 0
    return orchestrator.logs(wanted.name)


# confinement
def test_service_has_no_rights_and_a_root_it_cannot_write_to(site: Site, watch: Any) -> None:
    orchestrator = site.open()
    script = (
        "id -u; id -g; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; touch /x; touch /run/x;"
        " cp /bin/echo /tmp/own; /tmp/own $HOME; head -c 80000000 /dev/zero > /tmp/large;"
        " echo $COLOUR $PWD; exit 0"
    )

    log = ended(orchestrator, watch(orchestrator), shell(script, environment={"COLOUR": "blue"}))

    assert log.startswith("10001\n10001\n")
    assert "CapEff:\t0000000000000000" in log
    assert "CapBnd:\t0000000000000000" in log
    assert "NoNewPrivs:\t1" in log
    assert "cannot touch '/x': Read-only file system" in log
    assert "cannot touch '/run/x': Read-only file system" in log
    assert "\n/tmp\n" in log
    assert "No space left on device" in log
    assert "blue /\n" in log  # the engine reads its two streams apart: their order is not told
    host = site.details()["HostConfig"]
    assert host["PidsLimit"] == 4096
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["LogConfig"]["Config"] == {"max-size": "5m", "max-file": "2"}


def test_memory_limit_kills_and_is_named(site: Site, watch: Any) -> None:
    orchestrator = site.open()
    history = watch(orchestrator)
    hungry = spec("python3", "-c", "b'x' * 100_000_000", memory_mb=32, restart="on-failure", max_restarts=1)

    orchestrator.deploy(hungry)

    pending = history.until(A, "pending")
    assert pending.reason == "killed by its memory limit (32 MB); restart 1 of 1 in 0.02 s"
    assert pending.exit_code == -9
    assert history.until(A, "running").reason == "restarted after killed by its memory limit (32 MB)"
    assert (
        history.until(A, "failed").reason == "killed by its memory limit (32 MB); given up after 1 restarts"
    )
    assert site.details()["HostConfig"]["MemorySwap"] == 32_000_000


def test_cpus_are_limited_by_the_kernel(site: Site, watch: Any) -> None:
    orchestrator = site.open()
    script = (
        "cd /sys/fs/cgroup; test -e cpu.max && exec cat cpu.max;"
        " exec cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us"
    )

    log = ended(orchestrator, watch(orchestrator), shell(script, cpus=0.25))

    assert log.split() == ["25000", "100000"]


def test_more_cpus_than_there_are_is_all_of_them(site: Site) -> None:
    orchestrator = site.open()

    orchestrator.deploy(shell("sleep 600", cpus=4096.0))

    assert site.details()["HostConfig"]["NanoCpus"] == orchestrator.nodes()[0].cpus * 10**9


def test_containers_that_step_aside_weigh_less(site: Site) -> None:
    site.open().deploy(shell("sleep 600", nice=10))

    assert site.details()["HostConfig"]["CpuShares"] == 110  # of 1024; the kernel's own weight of nice 10


# files and volumes
def test_files_are_the_services_alone(site: Site, watch: Any) -> None:
    orchestrator = site.open()
    history = watch(orchestrator)
    secret = secrets.token_hex(16)
    script = (
        "stat -c '%n %u %g %a' /run/secrets /run/secrets/*; cat /run/secrets/key.pem; echo;"
        " touch /run/secrets/x"
    )

    orchestrator.deploy(
        shell(
            f"{script}; test -e /tmp/never || exec sleep 600",
            files=(File("config.json", b"{}"), File("key.pem", secret.encode())),
        )
    )
    while "Read-only file system" not in orchestrator.logs(A):
        time.sleep(0.01)

    log = orchestrator.logs(A)
    assert "/run/secrets 10001 10001 700" in log
    assert "/run/secrets/config.json 10001 10001 400" in log
    assert "/run/secrets/key.pem 10001 10001 400" in log
    assert secret in log
    assert "cannot touch '/run/secrets/x': Read-only file system" in log
    assert secret not in json.dumps(site.details())
    assert not [path for path in (site.folder / "state").iterdir() if secret in path.read_text()]
    (volume,) = site.volumes()
    orchestrator.remove(A)
    history.until(A, "exited")
    assert site.volumes() == []
    assert not (site.engine.folder / "data" / "volumes" / volume).exists()


def test_volumes_belong_to_the_services_user_and_are_shared_by_name(site: Site, watch: Any) -> None:
    orchestrator = site.open()
    history = watch(orchestrator)
    mine = Volume("p-test-agent-1-state", "/var/lib/flops")
    shared = Volume("flops-data-run", "/srv/not/in/the/image")
    ended(
        orchestrator,
        history,
        shell(
            "set -e; stat -c '%u %g %a' /var/lib/flops /srv/not/in/the/image; echo one > /var/lib/flops/one;"
            " echo two > /srv/not/in/the/image/two",
            volumes=(mine, shared),
        ),
    )
    assert orchestrator.logs(A) == "10001 10001 700\n10001 10001 700\n"
    orchestrator.remove(A)

    log = ended(
        orchestrator,
        history,
        shell(
            "set -e; cat /data/one; cat /run/flops/two; rm /data/one",
            name=B,
            volumes=(Volume("p-test-agent-1-state", "/data"), Volume("flops-data-run", "/run/flops")),
        ),
    )

    assert log == "one\ntwo\n"
    orchestrator.remove_project("p-test")
    assert site.volumes() == [site.names.of("flops-data-run")]


def test_project_leaves_nothing_behind(site: Site, watch: Any) -> None:
    orchestrator = site.open()
    files = (File("a", b"b"),)
    orchestrator.deploy(shell("sleep 600", files=files, volumes=(Volume("p-test-x", "/v"),)))
    orchestrator.deploy(shell("sleep 600", name="p-test2-agent-1", project="p-test2", files=files))

    orchestrator.remove_project("p-test")
    orchestrator.remove_project("p-test")

    assert [status.project for status in orchestrator.list()] == ["p-test2"]
    assert len(site.containers()) == 1
    assert len(site.volumes()) == 1
    assert site.names.of("p-test") not in site.networks()
    orchestrator.remove_project("p-test2")
    assert (site.containers(), site.volumes()) == ([], [])
    assert site.networks() == []
    assert list((site.folder / "state").iterdir()) == []


# networks
def test_services_reach_those_of_their_project_and_this_machine(site: Site, watch: Any) -> None:
    orchestrator = site.open()
    history = watch(orchestrator)
    server = spec("python3", "-c", SERVER, port=8000)
    stranger = spec("python3", "-c", SERVER, name="p-else-agent-1", project="p-else", port=8000)
    for each in (server, stranger):
        orchestrator.deploy(each)
        wait_for_log(orchestrator, each.name, "ready")
    assert orchestrator.address(server) == "p-test-agent-1:8000"

    with socket.create_server((orchestrator.host, 0)) as listener:
        here = f"{orchestrator.host}:{listener.getsockname()[1]}"
        places = [orchestrator.address(server), orchestrator.address(stranger), here]
        log = ended(orchestrator, history, spec("python3", "-c", CALLER, *places, name=B))
        alone = ended(orchestrator, history, spec("python3", "-c", CALLER, *places, name=C, network="none"))

    assert log.splitlines()[:3] == [
        f"{places[0]} answers",
        f"{places[1]} does not: gaierror",
        f"{here} answers",
    ]
    assert alone.count("does not") == 3
    assert "interfaces ['lo']" in alone


def test_published_service_is_reached_from_here_only(site: Site, watch: Any, wait_until: WaitUntil) -> None:
    orchestrator = site.open()
    history = watch(orchestrator)

    orchestrator.deploy(
        spec("python3", "-c", SERVER, port=8000, publish=True, restart="on-failure", max_restarts=1)
    )

    wait_for_log(orchestrator, A, "ready")
    status = history.until(A, "running")
    assert status.endpoint is not None
    assert status.endpoint.startswith("127.0.0.1:")
    assert fetch(status.endpoint) == A
    assert status.pid is not None
    os.kill(status.pid, 9)
    again = history.until(A, "running")
    assert (again.restarts, again.endpoint) == (1, only(orchestrator).endpoint)
    wait_until(lambda: answers(str(again.endpoint)))
    orchestrator.stop(A)
    assert only(orchestrator).endpoint is None
    assert not answers(str(again.endpoint))


def fetch(endpoint: str) -> str:
    with urllib.request.urlopen(f"http://{endpoint}", timeout=10) as answer:
        return str(answer.read().decode())


def answers(endpoint: str) -> bool:
    try:
        return bool(fetch(endpoint))
    except OSError:
        return False


def wait_for_log(orchestrator: DockerOrchestrator, name: ServiceName, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in (log := orchestrator.logs(name)):
        assert time.monotonic() < deadline, log
        time.sleep(0.02)


def test_networks_of_ended_projects_make_room(mortal_site: Site, watch: Any) -> None:
    orchestrator = mortal_site.open()  # an engine without a default bridge: one range is for this machine
    history = watch(orchestrator)
    projects = ["p-1", "p-2", "p-3"]
    for project in projects:
        orchestrator.deploy(shell("sleep 600", name=f"{project}-agent-1", project=project))

    with pytest.raises(UnavailableError, match="has no range of addresses left - remove ended projects"):
        orchestrator.deploy(shell("sleep 600", name="p-4-agent-1", project="p-4"))
    assert [status.project for status in orchestrator.list()] == projects
    orchestrator.stop(ServiceName("p-2-agent-1"))
    orchestrator.deploy(shell("sleep 600", name="p-4-agent-1", project="p-4"))

    assert history.until("p-4-agent-1", "running").project == "p-4"
    names = [mortal_site.names.of(part) for part in ("host", "p-1", "p-3", "p-4")]
    assert mortal_site.networks() == names


# what cannot be deployed
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (spec("true", image=None), f"service {A} has no image, and this orchestrator runs nothing else"),
        (spec("true", node="elsewhere"), f"service {A} is to run on node elsewhere, and there is only"),
        (spec("true", network="none", port=80, publish=True), f"service {A} is published and has no network"),
    ],
)
def test_spec_for_another_orchestrator_is_refused(site: Site, wanted: ServiceSpec, message: str) -> None:
    orchestrator = site.open()

    with pytest.raises(InvalidInputError, match=message):
        orchestrator.deploy(wanted)

    assert orchestrator.list() == []


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("no-such-program",), "No such file or directory"),
        (("/etc",), "Permission denied"),
        (("/usr/lib/python3.11/os.py",), "Permission denied"),
    ],
)
def test_program_that_cannot_run_is_named(site: Site, command: tuple[str, ...], reason: str) -> None:
    orchestrator = site.open()

    with pytest.raises(FailedError, match=f"cannot start '{command[0]}': {reason} - check that it is in"):
        orchestrator.deploy(spec(*command, files=(File("a", b"b"),), volumes=(Volume("v", "/v"),)))

    assert (orchestrator.list(), site.containers()) == ([], [])
    assert not [name for name in site.volumes() if name.endswith("-files")]
    assert site.names.of("p-test") not in site.networks()


def test_image_for_another_platform_is_refused(site: Site) -> None:
    orchestrator = site.open()

    with pytest.raises(FailedError, match=f"image {ARM64_IMAGE} is for linux/arm64, the engine at .* runs"):
        orchestrator.deploy(spec("true", image=ARM64_IMAGE))

    assert (orchestrator.list(), site.containers()) == ([], [])


def test_limit_below_what_the_engine_can_do_is_a_failure(site: Site) -> None:
    orchestrator = site.open()

    with pytest.raises(FailedError, match="Minimum memory limit allowed is 6MB"):
        orchestrator.deploy(shell("sleep 600", memory_mb=1))

    assert (orchestrator.list(), site.containers()) == ([], [])


@contextmanager
def image_registry(folder: Path) -> Iterator[str]:
    """Debian's docker-registry on a free port; its host and port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
        "http": {"addr": place},
        "log": {"level": "error"},
    }
    (folder / "registry.json").write_text(json.dumps(settings))
    with (
        (folder / "registry.log").open("wb") as log,
        subprocess.Popen(
            ["docker-registry", "serve", str(folder / "registry.json")], stdout=log, stderr=log
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 20
            while not answers(f"{place}/v2/"):
                assert time.monotonic() < deadline, (folder / "registry.log").read_text()
                time.sleep(0.02)
            yield place
        finally:
            process.terminate()


def test_images_are_pulled_by_digest_from_a_registry_also_ahead_of_time(
    site: Site, watch: Any, wait_until: WaitUntil, tmp_path: Path, require: Require
) -> None:
    require(Path("/usr/bin/docker-registry").exists(), "docker-registry")
    orchestrator = site.open()
    history = watch(orchestrator)
    with image_registry(tmp_path) as place:
        repository = f"{place}/flops/test"
        site.client.tag(IMAGE, repository, "1")
        pushed = [*site.client.push(repository, "1", stream=True, decode=True)]
        digest = next(line["aux"]["Digest"] for line in pushed if "aux" in line)
        site.client.remove_image(f"{repository}:1")
        with suppress(docker.errors.ImageNotFound):
            site.client.remove_image(f"{repository}@{digest}")
        missing = f"{repository}@sha256:{'0' * 64}"

        orchestrator.expect(missing)
        orchestrator.expect(f"{repository}@{digest}")
        wait_until(lambda: digest in str(site.client.images(repository)))
        site.client.remove_image(f"{repository}@{digest}")
        assert ended(orchestrator, history, shell("echo hi", image=f"{repository}@{digest}")) == "hi\n"

        with pytest.raises(FailedError, match=f"image {missing} cannot be pulled: .*unknown.* - check"):
            orchestrator.deploy(shell("echo hi", name=B, image=missing))
    with pytest.raises(UnavailableError, match=f"image {missing} cannot be pulled now: .*connection refused"):
        orchestrator.deploy(shell("echo hi", name=B, image=missing))

    assert [status.name for status in orchestrator.list()] == [A]
    orchestrator.remove(A)
    site.client.remove_image(f"{repository}@{digest}")


DOCKER = "application/vnd.docker"


class StallingRegistry(http.server.BaseHTTPRequestHandler):
    """A registry whose only image has a layer that never comes."""

    stalled = threading.Event()

    def do_GET(self) -> None:
        def blob(kind: str, digit: str) -> dict[str, Any]:
            return {"mediaType": f"{DOCKER}.{kind}", "size": 9, "digest": f"sha256:{digit * 64}"}

        kind = f"{DOCKER}.distribution.manifest.v2+json"
        config, layer = blob("container.image.v1+json", "1"), blob("image.rootfs.diff.tar.gzip", "2")
        manifest = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]}
        if "/blobs/" in self.path:
            self.stalled.wait(60)
        body = json.dumps(manifest).encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Into nobody's terminal."""


def test_pull_that_comes_to_a_standstill_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    orchestrator = site.open()
    monkeypatch.setattr("flops.orchestration.containers._PULL_SILENCE_S", 1.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), StallingRegistry) as registry:
        registry.daemon_threads = True
        threading.Thread(target=registry.serve_forever, daemon=True).start()
        image = f"127.0.0.1:{registry.server_port}/stalls:1"

        with pytest.raises(UnavailableError, match=f"image {image}.*timed out"):
            orchestrator.deploy(shell("echo hi", image=image))

        StallingRegistry.stalled.set()
        registry.shutdown()
    assert orchestrator.list() == []


# ends
def test_service_that_ignores_the_request_is_killed_and_another_has_its_time(site: Site, watch: Any) -> None:
    orchestrator = site.open()
    history = watch(orchestrator)
    orchestrator.deploy(shell("trap '' TERM; echo ready; while true; do sleep 1; done"))
    orchestrator.deploy(
        shell("trap 'echo bye; exit 0' TERM; echo ready; while true; do sleep 0.1; done", name=B)
    )
    wait_for_log(orchestrator, A, "ready")
    wait_for_log(orchestrator, B, "ready")

    orchestrator.stop_many([A, B], grace_s=1.5)

    statuses = {status.name: status for status in orchestrator.list()}
    assert (statuses[A].state, statuses[A].reason, statuses[A].exit_code) == ("exited", "stopped", -9)
    assert (statuses[B].state, statuses[B].reason, statuses[B].exit_code) == ("exited", "stopped", 0)
    assert orchestrator.logs(B) == "ready\nbye\n"
    history.until(A, "exited")


def test_pauses_between_restarts_grow(site: Site, watch: Any) -> None:
    orchestrator = site.open(backoff_s=0.1)
    history = watch(orchestrator)

    orchestrator.deploy(shell("exit 4", restart="on-failure", max_restarts=3))

    reasons = [history.until(A, "pending").reason for _ in range(3)]
    assert reasons == [
        "exit code 4; restart 1 of 3 in 0.1 s",
        "exit code 4; restart 2 of 3 in 0.2 s",
        "exit code 4; restart 3 of 3 in 0.4 s",
    ]
    assert history.until(A, "failed").reason == "exit code 4; given up after 3 restarts"


def test_stop_between_two_attempts_is_the_end(site: Site, watch: Any) -> None:
    orchestrator = site.open(backoff_s=60.0)
    history = watch(orchestrator)
    orchestrator.deploy(shell("exit 4", restart="on-failure"))
    history.until(A, "pending")

    orchestrator.stop(A)

    assert history.until(A, "exited").reason == "stopped"


def test_container_that_somebody_removed_is_lost(site: Site, watch: Any) -> None:
    orchestrator = site.open()
    history = watch(orchestrator)
    orchestrator.deploy(shell("sleep 600"))

    site.client.remove_container(site.details()["Id"], force=True)

    while (status := history.next()).state not in ("lost", "failed"):
        pass
    if status.state == "failed":  # its end was seen before it was gone
        assert status.reason == "killed by SIGKILL"
    else:
        assert (status.reason, status.exit_code) == ("its container was removed by somebody", None)
    orchestrator.stop(A)
    assert orchestrator.logs(A) == ""
    orchestrator.deploy(shell("sleep 600"))
    orchestrator.remove(A)
    assert site.containers() == []


def test_stop_of_a_service_that_is_being_started_ends_it(site: Site, wait_until: WaitUntil) -> None:
    orchestrator = site.open()
    deploying = threading.Thread(target=lambda: orchestrator.deploy(shell("sleep 600")))
    deploying.start()
    wait_until(lambda: bool(orchestrator.list()))

    orchestrator.stop(A)

    deploying.join()
    assert (only(orchestrator).state, only(orchestrator).reason) == ("exited", "stopped")
    assert [container["State"] for container in site.containers()] == ["exited"]


def test_deployments_of_one_service_at_once_are_one(site: Site) -> None:
    orchestrator = site.open()
    failures: list[FlopsError] = []

    def deploy() -> None:
        try:
            orchestrator.deploy(shell("sleep 600"))
        except FlopsError as error:
            failures.append(error)

    threads = [threading.Thread(target=deploy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert len(site.containers()) == 1
    with pytest.raises(ConflictError):
        orchestrator.deploy(shell("sleep 601"))


def test_log_goes_on_over_deployments_and_its_tail_is_whole_lines(site: Site, watch: Any) -> None:
    orchestrator = site.open()
    history = watch(orchestrator)
    ended(orchestrator, history, shell("echo first; sleep 0.5; echo oh >&2"))
    assert ended(orchestrator, history, shell("echo second")) == "first\noh\nsecond\n"
    assert len(site.containers()) == 1

    many = "i=0; while test $i -lt 9000; do echo line $i; i=$((i+1)); done"
    ended(orchestrator, history, shell(many))

    assert orchestrator.logs(A, tail_bytes=20) == "line 8999\n"
    assert len(orchestrator.logs(A)) in range(65500, 65537)
    assert orchestrator.logs(A, tail_bytes=10**6).startswith("first\noh\nsecond\nline 0\n")
    assert (site.folder / "logs" / f"{A}.log").stat().st_mode & 0o777 == 0o600


# what survives
def test_next_manager_adopts_what_the_killed_one_left(site: Site, watch: Any) -> None:
    site.run_killed_manager(
        {"name": A, "command": ["sh", "-c", "echo here; exec sleep 600"]},
        {"name": B, "command": ["sh", "-c", "sleep 0.5; exit 3"]},
    )
    time.sleep(1.0)

    orchestrator = site.open()
    history = watch(orchestrator)

    first, second = orchestrator.list()
    assert first.state == "running"
    assert first.pid is not None
    assert (second.state, second.exit_code, second.reason) == ("failed", 3, "exit code 3")
    orchestrator.deploy(spec("sh", "-c", "echo here; exec sleep 600"))  # the same: nothing happens
    assert orchestrator.list() == [first, second]
    orchestrator.stop(A)
    assert history.until(A, "exited").reason == "stopped"
    assert orchestrator.logs(A) == "here\n"


def test_restart_that_was_due_when_the_manager_died_takes_place(site: Site, watch: Any) -> None:
    site.run_killed_manager(
        {"name": A, "command": ["sh", "-c", "exit 4"], "restart": "on-failure", "max_restarts": 1}
    )
    state = site.folder / "state" / f"{A}.json"
    recorded = json.loads(state.read_text())
    if recorded["state"] == "running":  # it died before it saw the end
        state.write_text(json.dumps(recorded | {"state": "pending", "exit_code": 4}))

    orchestrator = site.open()
    history = watch(orchestrator)

    while only(orchestrator).state != "failed":
        history.next()
    assert only(orchestrator).reason == "exit code 4; given up after 1 restarts"


def test_stop_that_a_crash_interrupted_is_completed(site: Site, wait_until: WaitUntil) -> None:
    site.run_killed_manager({"name": A, "command": ["sh", "-c", "trap '' TERM; sleep 600; sleep 600"]})
    state = site.folder / "state" / f"{A}.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"stopping": True}))

    orchestrator = site.open()

    wait_until(lambda: only(orchestrator).state == "exited")
    assert only(orchestrator).reason == "stopped"


def test_deployment_that_a_crash_interrupted_leaves_nothing(site: Site) -> None:
    first = site.open()
    first.deploy(shell("sleep 600", files=(File("a", b"b"),)))
    first.deploy(shell("sleep 600", name=B))
    first.deploy(shell("sleep 600", name=C))
    first.close()
    folder = site.folder / "state"
    # A: recorded, never started. B: its record is not there. C: its record is unreadable.
    interrupted = {"state": "pending", "container": None, "started_at": None}
    key = secrets.token_hex(4)
    record = json.loads((folder / f"{A}.json").read_text()) | interrupted | {"key": key}
    (folder / f"{A}.json").write_text(json.dumps(record))
    made = site.client.create_container_from_config(  # type: ignore[no-untyped-call]
        {"Image": IMAGE, "Cmd": ["true"], "Labels": site.names.labels(deployment=key, service=A)},
        site.names.of(A, key),
    )
    (folder / f"{B}.json").unlink()
    (folder / f"{C}.json").write_text('{"format": 1, "spe')

    second = site.open()

    assert made["Id"]
    assert second.list() == []
    assert (site.containers(), site.volumes()) == ([], [])
    assert sorted(path.name for path in folder.iterdir()) == [f"{C}.broken"]


def test_manager_killed_between_start_and_record_leaves_exactly_one_service(site: Site) -> None:
    site.run_killed_manager({"name": A, "command": ["sleep", "600"]})
    state = site.folder / "state" / f"{A}.json"
    recorded = json.loads(state.read_text())
    state.write_text(
        json.dumps(recorded | {"state": "pending", "container": None, "started_at": None, "pid": None})
    )

    status = only(site.open())

    assert (status.state, status.restarts, status.pid) == ("running", 0, site.details()["State"]["Pid"])
    assert status.started_at == pytest.approx(recorded["started_at"], abs=5)


def test_homes_on_one_engine_do_not_see_each_other(
    site: Site, docker_engine: PrivateEngine, tmp_path: Path
) -> None:
    with closing(Site(docker_engine, tmp_path / "other")) as other:
        mine, theirs = site.open(), other.open()
        mine.deploy(shell("sleep 600"))
        theirs.deploy(shell("sleep 601"))
        theirs.remove_project("p-test")

        again = site.open()

        assert only(again).state == "running"
        assert theirs.list() == []


# an engine that goes away
@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "killed"])
def test_services_are_found_again_after_the_engine_was_away(
    mortal_site: Site, watch: Any, wait_until: WaitUntil, crash: bool
) -> None:
    engine, orchestrator = mortal_site.engine, mortal_site.open()
    history = watch(orchestrator)
    volume = Volume("p-test-v", "/v")
    orchestrator.deploy(
        shell("echo up; exec sleep 600", restart="on-failure", files=(File("a", b"b"),), volumes=(volume,))
    )
    orchestrator.deploy(shell("exec sleep 600", name=B))
    for name in (A, B):
        history.until(name, "running")
    wait_for_log(orchestrator, A, "up")

    if crash:
        engine.kill()
    else:
        engine.stop()
    try:
        wait_until(lambda: is_unavailable(orchestrator.list))
        for ask in (
            lambda: orchestrator.deploy(shell("sleep 600", name=C)),
            lambda: orchestrator.stop(A),
            lambda: orchestrator.logs(B),
            orchestrator.nodes,
            mortal_site.open,
        ):
            with pytest.raises(UnavailableError, match=f"the Docker engine at {engine.url} does not answer"):
                ask()
    finally:
        engine.start()

    # A was to be stopped, so it is not tried again; B ended with the engine.
    assert history.until(A, "exited").reason == "stopped"
    wait_until(lambda: all(not status.live for status in orchestrator.list()))
    assert {status.name: status.state for status in orchestrator.list()} == {A: "exited", B: "failed"}
    orchestrator.deploy(shell("exec sleep 600", name=B))
    history.until(B, "running")
    assert orchestrator.logs(A) == "up\n"
    orchestrator.remove_project("p-test")
    assert (mortal_site.containers(), mortal_site.volumes()) == ([], [])


def test_services_that_may_are_started_again_after_the_engine_was(mortal_site: Site, watch: Any) -> None:
    orchestrator = mortal_site.open()
    history = watch(orchestrator)
    orchestrator.deploy(
        shell("cat /run/secrets/a; exec sleep 600", restart="on-failure", files=(File("a", b"up\n"),))
    )
    wait_for_log(orchestrator, A, "up")

    mortal_site.engine.stop()
    mortal_site.engine.start()

    status = history.until(A, "pending")
    assert status.reason.startswith("killed by SIGTERM; restart 1 of 3 in ")
    assert history.until(A, "running").restarts == 1
    wait_for_log(orchestrator, A, "up\nup\n")


def test_engine_that_leaves_services_alone_while_it_restarts_loses_sight_of_none(
    require: Require, tmp_path: Path, watch: Any, wait_until: WaitUntil
) -> None:
    require(can_run_engines(), "a Docker engine that we may start (root, docker.io, Debian's python3)")
    with private_engine(["--live-restore"]) as engine, closing(Site(engine, tmp_path)) as site:
        orchestrator = site.open()
        history = watch(orchestrator)
        orchestrator.deploy(shell("exec sleep 600"))
        orchestrator.deploy(shell("sleep 2; exit 3", name=B))
        before = orchestrator.list()

        engine.stop()
        time.sleep(2.5)
        wait_until(lambda: is_unavailable(orchestrator.list))
        engine.start()

        ended = history.until(B, "failed")
        assert ended.state == "failed"
        wait_until(lambda: not is_unavailable(orchestrator.list))
        assert [status for status in orchestrator.list() if status.name == A] == before[:1]
        orchestrator.stop(A)
        assert history.until(A, "exited").exit_code == -15


def is_unavailable(ask: Callable[[], Any]) -> bool:
    try:
        ask()
    except UnavailableError:
        return True
    return False


# engines that cannot be used
def test_engine_that_does_not_run_is_named(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/docker.sock"

    with pytest.raises(UnavailableError, match=f"the Docker engine at {url} does not answer .* - start it"):
        DockerOrchestrator(tmp_path / "state", tmp_path / "logs", home="a", url=url)


def test_engine_of_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is not of this machine - name the socket of one that is"):
        DockerOrchestrator(tmp_path / "state", tmp_path / "logs", home="a", url="tcp://192.0.2.1:2375")


def test_advertised_address_is_what_services_are_told(site: Site) -> None:
    orchestrator = site.open(advertise="192.0.2.7")

    assert orchestrator.host == "192.0.2.7"
    assert [node.address for node in orchestrator.nodes()] == ["192.0.2.7"]
    assert site.networks() == []


def test_watcher_must_not_stop_services(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    orchestrator = site.open()
    told = threading.Event()

    def stop(status: ServiceStatus) -> None:
        try:
            orchestrator.stop(status.name)
        finally:
            told.set()

    orchestrator.watch(stop)
    orchestrator.deploy(shell("sleep 600"))

    assert told.wait(20)
    orchestrator.stop(A)
    assert "a watcher must not stop services" in caplog.text


# words and names
def test_exit_codes_of_containers_are_ours() -> None:
    assert [exit_code_of(code) for code in (0, 1, 126, 128, 137, 143, 192, 193, 255)] == [
        *(0, 1, 126, 128, -9, -15, -64, 193, 255)
    ]


def test_fingerprints_tell_specs_apart() -> None:
    first = spec("true", files=(File("a", b"x"),), volumes=(Volume("v", "/v"),), environment={"A": "1"})
    others = [
        spec("true", files=(File("a", b"y"),), volumes=(Volume("v", "/v"),), environment={"A": "1"}),
        spec("true", files=(File("a", b"x"),), volumes=(Volume("v", "/w"),), environment={"A": "1"}),
        spec("true", files=(File("a", b"x"),), volumes=(Volume("v", "/v"),), environment={"A": "2"}),
        spec("false", files=(File("a", b"x"),), volumes=(Volume("v", "/v"),), environment={"A": "1"}),
        spec("true", files=(File("a", b"x"),), volumes=(Volume("v", "/v"),), environment={"A": "1"}, cpus=1),
    ]
    same = spec("true", files=(File("a", b"x"),), volumes=(Volume("v", "/v"),), environment={"A": "1"})

    assert fingerprint(first) == fingerprint(same)
    assert len({fingerprint(each) for each in (first, *others)}) == 6


def test_homes_have_names_of_their_own(tmp_path: Path) -> None:
    assert home_id(tmp_path) == home_id(tmp_path / "x" / "..")
    assert home_id(tmp_path) != home_id(tmp_path / "x")
    assert Names(home_id(tmp_path)).of("a", "b").startswith("flops-")
    for wrong in ("", "a" * 17, "A", "a-b", "../x"):
        with pytest.raises(InvalidInputError, match="cannot name a home"):
            Names(wrong)


def test_last_lines_are_whole() -> None:
    assert last_lines(b"one\ntwo\n", 100) == "one\ntwo\n"
    assert last_lines(b"one\ntwo\n", 5) == "two\n"
    assert last_lines(b"no end", 3) == "end"
    assert last_lines(b"one\n", 0) == ""


def test_errors_of_the_engine_are_ours(docker_engine: PrivateEngine) -> None:
    engine = Engine(docker_engine.url)
    with (
        closing(engine),
        pytest.raises(NotFoundError, match="asking: No such container: nobody - that is what the Docker"),
        engine.asking("asking"),
    ):
        engine.api.inspect_container("nobody")
