"""Services on joined nodes: the machines of data owners, which call the manager and are never called by it.

A node asks what is wanted of it (`JoinedNodes.told`) and says what is there (`JoinedNodes.heard`). So
`deploy` commits what is wanted and returns; the service is pending until its node says more. What travels is
an assignment and files, never a command: a node knows by itself how one takes part in a project. While a node
is away its services go on, as far as anybody knows; those of one that has left, or was away for too long, are
lost, and nothing brings them back (`ServiceStatus.final`).

Rows survive the manager; secrets that travel lie in private files, logs of nodes in memory only.
"""

import base64
import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa

from flops.core.clock import Clock
from flops.core.errors import ConflictError, InvalidInputError, NotFoundError
from flops.core.ids import ServiceName
from flops.fleet import LOST_S, JoinedNode, NodeService, NodeStore, Seen, ServiceStore
from flops.manager.broadcast import Broadcast, Listener
from flops.manager.paths import write_private_json
from flops.orchestration import Node, ServiceSpec, ServiceState, ServiceStatus, ServiceUsage, Subscription
from flops.orchestration.port import LOOPBACK, Statuses, Watcher, unknown_service
from flops.orchestration.watchers import Watchers

log = logging.getLogger(__name__)

ASSIGNMENT = "assignment.json"
"""The file of a specification that says what the node is wanted to do; no secret."""
MAX_LOG_CHARS = 65536
_SLACK_S = 15.0
"""How much longer than its own time the end of a service may take, on a node that is there."""
_LOGS_S = 3.0
_ENDED_KEPT_S = 60.0
"""So long a node keeps what has ended: its log may be asked for, and it may be begun again."""
_GONE = "gone"
"""State of a service that is lost for good, in its row."""
_LOGS_KEPT = 1000
_USAGE_KEPT_S = 30.0
"""What a node said of what its services use is of now for so long."""


