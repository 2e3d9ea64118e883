"""What a service is in the words of a Docker Swarm, and what its tasks and nodes say; no requests here.

A service of ours is a Swarm service of one replica that Swarm never restarts. What the next manager has to
know of it (`Deployment`) lies in a label. An attempt is a task, told apart by a label of its container; to
change that label is how another attempt is asked for. A service is stopped by parking it: a constraint that
no node meets replaces its task by one that waits for ever, and unlike a service of no replicas it keeps the
log and the exit code of the task that ended.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from flops.orchestration.containers import (
    LOG_OPTIONS,
    MAX_PROCESSES,
    TMP_BYTES,
    USER,
    Names,
    environment_of,
    exit_code_of,
    memory_bytes,
    nano_cpus,
    platform_of,
)
from flops.orchestration.deployments import Deployment
from flops.orchestration.port import USER_ID, File, Node, ServiceSpec

DEPLOYMENT = "flops.deployment"
"""The label of a service that holds its `Deployment`."""

UPDATE = {"Parallelism": 1, "Order": "stop-first", "FailureAction": "continue"}
ONE = {"Replicated": {"Replicas": 1}}
NO_ADDRESS = {"Mode": "dnsrr"}
"""Of a service: no virtual address, which would need IPVS in the nodes' kernels."""

_ATTEMPT = "flops.attempt"
_PARKED = "parked"
_NOWHERE = f"node.id=={_PARKED}"
_LONGEST_NAME = 63
_NO_DNS = "192.0.2.1"
"""An address that nobody has (RFC 5737): the engine's resolver passes nothing on from a lonely service."""

_ENDED = frozenset({"complete", "shutdown", "failed", "rejected", "remove", "orphaned"})
_GRANTED = {"UID": str(USER_ID), "GID": str(USER_ID), "Mode": 0o400}


# names
def name_of(names: Names, *parts: str) -> str:
    """`Names.of`, cut to what Swarm takes for a name."""
    name = names.of(*parts)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def secret_name(names: Names, spec: ServiceSpec, file: File) -> str:
    """Another one for other content: Swarm's secrets never change."""
    digest = hashlib.sha256(b"\0".join((spec.name.encode(), file.name.encode(), file.content)))
    return names.of("file", digest.hexdigest()[:32])


# services
def attempt_of(deployment: Deployment) -> str:
    """What tells the present attempt from all others."""
    return f"{deployment.key}.{deployment.restarts}"


def labels_of(names: Names, deployment: Deployment) -> dict[str, str]:
    return names.labels_of(deployment.spec) | {DEPLOYMENT: json.dumps(deployment.to_json())}


def deployment_in(label: str) -> Deployment:
    """What `labels_of` wrote; raises whatever reading something else raises."""
    return Deployment.from_json(json.loads(label))


@dataclass(frozen=True)
class Place:
    """Where a service may run.

    Args:
        constraints: in Swarm's words. node_id: of the one it is pinned to, if the swarm has it.
        cpus: what each of its nodes has.
    """

    constraints: tuple[str, ...]
    node_id: str | None
    cpus: int

    @classmethod
    def of(cls, spec: ServiceSpec, nodes: Mapping[str, Node]) -> "Place":
        if spec.node is None:
            return cls((), None, min((node.cpus for node in nodes.values()), default=1))
        for node_id, node in nodes.items():
            if node.name == spec.node:
                return cls((f"node.id=={node_id}",), node_id, node.cpus)
        return cls((f"node.hostname=={spec.node}",), None, 1)  # it waits for a node of that name


def task_template(
    names: Names,
    spec: ServiceSpec,
    deployment: Deployment,
    place: Place,
    *,
    secrets: Mapping[str, str],
    network: str,
    stop_grace_s: float,
) -> dict[str, Any]:
    """How a service runs.

    Args:
        secrets: ids, by `secret_name`.
        network: name or id.
    """
    container: dict[str, Any] = {
        "Image": spec.image,
        "Command": list(spec.command),
        "Env": environment_of(spec),
        "User": USER,
        "Labels": names.labels_of(spec) | {_ATTEMPT: attempt_of(deployment)},
        "Init": True,
        "ReadOnly": True,
        "CapabilityDrop": ["ALL"],
        "StopGracePeriod": int(stop_grace_s * 1e9),
        "Mounts": [tmp_mount()]
        + [
            {
                "Type": "volume",
                "Source": names.of(volume.name),
                "Target": volume.path,
                "VolumeOptions": {"Labels": names.labels(volume=volume.name)},
            }
            for volume in spec.volumes
        ],
        "Secrets": [
            {
                "SecretID": secrets[name],
                "SecretName": name,
                "File": {"Name": file.name, **_GRANTED},
            }
            for file in spec.files
            for name in [secret_name(names, spec, file)]
        ],
    }
    if spec.directory is not None:
        container["Dir"] = str(spec.directory)
    if spec.network == "none":
        container["DNSConfig"] = {"Nameservers": [_NO_DNS]}
    limits = {
        "MemoryBytes": memory_bytes(spec),
        "NanoCPUs": nano_cpus(spec, place.cpus),
        "Pids": MAX_PROCESSES,
    }
    return {
        "ContainerSpec": container,
        "Resources": {
            "Limits": {key: value for key, value in limits.items() if value is not None},
            "Reservations": {} if spec.memory_mb is None else {"MemoryBytes": memory_bytes(spec)},
        },
        "RestartPolicy": {"Condition": "none"},
        "Placement": {"Constraints": list(place.constraints)},
        "Networks": [{"Target": network}],
        "LogDriver": {"Name": "json-file", "Options": dict(LOG_OPTIONS)},
    }


