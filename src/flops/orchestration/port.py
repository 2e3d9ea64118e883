"""The port: what FLOps asks of any orchestrator, and the words it is asked in."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from flops.core.errors import InvalidInputError, NotFoundError
from flops.core.ids import ServiceName

ServiceState = Literal["pending", "running", "exited", "failed", "lost"]
"""pending: wanted, not up now (being started, or waiting for its next attempt); running;
exited: ended with code 0, or stopped on request; failed: ended otherwise and will not be tried again;
lost: gone, and nobody knows how it ended."""

LIVE_STATES: frozenset[ServiceState] = frozenset({"pending", "running"})
"""States in which a service is running or will be."""

SECRETS = "/run/secrets"
"""The folder in which a service that runs an image finds its files."""

MAX_FILE_BYTES = 500_000
"""Of one file that travels with a service; what is larger belongs into its image."""

USER_ID = 10_001
"""User and group of everything that runs in an image of ours."""

LOOPBACK = "127.0.0.1"

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,58}[a-z0-9])?")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class File:
    """A private file that travels with a service that runs an image: in neither its image, nor its
    environment, nor its command line. Only the service can read it.
    """

    name: str
    content: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not _FILE.fullmatch(self.name):
            raise InvalidInputError(
                f"'{self.name[:70]}' cannot name a file - use letters, digits, '.' and '-'"
            )
        if len(self.content) > MAX_FILE_BYTES:
            raise InvalidInputError(
                f"file {self.name} has {len(self.content)} bytes, {MAX_FILE_BYTES} can travel - "
                "put it into the image"
            )

    @property
    def path(self) -> str:
        """Where the service finds it."""
        return f"{SECRETS}/{self.name}"


@dataclass(frozen=True)
class Volume:
    """Storage of a node that outlives services, and that services of the node share by its name.

    A fresh one belongs to the user of the image (`USER_ID`).
    """

    name: str
    path: str
    """Where the service finds it; an absolute path."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or not self.path.startswith("/") or ".." in self.path.split("/"):
            raise InvalidInputError(
                f"volume '{self.name[:70]}' at '{self.path[:70]}' is not possible - use 60 of a-z, 0-9 "
                "and '-', and an absolute path"
            )


@dataclass(frozen=True)
class ServiceSpec:
    """One wanted service.

    Args:
        name: unique on the orchestrator, at most 60 of a-z, 0-9 and '-' (it names files, containers,
        pods). command: program and arguments; never a shell line. role: what it is to its project, such
        as ``aggregator`` or ``agent``. project: the project it belongs to; a name of your choice for
        services of the manager itself. nice: how far it steps aside for whoever else wants the processors of
        its machine, as in nice(1), 0 to 19. environment: added to what the platform gives; may hold secrets,
        adapters keep it private. directory: working directory; None: the platform's choice. restart:
        ``on-failure`` tries again, with growing pauses, after an end that was neither code 0 nor
            asked for.
        max_restarts: how many more attempts after the first. image: reference of the image to run, by
        digest; it runs as `USER_ID` without any capability, on a root that it cannot write to, with a small
        ``/tmp`` of its own. None: a program of this machine, or of the joined ``node``. Only with an image:
        volumes; memory_mb, in units of 10^6 bytes: more of it and the service is killed; cpus: how many
        processors it may keep busy. node: the name of the one that it has to run on, None: any; files travel
        to it, or with an image; network: ``none``: nothing but loopback; ``project``: it reaches the services
        of its project, and whatever the node does; port: TCP port on which it listens for other services;
        publish: it is also reached from outside the project (`ServiceStatus.endpoint`).
    Raises:
        InvalidInputError: the spec cannot be deployed anywhere.
    """

    name: ServiceName
    command: tuple[str, ...]
    role: str
    project: str
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None
    restart: Literal["never", "on-failure"] = "never"
    max_restarts: int = 3
    nice: int = 0
    image: str | None = None
    files: tuple[File, ...] = ()
    volumes: tuple[Volume, ...] = ()
    memory_mb: int | None = None
    cpus: float | None = None
    node: str | None = None
    network: Literal["none", "project"] = "project"
    port: int | None = None
    publish: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidInputError(
                f"'{self.name[:70]}' cannot name a service - use at most 60 of a-z, 0-9 and '-'"
            )
        if not self.command or not self.command[0]:
            raise InvalidInputError(f"service {self.name} has no command - name a program to run")
        if self.max_restarts < 0:
            raise InvalidInputError(
                f"service {self.name} has max_restarts {self.max_restarts} - use 0 or more"
            )
        if not 0 <= self.nice <= 19:
            raise InvalidInputError(f"service {self.name} has nice {self.nice} - use 0 to 19")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise InvalidInputError(f"service {self.name} cannot listen on port {self.port} - use 1 to 65535")
        if self.publish and self.port is None:
            raise InvalidInputError(f"service {self.name} is published and has no port - give it one")
        if self.image is None and (self.volumes or self.memory_mb or self.cpus):
            raise InvalidInputError(f"service {self.name} has no image; volumes and limits need one")
        if self.image is None and self.files and self.node is None:
            raise InvalidInputError(
                f"service {self.name} is a program of this machine; files travel with images, and to a node"
            )
        words = [*self.command, *self.environment, *self.environment.values()]
        if any("\0" in word for word in words) or any(not key or "=" in key for key in self.environment):
            raise InvalidInputError(
                f"service {self.name} has a NUL character in its command or environment, or a variable"
                " name that is empty or holds '=' - remove it"
            )


