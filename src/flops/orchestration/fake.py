"""An orchestrator without processes, for tests of everything that deploys services.

It keeps the port's promises (it passes the contract suite) and adds the levers a test needs: `exit`,
`lose`, `write_log`, `refuse`. Differences from real adapters: watchers are called before the method
that caused the change returns, in the caller's thread, and restarts do not pause.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from flops.core.clock import Clock, ManualClock
from flops.core.errors import ConflictError, FailedError
from flops.core.ids import ServiceName
from flops.orchestration.ending import judge, restarted_after
from flops.orchestration.port import (
    LIVE_STATES,
    LOOPBACK,
    Node,
    ServiceSpec,
    ServiceState,
    ServiceStatus,
    ServiceUsage,
    Statuses,
    Subscription,
    Watcher,
    loopback_address,
    unknown_service,
)
from flops.orchestration.watchers import Watchers

_NODE = Node("fake-node", "linux/amd64", cpus=4, memory_mb=8000)
_IDLE = ServiceUsage(ServiceName(""), cpu_s=0.0, memory_bytes=1_000_000, threads=1)


@dataclass
class _Service:
    spec: ServiceSpec
    status: ServiceStatus
    log: str = ""


class FakeOrchestrator:
    """See `Orchestrator` for the methods of the port.

    Args:
        nodes: what `nodes` answers.
        clock: stamps `started_at`.
        runs_images: what `runs_images` answers.
    """

    def __init__(
        self,
        nodes: Sequence[Node] = (_NODE,),
        clock: Clock | None = None,
        *,
        runs_images: bool = False,
    ) -> None:
        self._runs_images = runs_images
        self._nodes = tuple(nodes)
        self._clock = clock or ManualClock()
        self._lock = threading.RLock()
        self._services: dict[ServiceName, _Service] = {}
        self._watchers = Watchers()
        self._news: deque[ServiceStatus] = deque()
        self._refused: dict[str, str] = {}
        self._used: dict[str, ServiceUsage] = {}
        self._pids = itertools.count(1_000_000_000)  # beyond real pids: none is signalled by mistake

    # levers
    def exit(self, name: ServiceName, code: int = 0) -> None:
        """The running service ends by itself; negative codes are signals. Restarts as its spec says."""
        with self._lock:
            service = self._running(name)
            status = service.status
            verdict = judge(service.spec, code, restarts=status.restarts, stopping=False, backoff_s=0.0)
            self._change(service, verdict.state, verdict.reason, exit_code=code, pid=None)
            if verdict.restart_in_s is not None:
                self._start(service, restarts=status.restarts + 1)
        self._deliver()

    def lose(self, name: ServiceName, reason: str = "its node is gone") -> None:
        """The running service vanishes and nobody knows how it ended."""
        with self._lock:
            self._change(self._running(name), "lost", reason, exit_code=None, pid=None)
        self._deliver()

    def write_log(self, name: ServiceName, text: str) -> None:
        """The service prints something."""
        with self._lock:
            self._get(name).log += text

    def use(self, name: ServiceName, usage: ServiceUsage) -> None:
        """From now on the service uses this."""
        with self._lock:
            self._used[name] = usage

    def refuse(self, program: str, reason: str = "there is no such program") -> None:
        """From now on deployments whose command starts with ``program`` fail."""
        self._refused[program] = reason

    def spec(self, name: ServiceName) -> ServiceSpec:
        """What was deployed under this name."""
        with self._lock:
            return self._get(name).spec

    # the port
    @property
    def runs_images(self) -> bool:
        return self._runs_images

    @property
    def host(self) -> str:
        return LOOPBACK

    def address(self, spec: ServiceSpec) -> str:
        return loopback_address(spec)

    def expect(self, image: str) -> None:
        """Nothing is ever pulled."""

    def deploy(self, spec: ServiceSpec) -> None:
        with self._lock:
            existing = self._services.get(spec.name)
            if existing is not None and existing.status.live:
                if existing.spec != spec:
                    raise ConflictError(
                        f"service {spec.name} is {existing.status.state} with another spec - stop it first"
                    )
                return
            if (reason := self._refused.get(spec.command[0])) is not None:
                raise FailedError(
                    f"service {spec.name} cannot start '{spec.command[0]}': {reason} - check its command"
                )
            log = existing.log if existing is not None else ""
            node = spec.node or self._nodes[0].name
            status = ServiceStatus(
                *(spec.name, "pending", None, "", 0, None, None, spec.role, spec.project),
                node=node,
                endpoint=loopback_address(spec) if spec.publish else None,
            )
            service = self._services[spec.name] = _Service(spec, status, log)
            self._start(service, restarts=0)
        self._deliver()

    def stop(self, name: ServiceName, grace_s: float = 2.0) -> None:
        self.stop_many([name], grace_s)

    def stop_many(self, names: Iterable[ServiceName], grace_s: float = 2.0) -> None:
        with self._lock:
            for service in [self._get(name) for name in names]:
                if service.status.live:
                    self._change(service, "exited", "stopped", exit_code=-15, pid=None)
        self._deliver()

    def remove(self, name: ServiceName) -> None:
        self.stop(name)
        with self._lock:
            self._services.pop(name, None)

    def list(self, project: str | None = None) -> Statuses:
        with self._lock:
            statuses = [service.status for _, service in sorted(self._services.items())]
        return [status for status in statuses if project in (None, status.project)]

    def watch(self, callback: Watcher) -> Subscription:
        return self._watchers.add(callback)

    def logs(self, name: ServiceName, tail_bytes: int = 65536) -> str:
        with self._lock:
            text = self._get(name).log.encode()
        tail = text[max(0, len(text) - tail_bytes) :]
        if len(tail) < len(text):
            tail = tail.partition(b"\n")[2]
        return tail.decode(errors="replace")

    def remove_project(self, project: str) -> None:
        for status in self.list(project):
            self.remove(status.name)

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def usage(self) -> Sequence[ServiceUsage]:
        with self._lock:
            running = sorted(n for n, s in self._services.items() if s.status.state == "running")
            return [replace(self._used.get(name, _IDLE), name=name) for name in running]

    def close(self) -> None:
        """Nothing is held that must be let go."""

    def _get(self, name: ServiceName) -> _Service:
        service = self._services.get(name)
        if service is None:
            raise unknown_service(name)
        return service

    def _running(self, name: ServiceName) -> _Service:
        service = self._get(name)
        if service.status.state != "running":
            raise ConflictError(f"service {name} is {service.status.state} - only a running one ends")
        return service

    def _start(self, service: _Service, restarts: int) -> None:
        service.status = replace(service.status, restarts=restarts, started_at=self._clock.now())
        reason = restarted_after(service.status.exit_code) if restarts else ""
        self._change(service, "running", reason, service.status.exit_code, next(self._pids))

    def _change(
        self,
        service: _Service,
        state: ServiceState,
        reason: str,
        exit_code: int | None,
        pid: int | None,
    ) -> None:
        assert service.status.state in LIVE_STATES
        service.status = replace(service.status, state=state, reason=reason, exit_code=exit_code, pid=pid)
        self._news.append(service.status)

    def _deliver(self) -> None:
        while self._news:
            self._watchers.deliver(self._news.popleft())