def broom_template(
    image: str, command: Sequence[str], volume: str, path: str, node_id: str
) -> dict[str, Any]:
    """How a program runs that may do nothing but change one volume of a node."""
    return {
        "ContainerSpec": {
            "Image": image,
            "Command": list(command),
            "User": USER,
            "Init": True,
            "ReadOnly": True,
            "CapabilityDrop": ["ALL"],
            "Mounts": [{"Type": "volume", "Source": volume, "Target": path}],
            "DNSConfig": {"Nameservers": [_NO_DNS]},
        },
        "RestartPolicy": {"Condition": "none"},
        "Placement": {"Constraints": [f"node.id=={node_id}"]},
    }


def tmp_mount() -> dict[str, Any]:
    """A ``/tmp``. Programs cannot be run from it: Swarm's are ``noexec`` up to Docker 26 at least."""
    return {
        "Type": "tmpfs",
        "Target": "/tmp",  # noqa: S108 - the container's own
        "TmpfsOptions": {"SizeBytes": TMP_BYTES, "Mode": 0o1777},
    }


def attempting(template: Mapping[str, Any], deployment: Deployment) -> dict[str, Any]:
    """The template for another attempt: Swarm replaces the task when it differs from the last."""
    return _labelled(template, attempt_of(deployment))


def parked(template: Mapping[str, Any]) -> dict[str, Any]:
    """The template of a service that runs nowhere."""
    parked = _labelled(template, _PARKED)
    placement = template.get("Placement") or {}
    parked["Placement"] = {**placement, "Constraints": [_NOWHERE]}
    return parked


def _labelled(template: Mapping[str, Any], attempt: str) -> dict[str, Any]:
    container = template["ContainerSpec"]
    labels = {**container.get("Labels", {}), _ATTEMPT: attempt}
    return {**template, "ContainerSpec": {**container, "Labels": labels}}


# tasks
@dataclass(frozen=True)
class Task:
    """One attempt at a service, as Swarm sees it.

    Args:
        exit_code: as ours; None where the container did not end.
        error: of the scheduler while it waits for a node, else of the node.
        started: the container did.
        stamp: when it came into its state; seconds since 1970.
    """

    id: str
    service: str
    attempt: str
    node_id: str
    state: str
    error: str
    exit_code: int | None
    started: bool
    stamp: float
    created: str

    @property
    def ended(self) -> bool:
        return self.state in _ENDED

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Task":
        status = value["Status"]
        state = status["State"]
        labels = value["Spec"].get("ContainerSpec", {}).get("Labels") or {}
        container = status.get("ContainerStatus") or {}
        started = state in ("running", "complete", "shutdown") or (
            state == "failed" and status.get("Message") == "started"
        )
        return cls(
            id=value["ID"],
            service=value["ServiceID"],
            attempt=labels.get(_ATTEMPT, ""),
            node_id=value.get("NodeID", ""),
            state=state,
            error=status.get("Err", ""),
            exit_code=exit_code_of(container.get("ExitCode", 0))
            if started and state in _ENDED and container.get("ContainerID")
            else None,
            started=started,
            stamp=_stamp(status["Timestamp"]),
            created=value["CreatedAt"],
        )


def newest(tasks: Sequence[Task], attempt: str) -> Task | None:
    """The task of an attempt."""
    return max((task for task in tasks if task.attempt == attempt), key=lambda t: t.created, default=None)


def log_of(messages: Iterable[bytes], tasks: Sequence[Task]) -> bytes:
    """What the tasks of a service printed, one after the other.

    Args:
        messages: of the service's log, with details; each belongs to one task.
    """
    printed: dict[str, list[bytes]] = {
        task.id: [] for task in sorted(tasks, key=lambda task: (task.created, task.id))
    }
    for message in messages:
        details, space, text = message.partition(b" ")
        if not space or b"com.docker.swarm.task.id=" not in details:
            continue  # the engine's own words, as about a node that is down
        task = details.partition(b"com.docker.swarm.task.id=")[2].partition(b",")[0].decode(errors="replace")
        printed.setdefault(task, []).append(text)
    return b"".join(text for texts in printed.values() for text in texts)


# nodes
def nodes_of(values: Sequence[Mapping[str, Any]]) -> dict[str, Node]:
    """The nodes of a swarm by their ids. A host name that several have is made unique by the id."""
    hostnames = [value["Description"]["Hostname"] for value in values]
    nodes: dict[str, Node] = {}
    for value in values:
        description, spec, status = value["Description"], value["Spec"], value["Status"]
        platform = description["Platform"]
        resources = description.get("Resources") or {}
        hostname = description["Hostname"]
        name = hostname if hostnames.count(hostname) == 1 else f"{hostname}-{value['ID'][:8]}"
        manager = (value.get("ManagerStatus") or {}).get("Addr", "")
        nodes[value["ID"]] = Node(
            name=name,
            platform=platform_of({"OSType": platform["OS"], "Architecture": platform["Architecture"]}),
            cpus=max(1, resources.get("NanoCPUs", 0) // 1_000_000_000),
            memory_mb=resources.get("MemoryBytes", 0) // 1_000_000,
            labels={
                **(description.get("Engine", {}).get("Labels") or {}),
                **(spec.get("Labels") or {}),
            },
            # A manager that was initialised on all interfaces calls itself 0.0.0.0 in its status.
            address=manager.rpartition(":")[0].strip("[]") or status.get("Addr", ""),
            ready=status["State"] == "ready" and spec.get("Availability") == "active",
        )
    return nodes


def down_nodes(values: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The ids of nodes that Swarm gave up."""
    return frozenset(value["ID"] for value in values if value["Status"]["State"] == "down")


def _stamp(text: str) -> float:
    """An engine's time, with nine digits after the dot, in seconds since 1970."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}.{fraction[:6] or 0:0<6}+00:00").timestamp()