@dataclass(frozen=True)
class ServiceStatus:
    """One observed service.

    Args:
        exit_code: of the last end: 0-255, or minus the signal's number; None while unknown or never
        ended. reason: why it is in this state, in a few words; empty where there is nothing to say.
        restarts: attempts after the first, so far. started_at: of the present or last attempt, seconds
        since 1970 UTC; None before the first. pid: of the service's own process while it runs on this
        machine, else None. node: the name of the one that it runs, or ran, on; empty before. endpoint:
        ``host:port`` at which a published one is reached from this machine while it runs, else None. final:
        it was not the service that failed, and another attempt would go no further.
    """

    name: ServiceName
    state: ServiceState
    exit_code: int | None
    reason: str
    restarts: int
    started_at: float | None
    pid: int | None
    role: str
    project: str
    node: str = ""
    endpoint: str | None = None
    final: bool = False

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES


@dataclass(frozen=True)
class Node:
    """A machine that runs services.

    Args:
        address: host name or address at which services of other nodes reach it. ready: it takes services
        now. platform: such as ``linux/amd64``.
        cpus: that services may use.
        memory_mb: of the machine, in units of 10^6 bytes.
    """

    name: str
    platform: str
    cpus: int
    memory_mb: int
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = "127.0.0.1"
    ready: bool = True


@dataclass(frozen=True)
class ServiceUsage:
    """What a running service uses. None: nobody counts it here.

    Args:
        cpu_s: processor time since its start; memory_bytes: now, without what is only kept of files; threads:
            now; received_bytes, sent_bytes: over its network, since its start; cpu_percent: of one processor,
            in place of cpu_s, where it is another machine that looks.
    """

    name: ServiceName
    cpu_s: float | None = None
    memory_bytes: int | None = None
    threads: int | None = None
    received_bytes: int | None = None
    sent_bytes: int | None = None
    cpu_percent: float | None = None


Watcher = Callable[[ServiceStatus], None]
Statuses = list[ServiceStatus]  # inside the classes the word list means their method


class Subscription(Protocol):
    """A running `Orchestrator.watch`."""

    def close(self) -> None:
        """End it; a call that is under way may still finish. Closing twice is harmless."""
        ...


class Orchestrator(Protocol):
    """Runs services.

    All methods may be called from any thread, but `stop`, `stop_many` and `remove` not by a watcher.
    """

    @property
    def runs_images(self) -> bool:
        """Whether services are images, on machines that do not share files with this one; else programs of
        this machine."""
        ...

    @property
    def host(self) -> str:
        """The address at which services reach this machine."""
        ...

    def address(self, spec: ServiceSpec) -> str:
        """``host:port`` at which other services of its project reach a service that has a port; known before
        it is deployed.

        Raises:
            InvalidInputError: it has no port, or this orchestrator has to know its node.
        """
        ...

    def expect(self, image: str) -> None:
        """Services of this image will be deployed soon: bring it near, where that is possible.

        A hint: it returns at once, and what goes wrong is told by `deploy`.
        """
        ...

    def deploy(self, spec: ServiceSpec) -> None:
        """Run a service; return once it was started (not: once it is ready).

        The same spec again while the service is live does nothing; after it ended it is run anew, its
        restarts counted from zero.

        Raises:
            ConflictError: a service of this name is live with another spec, or is being stopped.
            FailedError: it cannot be started; nothing is left behind.
        """
        ...

    def stop(self, name: ServiceName, grace_s: float = 2.0) -> None:
        """End a service and all its processes; return when they are gone. No effect if it ended before.

        Args:
            grace_s: how long it may take to end by itself before it is killed.
        Raises:
            NotFoundError: no service has this name.
            FailedError: it could not be ended.
        """
        ...

    def stop_many(self, names: Iterable[ServiceName], grace_s: float = 2.0) -> None:
        """`stop` for all of them at once, under one deadline.

        Raises what `stop` raises; NotFoundError before any of them is stopped.
        """
        ...

    def remove(self, name: ServiceName) -> None:
        """Stop a service and forget it, its logs and files included; its volumes stay.

        Raises:
            NotFoundError: no service has this name.
        """
        ...

    def list(self, project: str | None = None) -> Statuses:
        """All known services, or one project's, by name; ended ones too, until they are removed."""
        ...

    def watch(self, callback: Watcher) -> Subscription:
        """Call back at every state change from now on; `list` afterwards shows what was before.

        The callback should return quickly; an exception of its own is logged and otherwise ignored.
        """
        ...

    def logs(self, name: ServiceName, tail_bytes: int = 65536) -> str:
        """The last lines a service wrote to stdout and stderr, over all its attempts.

        Raises:
            NotFoundError: no service has this name.
        """
        ...

    def remove_project(self, project: str) -> None:
        """Forget a project: its services, the volumes that carry its name in front (``PROJECT-...``), and
        whatever else the orchestrator keeps for it. No effect where there is nothing.
        """
        ...

    def nodes(self) -> Sequence[Node]:
        """The machines services are placed on."""
        ...

    def usage(self) -> Sequence[ServiceUsage]:
        """One look at what running services use, by name; those on machines that cannot be looked at from
        here are left out.

        Raises:
            UnavailableError: the orchestrator is away.
        """
        ...

    def close(self) -> None:
        """Let go of the orchestrator; services go on. Closing twice is harmless."""
        ...


def unknown_service(name: str) -> NotFoundError:
    """The error for a name nobody deployed."""
    return NotFoundError(f"no service is called '{name[:70]}' - see 'flops show' for the names")


def loopback_address(spec: ServiceSpec) -> str:
    """`Orchestrator.address` where all services are on this machine."""
    if spec.port is None:
        raise InvalidInputError(f"service {spec.name} listens on no port - give it one")
    return f"{LOOPBACK}:{spec.port}"
