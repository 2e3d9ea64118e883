"""A Docker Swarm of our own for tests: one manager, two workers, each in namespaces as if on a machine.

A node is a dockerd in namespaces of its own: network (joined with the others by a bridge that lies in one
more namespace, so that no firewall of this machine is asked), mounts (its own /run and /sys), host name,
processes. So host networking is the node's, and killing its first process ends it as a power cut would. A
registry of this machine, reached by all of them, hands out the test image. What a killed test run left is
cleared away by the next.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker

from tests import namespaces
from tests.engines import IMAGE, _image_archive, can_run_engines

REPOSITORY = "flops-test"

_PREFIX = "flops-swarm-"
_REGISTRY_PORT = 5000
_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_NODE = """
set -e
hostname "$1"; shift
mount -t tmpfs run /run
mkdir /run/cgroup
mount --rbind /sys/fs/cgroup /run/cgroup
mount -t sysfs sysfs /sys
mount --rbind /run/cgroup /sys/fs/cgroup
umount --lazy /run/cgroup
exec docker-init -s -- dockerd "$@"
"""
"""Its /sys shows the network of the node, and the control groups of this machine."""


def can_run_swarms() -> bool:
    """Whether this machine and this user can start a swarm."""
    programs = ("docker-registry", "docker-init", "ip", "nsenter", "unshare", "setpriv")
    return can_run_engines() and all(shutil.which(program) for program in programs)


class SwarmNode:
    """One node; `start`, `stop` and `kill` it as often as you like.

    Args:
        name: its host name.
        namespace: of its network, which exists.
        options: of dockerd, besides ours.
    """

    def __init__(
        self, folder: Path, name: str, namespace: str, address: str, bridge: str, options: Sequence[str]
    ) -> None:
        self.name = name
        self.address = address
        self.namespace = namespace
        self.url = f"unix://{folder}/{name}.sock"
        self._folder = folder
        self._bridge = bridge
        self._options = tuple(options)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """The last lines of what it said."""
        path = self._folder / f"{self.name}.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def start(self) -> None:
        """Returns once it answers; raises AssertionError with its log when it does not."""
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL"),  # a test run that is killed takes its nodes with it
                    *("nsenter", f"--net=/run/netns/{self.namespace}"),
                    *("unshare", "--mount", "--propagation", "private", "--uts", "--ipc"),
                    *("--pid", "--fork", "--kill-child", "--mount-proc"),
                    *("sh", "-c", _NODE, "node", self.name),
                    *("--data-root", str(self._folder / self.name)),
                    *("--exec-root", "/run/docker", "--pidfile", "/run/docker.pid", "--host", self.url),
                    *("--cgroup-parent", f"/{self.namespace}"),
                    *("--bip", self._bridge, "--default-ulimit", "nofile=1024:1024"),
                    *("--shutdown-timeout", "5", *self._options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _TIMEOUT_S
        while not self._answers():
            assert self._process.poll() is None, f"node {self.name} ended:\n{self.log}"
            assert time.monotonic() < deadline, f"node {self.name} does not answer:\n{self.log}"
            time.sleep(0.05)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:  # the SDK leaves its sockets open when nobody answers
            try:
                probe.settimeout(_TIMEOUT_S)
                probe.connect(self.url.removeprefix("unix://"))
                probe.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
                return b" 200 " in probe.recv(100)
            except OSError:
                return False

    def open_client(self) -> docker.APIClient:
        """A new one, the caller's to close."""
        return docker.APIClient(base_url=self.url, version="auto", timeout=60)

    @contextmanager
    def client(self) -> Iterator[docker.APIClient]:
        client = self.open_client()
        try:
            yield client
        finally:
            client.close()

    def containers(self, labels: Mapping[str, str], *, ended: bool = False) -> list[Any]:
        """What runs here with these labels; ``ended``: what ran, too."""
        filters = {"label": [f"{key}={value}" for key, value in labels.items()]}
        with self.client() as client:
            return list(client.containers(filters=filters, all=ended))

    def volumes(self) -> set[str]:
        with self.client() as client:
            return {volume["Name"] for volume in client.volumes()["Volumes"] or []}

    def stop(self) -> None:
        """As `systemctl stop docker` does."""
        if self._process is None or self._process.poll() is not None:
            return
        with suppress(ProcessLookupError, FileNotFoundError):
            os.kill(self._first_process(), signal.SIGTERM)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """As a power cut does: dockerd and all containers at once."""
        if self._process is None:
            return
        with suppress(ProcessLookupError, FileNotFoundError):
            os.kill(self._first_process(), signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._process = None
        Path(self.url.removeprefix("unix://")).unlink(missing_ok=True)

    def _first_process(self) -> int:
        """The one whose end ends all others of the node."""
        assert self._process is not None
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


class PrivateSwarm:
    """A manager and workers, a registry, and the test image in it.

    Args:
        host: the address of this machine that the nodes see.
        image: reference of the test image, by digest.
    """

    def __init__(self, folder: Path, subnet: str, workers: int) -> None:
        self.folder = folder
        self.host = f"{subnet}.1"
        self.registry = f"{self.host}:{_REGISTRY_PORT}"
        self.image = ""
        self._prefix = f"{_PREFIX}{os.getpid()}"
        self._registry: subprocess.Popen[bytes] | None = None
        names = ["manager", *(f"worker-{number}" for number in range(1, workers + 1))]
        self.nodes = [
            SwarmNode(
                folder,
                name,
                f"{self._prefix}-{name}",
                f"{subnet}.{10 + number}",
                f"172.30.{200 + number}.1/24",
                ("--insecure-registry", self.registry, "--label", f"kind={name.partition('-')[0]}"),
            )
            for number, name in enumerate(names)
        ]
        self.manager, self.workers = self.nodes[0], self.nodes[1:]

    def node(self, name: str) -> SwarmNode:
        return next(node for node in self.nodes if node.name == name)

    def start(self) -> None:
        self._connect()
        self.start_registry()
        for node in self.nodes:
            node.start()
        with self.manager.client() as client:
            spec = client.create_swarm_spec(
                # A node that says nothing for three of them is down.
                dispatcher_heartbeat_period=1_000_000_000,
                task_history_retention_limit=5,
            )
            address = self.manager.address
            client.init_swarm(advertise_addr=address, listen_addr=address, swarm_spec=spec)
            token = client.inspect_swarm()["JoinTokens"]["Worker"]
        for node in self.workers:
            with node.client() as client:
                client.join_swarm([f"{self.manager.address}:2377"], token, advertise_addr=node.address)
        self.image = self.publish(REPOSITORY, {})

    def _connect(self) -> None:
        machines = {node.namespace: node.address for node in self.nodes}
        namespaces.connect(self._prefix, _host(os.getpid()), self.host, machines)

    def start_registry(self) -> None:
        configuration = self.folder / "registry.yml"
        configuration.write_text(
            f"version: 0.1\nlog: {{level: warn}}\nhttp: {{addr: '{self.registry}'}}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.folder}/registry}}}}\n"
        )
        with (self.folder / "registry.log").open("ab") as log:
            self._registry = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "docker-registry", "serve", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop_registry(self) -> None:
        if self._registry is not None:
            self._registry.kill()
            self._registry.wait()
            self._registry = None

    @contextmanager
    def stalled_registry(self) -> Iterator[None]:
        """The registry takes connections and says nothing."""
        assert self._registry is not None
        self._registry.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._registry.send_signal(signal.SIGCONT)

    def publish(self, repository: str, labels: Mapping[str, str]) -> str:
        """The reference of an image that differs from the test image in its labels only."""
        name = f"{self.registry}/{repository}"
        with self.manager.client() as client:
            client.load_image(_image_archive())  # type: ignore[no-untyped-call]
            container = client.create_container(IMAGE, ["true"])
            changes = [f"LABEL {key}={value!r}" for key, value in labels.items()]
            client.commit(container["Id"], name, "1", changes=changes)
            client.remove_container(container["Id"])
            deadline = time.monotonic() + _TIMEOUT_S
            while True:
                said = [*client.push(name, "1", stream=True, decode=True)]
                digests = [line["aux"]["Digest"] for line in said if "aux" in line]
                if digests:
                    return f"{name}@{digests[0]}"
                assert time.monotonic() < deadline, f"the image was not pushed: {said[-1:]}"
                time.sleep(0.2)

    def close(self) -> None:
        """End it, with all that it runs, has mounted and has written."""
        for node in self.nodes:
            node.kill()
        self.stop_registry()
        _clear(os.getpid(), self.folder)


@contextmanager
def private_swarm(workers: int = 2) -> Iterator[PrivateSwarm]:
    """A running swarm. One per process at a time."""
    _clear_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    swarm = PrivateSwarm(folder, namespaces.free_subnet(), workers)
    try:
        swarm.start()
        yield swarm
    finally:
        swarm.close()


def _host(owner: int) -> str:
    return f"fsw{owner}"


def _clear_leftovers() -> None:
    """Clear away swarms whose test run is gone. Their processes went with it."""
    folders = [*Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")]
    for owner in namespaces.owners_that_are_gone(_PREFIX, (folder.name for folder in folders)):
        _clear(owner, *(folder for folder in folders if folder.name.split("-")[2] == str(owner)))


def _clear(owner: int, *folders: Path) -> None:
    namespaces.disconnect(f"{_PREFIX}{owner}", _host(owner))
    for pattern in (f"{_PREFIX}{owner}-*", f"*/{_PREFIX}{owner}-*"):  # of both versions of control groups
        for group in Path("/sys/fs/cgroup").glob(pattern):
            for parent, _, _ in os.walk(group, topdown=False):
                with suppress(OSError):
                    Path(parent).rmdir()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