class JoinedNodes:
    """See `Orchestrator`; what nodes call is at the end. Safe from any thread.

    Args:
        folder: of the files that travel with services; private.
        broadcast: wakes those who wait for `told` to answer something new.
    """

    def __init__(self, folder: Path, database: sa.Engine, clock: Clock, broadcast: Broadcast) -> None:
        self.store = NodeStore(database, clock)
        self._folder = folder
        self._services = ServiceStore(database)
        self._clock = clock
        self._broadcast = broadcast
        self._watchers = Watchers()
        self._any = bool(self._services.services())
        self._deploying = threading.Lock()
        self._changed = threading.Condition()  # guards all below
        self._logs: OrderedDict[str, str] = OrderedDict()
        self._logs_wanted: dict[str, set[str]] = {}
        self._ended_since: dict[str, float] = {}
        self._used: dict[str, tuple[float, ServiceUsage]] = {}

    # the port

    @property
    def runs_images(self) -> bool:
        return False

    @property
    def host(self) -> str:
        return LOOPBACK

    def address(self, spec: ServiceSpec) -> str:
        raise InvalidInputError(f"service {spec.name} is on a joined node, which nobody can call")

    def expect(self, image: str) -> None:
        """Nodes fetch what they are told of."""

    def deploy(self, spec: ServiceSpec) -> None:
        if spec.node is None or spec.image is not None or spec.environment:
            raise InvalidInputError(
                f"service {spec.name} is an image, has an environment or names no node - joined nodes are "
                "told assignments only"
            )
        node = self.store.node(spec.node)
        contents = {file.name: file.content for file in spec.files}
        assignment = json.loads(contents.pop(ASSIGNMENT, b"{}"))
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        wanted = {"node": node.name, "project": spec.project, "role": spec.role, "assignment": assignment}
        with self._deploying:
            before = self._services.service(spec.name)
            if before is not None and (status := self._status(before)).live:
                if not before.same(files=hashes, **wanted):
                    raise ConflictError(
                        f"service {spec.name} is {status.state} with another spec - stop it first"
                    )
                return
            encoded = {name: base64.b64encode(content).decode() for name, content in contents.items()}
            write_private_json(self._file(spec.name), encoded)
            self._any = True
            self._services.want(spec.name, files=hashes, **wanted)
        self._wake(node.name)

    def stop(self, name: ServiceName, grace_s: float = 2.0) -> None:
        self.stop_many([name], grace_s)

    def stop_many(self, names: Iterable[ServiceName], grace_s: float = 2.0) -> None:
        known = {service.name: service for service in self._services.services()}
        stopped = []
        for name in names:
            if name not in known:
                raise unknown_service(name)
            if known[name].wanted or known[name].live:
                stopped.append(name)
        self._services.unwant(stopped)
        for node in {known[name].node for name in stopped}:
            self._wake(node)
        deadline = time.monotonic() + grace_s + _SLACK_S
        with self._changed:
            while time.monotonic() < deadline and any(self._ends(name) for name in stopped):
                self._changed.wait(0.5)  # a node may also go away
        for name in stopped:
            service = self._services.service(name)
            if service is not None and service.live and not service.wanted:
                # Its node ends it once it hears of it; nobody here has to wait for that.
                self._settle([service], "exited", f"stopped; node {service.node} ends it when it is back")

    def remove(self, name: ServiceName) -> None:
        self.stop(name)
        self._forget([name])

    def list(self, project: str | None = None) -> Statuses:
        if not self._any:
            return []
        nodes = {node.name: node for node in self.store.nodes(gone=True)}
        return [self._status(one, nodes.get(one.node)) for one in self._services.services(project=project)]

    def watch(self, callback: Watcher) -> Subscription:
        return self._watchers.add(callback)

    def logs(self, name: ServiceName, tail_bytes: int = 65536) -> str:
        service = self._services.service(name)
        if service is None:
            raise unknown_service(name)
        node = self._node(service.node)
        if node is not None and node.ready(self._clock.now()):
            self._ask_for_log(service)
        with self._changed:
            text = self._logs.get(name, "").encode()
        tail = text[max(0, len(text) - tail_bytes) :]
        if len(tail) < len(text):
            tail = tail.partition(b"\n")[2]
        return tail.decode(errors="replace")

    def remove_project(self, project: str) -> None:
        names = [ServiceName(service.name) for service in self._services.services(project=project)]
        self.stop_many(names)
        self._forget(names)

    def nodes(self) -> Sequence[Node]:
        """Those that have not left."""
        now = self._clock.now()
        return [
            Node(node.name, node.platform, node.cpus, node.memory_mb, address="", ready=node.ready(now))
            for node in self.store.nodes()
        ]

    def usage(self) -> Sequence[ServiceUsage]:
        """What their nodes said lately."""
        now = self._clock.monotonic()
        with self._changed:
            return [usage for at, usage in self._used.values() if now - at < _USAGE_KEPT_S]

    def close(self) -> None:
        """Nothing is held that must be let go."""

    # what nodes call

    def heard(
        self,
        node: JoinedNode,
        *,
        known: int,
        allowance: Mapping[str, Any],
        holdings: Iterable[Mapping[str, Any]],
        services: Iterable[Seen],
        logs: Mapping[str, str],
        usage: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """A node said what it allows, what it holds, what runs there and what that uses."""
        self.store.heard(node, allowance, holdings)
        changed = self._services.seen(node.name, known, services)
        usage = usage or {}
        own = set()
        if logs or usage:
            own = {service.name for service in self._services.services(node=node.name)}
        with self._changed:
            for name in own.intersection(usage):
                used = ServiceUsage(ServiceName(name), **usage[name])
                self._used[name] = self._clock.monotonic(), used
            for name, text in logs.items():
                if name in own:
                    self._logs[name] = text[-MAX_LOG_CHARS:]
                    self._logs.move_to_end(name)
                    self._logs_wanted.get(node.name, set()).discard(name)
            while len(self._logs) > _LOGS_KEPT:
                self._logs.popitem(last=False)
            self._changed.notify_all()
        for service in changed:
            self._watchers.deliver(self._status(service))

    def told(self, node: JoinedNode, known: int, *, always: bool = False) -> dict[str, Any] | None:
        """What is wanted of a node; None: it knows the set of number ``known`` already.

        Args:
            always: say it again then.
        Raises:
            UnauthorizedError: the node has left meanwhile.
        """
        self.store.check(node)
        number, wanted = self._services.wanted(node.name)
        if over := self._over_for_long(wanted):
            self._services.unwant(over)
            number, wanted = self._services.wanted(node.name)
        with self._changed:
            logs = sorted(self._logs_wanted.get(node.name, ()))
        if number == known and not logs and not always:
            return None
        told = [told for service in wanted if (told := self._assigned(service)) is not None]
        return {"number": number, "wanted": told, "logs": logs}

    def assignment(self, node: JoinedNode, project: str) -> dict[str, Any] | None:
        """What a node is wanted to do for a project; None: nothing."""
        _, wanted = self._services.wanted(node.name)
        return next((service.assignment for service in wanted if service.project == project), None)

    def listen(self, node: str, listener: Listener) -> Callable[[], None]:
        """Call back when `told` may have something new; answers what ends that."""
        return self._broadcast.listen(_key(node), listener)

    def join(self, token: str, **machine: Any) -> tuple[JoinedNode, str]:
        """See `NodeStore.join`."""
        node, credential = self.store.join(token, **machine)
        self._lose_all(node)  # of an earlier one of this name, where its end was cut off
        return node, credential

    def leave(self, name: str, reason: str) -> JoinedNode:
        """A node has left, or was made to: its credential is dead, what ran there is lost.

        Raises:
            NotFoundError: no machine has joined under this name.
        """
        node = self.store.leave(name, reason)
        self._lose_all(node)
        with self._changed:
            self._logs_wanted.pop(name, None)
            self._changed.notify_all()
        self._wake(name)
        return node

    def _over_for_long(self, wanted: Sequence[NodeService]) -> Sequence[str]:
        """Which of them ended a while ago: their node may forget them."""
        now = self._clock.monotonic()
        with self._changed:
            for service in wanted:
                if service.live:
                    self._ended_since.pop(service.name, None)
            ended = [service.name for service in wanted if not service.live]
            since = {name: self._ended_since.setdefault(name, now) for name in ended}
            over = [name for name, then in since.items() if now - then >= _ENDED_KEPT_S]
            for name in over:
                del self._ended_since[name]
        return over

    def _assigned(self, service: NodeService) -> dict[str, Any] | None:
        """None: what travels with it is not there, as after a restore: it is lost."""
        try:
            files = json.loads(self._file(service.name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._settle([service], _GONE, "what it was told is not there any more")
            return None
        return {
            "name": service.name,
            "project": service.project,
            "digest": service.digest,
            "assignment": service.assignment,
            "files": files,
        }

    def _lose_all(self, node: JoinedNode) -> None:
        live = [service for service in self._services.services(node=node.name) if service.live]
        why = node.gone_reason or "it has joined anew"
        self._settle(live, _GONE, f"node {node.name} is gone: {why}")

    def _status(self, service: NodeService, node: JoinedNode | None = None) -> ServiceStatus:
        node = node or self._node(service.node)
        state, reason, now = service.state, service.reason, self._clock.now()
        # Refused by its owner, or not to be prepared there. What a node itself calls lost, after it was
        # started anew, is worth another attempt.
        final = state == "failed" and service.exit_code is None
        if state == _GONE:
            state, final = "lost", True
        if service.live and (node is None or node.lost(now)):
            state, final = "lost", True
            reason = f"node {service.node} was not heard of for {LOST_S / 60:g} minutes"
            if node is None or node.gone is not None:
                reason = f"node {service.node} is gone"
        elif service.live and node is not None and not node.ready(now):
            state, reason = "pending", f"node {service.node} is away"
        return ServiceStatus(
            name=ServiceName(service.name),
            state=cast("ServiceState", state),  # one of those, at every door
            exit_code=service.exit_code,
            reason=reason,
            restarts=service.restarts,
            started_at=service.started_at,
            pid=None,
            role=service.role,
            project=service.project,
            node=service.node,
            final=final,
        )

    def _node(self, name: str) -> JoinedNode | None:
        with suppress(NotFoundError):
            return self.store.node(name)
        return None

    def _ends(self, name: str) -> bool:
        """Whether the end of a service is worth waiting for."""
        service = self._services.service(name)
        if service is None or not service.live:
            return False
        node = self._node(service.node)
        return node is not None and node.ready(self._clock.now())

    def _settle(self, services: Sequence[NodeService], state: str, reason: str) -> None:
        names = [service.name for service in services]
        self._services.settle(names, state, reason)
        for name in names:
            after = self._services.service(name)
            if after is not None:
                self._watchers.deliver(self._status(after))

    def _ask_for_log(self, service: NodeService) -> None:
        deadline = time.monotonic() + _LOGS_S
        with self._changed:
            self._logs_wanted.setdefault(service.node, set()).add(service.name)
        self._wake(service.node)
        with self._changed:
            while service.name in self._logs_wanted.get(service.node, ()):
                if (left := deadline - time.monotonic()) <= 0:
                    self._logs_wanted[service.node].discard(service.name)
                    return
                self._changed.wait(left)

    def _forget(self, names: Sequence[str]) -> None:
        self._services.forget(names)
        with self._changed:
            for name in names:
                self._logs.pop(name, None)
                self._used.pop(name, None)
                self._ended_since.pop(name, None)
        for name in names:
            self._file(name).unlink(missing_ok=True)

    def _wake(self, node: str) -> None:
        self._broadcast.notify(_key(node))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def _key(node: str) -> str:
    """Among what is broadcast: no project is called so."""
    return f"node {node}"
