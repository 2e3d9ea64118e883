"""Services as things of one Docker engine: containers, the volumes and networks around them.

Every method asks the engine and nothing else; none keeps state, all may be called from any thread.
"""

import base64
import json
import logging
import posixpath
import socket
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flops.core.errors import ConflictError, FailedError, InvalidInputError, NotFoundError, UnavailableError
from flops.orchestration.containers import (
    LOG_OPTIONS,
    MAX_PROCESSES,
    TMP_BYTES,
    USER,
    Engine,
    Entry,
    Names,
    cpu_shares,
    environment_of,
    memory_bytes,
    nano_cpus,
    platform_of,
    tarball,
)
from flops.orchestration.deployments import Deployment
from flops.orchestration.port import LOOPBACK, SECRETS, ServiceSpec

_log = logging.getLogger(__name__)

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STAGE = "flops-stage"
_LOG_LINES = 2000
_NO_RANGE_LEFT = "non-overlapping"


@dataclass(frozen=True)
class Machine:
    """What an engine says of its machine."""

    name: str
    platform: str
    cpus: int
    memory_mb: int
    labels: Mapping[str, str]


class ServiceContainers:
    """What one FLOPS_HOME has on an engine. All methods raise what `Engine.asking` raises."""

    def __init__(self, engine: Engine, names: Names) -> None:
        self._engine = engine
        self._api = engine.api
        self._names = names
        self._networks = threading.Lock()

    def machine(self) -> Machine:
        with self._engine.asking("the node is not known"):
            info = self._api.info()
        return Machine(
            name=info["Name"],
            platform=platform_of(info),
            cpus=info["NCPU"],
            memory_mb=info["MemTotal"] // 1_000_000,
            labels=dict(label.partition("=")[::2] for label in info["Labels"] or []),
        )

    def pull(self, image: str, platform: str) -> None:
        self._engine.have_image(image, platform)

    # containers
    def make(self, deployment: Deployment, spec: ServiceSpec, cpus: int) -> str:
        """A container that is ready to be started, its files and volumes included; its network is there.

        Returns its id.

        Args:
            cpus: of the machine.
        Raises:
            FailedError: its image has no such program.
        """
        with self._engine.asking(f"service {spec.name} cannot start"):
            self._furnish(deployment, spec)
            network = None if spec.network == "none" else self._names.of(spec.project)
            container = self._create(
                self._configuration(deployment, spec, network, cpus), self.name_of(deployment)
            )
            self._check_program(container, spec)
        return container

    def start(self, deployment: Deployment) -> Mapping[str, Any]:
        """Start the container of a deployment; how it is then."""
        container = str(deployment.container)
        with self._engine.asking(f"service {deployment.spec.name} cannot start"):
            self._api.start(container)
            details: Mapping[str, Any] = self._api.inspect_container(container)
        return details

    def look(self, container: str) -> Mapping[str, Any] | None:
        """How a container is, by its id or name; None: there is none."""
        try:
            with self._engine.asking(f"container {container}"):
                details: Mapping[str, Any] = self._api.inspect_container(container)
                return details
        except NotFoundError:
            return None

    def signal(self, container: str, signal: str) -> None:
        """No effect where nothing runs."""
        with suppress(NotFoundError, ConflictError), self._engine.asking(f"container {container}"):
            self._api.kill(container, signal)

    def printed(self, container: str, tail_bytes: int) -> bytes:
        """What a container printed: at least the last ``tail_bytes``, where it printed so much."""
        try:
            with self._engine.asking(f"the log of container {container}"):
                some: bytes = self._api.logs(container, tail=_LOG_LINES)
                if len(some) >= tail_bytes or some.count(b"\n") < _LOG_LINES:
                    return some
                everything: bytes = self._api.logs(container)
                return everything
        except (NotFoundError, ConflictError):
            return b""

    def discard(self, deployment: Deployment) -> None:
        """Remove the container of a deployment and its files; no effect where there are none."""
        name = self.name_of(deployment)
        for container in (name, f"{name}-{_STAGE}"):
            self._remove_container(container)
        self._remove_volume(self._files_volume(deployment), force=True)

    def sweep(self, known: Callable[[], Collection[str]]) -> None:
        """Remove containers and files that belong to no deployment whose key is known.

        Args:
            known: asked after we have seen what there is: a deployment is known before it has anything.
        """
        with self._engine.asking("what was left behind cannot be removed"):
            containers = self._api.containers(all=True, filters=self._names.mine())
            volumes = self._api.volumes(filters=self._names.mine())["Volumes"] or []
        keys = known()
        for container in containers:
            if container["Labels"].get("flops.deployment") not in keys:
                self._remove_container(container["Id"])
        for volume in volumes:
            key = (volume["Labels"] or {}).get("flops.files")
            if key is not None and key not in keys:
                self._remove_volume(volume["Name"], force=True)

    def name_of(self, deployment: Deployment) -> str:
        """The name of its container."""
        return self._names.of(deployment.spec.name, deployment.key)

    def _files_volume(self, deployment: Deployment) -> str:
        return f"{self.name_of(deployment)}-files"

    def _create(self, configuration: dict[str, Any], name: str) -> str:
        created = self._api.create_container_from_config(configuration, name)  # type: ignore[no-untyped-call]
        for warning in created.get("Warnings") or []:  # of a limit that its kernel does not know, say
            _log.warning("container %s: the Docker engine says: %s", name, warning)
        return str(created["Id"])

    def _remove_container(self, container: str) -> None:
        with suppress(NotFoundError), self._engine.asking(f"container {container} cannot be removed"):
            self._api.remove_container(container, v=True, force=True)

    def _configuration(
        self, deployment: Deployment, spec: ServiceSpec, network: str | None, cpus: int
    ) -> dict[str, Any]:
        mounts = [_mount(self._names.of(volume.name), volume.path) for volume in spec.volumes]
        if spec.files:
            mounts.append(_mount(self._files_volume(deployment), SECRETS, read_only=True))
        host: dict[str, Any] = {
            "Mounts": mounts,
            "NetworkMode": network or "none",
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": True,
            "Tmpfs": {"/tmp": f"size={TMP_BYTES},mode=1777,nosuid,nodev,exec"},  # noqa: S108 - the container's
            "PidsLimit": MAX_PROCESSES,
            "Init": True,
            "LogConfig": {"Type": "json-file", "Config": LOG_OPTIONS},
            "RestartPolicy": {"Name": "no"},
        }
        if (memory := memory_bytes(spec)) is not None:
            host |= {"Memory": memory, "MemorySwap": memory}
        if (most := nano_cpus(spec, cpus)) is not None:
            host["NanoCpus"] = most
        if spec.nice:
            host["CpuShares"] = cpu_shares(spec)
        configuration: dict[str, Any] = {
            "Image": spec.image,
            "Hostname": spec.name,
            "User": USER,
            "Entrypoint": [spec.command[0]],
            "Cmd": list(spec.command[1:]),
            "Env": environment_of(spec),
            "Labels": self._names.labels_of(spec) | self._names.labels(deployment=deployment.key),
            "Healthcheck": {"Test": ["NONE"]},
            "HostConfig": host,
        }
        if spec.directory is not None:
            configuration["WorkingDir"] = str(spec.directory)
        if spec.publish:
            configuration["ExposedPorts"] = {f"{spec.port}/tcp": {}}
            host["PortBindings"] = {f"{spec.port}/tcp": [{"HostIp": LOOPBACK, "HostPort": ""}]}
        if network is not None:
            configuration["NetworkingConfig"] = {"EndpointsConfig": {network: {"Aliases": [spec.name]}}}
        return configuration

    def _check_program(self, container: str, spec: ServiceSpec) -> None:
        """Say now what the container's init would say when it is too late: there is no such program."""
        program = spec.command[0]
        if "/" in program:
            candidates = [posixpath.join(str(spec.directory or "/"), program)]
        else:
            environment = self._api.inspect_container(container)["Config"]["Env"]
            paths = [word.removeprefix("PATH=") for word in environment if word.startswith("PATH=")]
            folders = (paths or [_PATH])[-1].split(":")
            candidates = [posixpath.join(folder, program) for folder in folders if folder]
        reason = "No such file or directory"
        for candidate in candidates:
            found = self._stat(container, candidate)
            if found is not None and found["linkTarget"]:
                found = self._stat(container, found["linkTarget"])
            if found is not None:
                is_folder = found["mode"] >> 31
                if found["mode"] & 0o111 and not is_folder:
                    return
                reason = "Permission denied"
        raise FailedError(
            f"service {spec.name} cannot start '{program}': {reason}"
            f" - check that it is in image {spec.image} and executable"
        )

    def _stat(self, container: str, path: str) -> dict[str, Any] | None:
        """What is at a path of a container; the SDK has no word for it."""
        url = f"{self._api.base_url}/v{self._api.api_version}/containers/{container}/archive"
        with self._api.head(url, params={"path": path}, timeout=self._api.timeout) as answer:
            if answer.status_code == 404:
                return None
            answer.raise_for_status()
            encoded = answer.headers["X-Docker-Container-Path-Stat"]
        found: dict[str, Any] = json.loads(base64.b64decode(encoded))
        return found

    # volumes
    def remove_volumes(self, prefix: str) -> None:
        """Those whose names begin like this."""
        with self._engine.asking("volumes cannot be removed"):
            volumes = self._api.volumes(filters=self._names.mine())["Volumes"] or []
        for volume in volumes:
            if (volume["Labels"] or {}).get("flops.volume", "").startswith(prefix):
                self._remove_volume(volume["Name"])

    def _remove_volume(self, name: str, *, force: bool = False) -> None:
        with suppress(NotFoundError), self._engine.asking(f"volume {name} cannot be removed"):
            self._api.remove_volume(name, force=force)

    def _has_volume(self, name: str) -> bool:
        try:
            with self._engine.asking(f"volume {name}"):
                self._api.inspect_volume(name)
        except NotFoundError:
            return False
        return True

    def _furnish(self, deployment: Deployment, spec: ServiceSpec) -> None:
        """Fill the volume of a service's files, and give fresh volumes to their user.

        A container that never runs is the door: the engine puts nothing into a container that is read-only,
        nor into a volume that is mounted so.
        """
        fresh: list[tuple[str, list[Entry]]] = []
        if spec.files:
            name = self._files_volume(deployment)
            self._api.create_volume(name, labels=self._names.labels(files=deployment.key, service=spec.name))
            fresh.append((name, [Entry(file.name, 0o400, file.content) for file in spec.files]))
        for volume in spec.volumes:
            name = self._names.of(volume.name)
            if not self._has_volume(name):
                self._api.create_volume(name, labels=self._names.labels(volume=volume.name))
                fresh.append((name, []))
        if not fresh:
            return
        entries = []
        for number, (_, files) in enumerate(fresh):
            entries.append(Entry(f"{_STAGE}/{number}", 0o700))
            entries += [Entry(f"{_STAGE}/{number}/{file.path}", file.mode, file.content) for file in files]
        door = self._create(
            {
                "Image": spec.image,
                "Entrypoint": ["-"],
                "Labels": self._names.labels(deployment=deployment.key),
                "HostConfig": {
                    "NetworkMode": "none",
                    "Mounts": [_mount(name, f"/{_STAGE}/{i}") for i, (name, _) in enumerate(fresh)],
                },
            },
            f"{self.name_of(deployment)}-{_STAGE}",
        )
        self._api.put_archive(door, "/", tarball(entries))
        self._remove_container(door)

    # networks
    def make_network(self, project: str) -> None:
        """The network of a project; no effect where it is there.

        Raises:
            UnavailableError: the engine has no range of addresses left, see `prune_networks`.
        """
        self._have_network(self._names.of(project), self._names.labels(project=project))

    def remove_network(self, project: str) -> None:
        name = self._names.of(project)
        with suppress(NotFoundError), self._engine.asking(f"network {name} cannot be removed"):
            self._api.remove_network(name)

    def _have_network(self, name: str, labels: dict[str, str]) -> None:
        try:
            with self._networks, self._engine.asking(f"network {name} cannot be made"):
                if not any(network["Name"] == name for network in self._api.networks(names=[name])):
                    self._api.create_network(name, driver="bridge", check_duplicate=True, labels=labels)
        except (FailedError, NotFoundError) as error:
            if _NO_RANGE_LEFT not in str(error):
                raise
            raise UnavailableError(
                f"network {name} cannot be made: the engine at {self._engine.url} has no range of addresses"
                " left - remove ended projects, or give it more ('default-address-pools')"
            ) from error

    def prune_networks(self, live: Callable[[], Collection[str]]) -> int:
        """Remove the networks of all projects but the live ones: an engine has room for some thirty.

        They are made again when they are needed. Returns how many it removed.
        """
        with self._engine.asking("networks that nobody uses cannot be removed"):
            networks = self._api.networks(filters=self._names.mine())
        kept, removed = live(), 0
        for network in networks:
            project = (network["Labels"] or {}).get("flops.project")
            if project is not None and project not in kept:
                with (
                    suppress(FailedError, ConflictError, NotFoundError),  # somebody else's container is in it
                    self._engine.asking(f"network {network['Name']} cannot be removed"),
                ):
                    self._api.remove_network(network["Id"])
                    removed += 1
        return removed

    def bridge_address(self) -> str:
        """This machine's address on a bridge of the engine; containers on all of its bridges reach it.

        Raises:
            InvalidInputError: it is none of this machine's, as where the engine runs in a virtual machine.
        """
        with self._engine.asking("the address of this machine for services is not known"):
            networks: Sequence[Mapping[str, Any]] = self._api.networks(names=["bridge"])
            bridge = next((network for network in networks if network["Name"] == "bridge"), None)
            if bridge is None:  # an engine without its default bridge
                name = self._names.of("host")
                self._have_network(name, self._names.labels())
                bridge = self._api.inspect_network(name)
        address = _gateway(bridge)
        if address is None or not _is_ours(address):
            raise InvalidInputError(
                f"containers of the Docker engine at {self._engine.url} reach its host at"
                f" {address or 'an address it does not tell'}, which is none of this machine"
                " - name an address at which they reach it"
            )
        return address


def _mount(volume: str, path: str, *, read_only: bool = False) -> dict[str, Any]:
    return {
        "Type": "volume",
        "Source": volume,
        "Target": path,
        "ReadOnly": read_only,
        "VolumeOptions": {"NoCopy": True},
    }


def _gateway(network: Mapping[str, Any]) -> str | None:
    configurations = network["IPAM"]["Config"] or []
    gateways = (c["Gateway"].partition("/")[0] for c in configurations if c.get("Gateway"))
    return next((gateway for gateway in gateways if ":" not in gateway), None)


def _is_ours(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
