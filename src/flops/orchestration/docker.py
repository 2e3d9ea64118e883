"""The orchestrator of one Docker engine, on this machine: services are containers of it.

A service is one container, which is started again for each attempt: its log goes on, and reasons, pauses
and limits of restarts are ours and the same as everywhere. What must not be in its environment or command
line lies in a volume of its own. A project is a network, in which services find each other by their names.

Durability: the intent is on disk before the engine is asked, and all that we make carries our label, so
that the next manager adopts what is known and removes what is not. A service's end is known even when
nobody watched. Concurrency: one lock guards the records and is never held while the engine works; a
service on which the engine works is busy, and others wait for that one only. One thread (`EngineEvents`)
sees the ends, restarts and calls the watchers. Belongs to one manager at a time.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from flops.core.clock import Clock, SystemClock
from flops.core.disk import disk_full, is_full
from flops.core.errors import (
    ConflictError,
    FailedError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from flops.core.ids import ServiceName
from flops.orchestration import logfile
from flops.orchestration.container_stats import consumed
from flops.orchestration.containers import (
    Engine,
    Names,
    describe_end,
    exit_code_of,
    images_only,
    judge_container,
    last_lines,
)
from flops.orchestration.deployments import Deployment
from flops.orchestration.ending import SETTLED_S
from flops.orchestration.engine_events import EngineEvents
from flops.orchestration.port import (
    LOOPBACK,
    Node,
    ServiceSpec,
    ServiceStatus,
    ServiceUsage,
    Statuses,
    Subscription,
    Watcher,
    loopback_address,
    unknown_service,
)
from flops.orchestration.service_containers import ServiceContainers
from flops.orchestration.service_files import ServiceFiles
from flops.orchestration.watchers import Watchers

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_DEFAULT_URL = "unix:///var/run/docker.sock"
_LOG_LIMIT_BYTES = 10 << 20
_KILL_TIMEOUT_S = 15.0
_REFUSED_PAUSE_S = 0.5
_AWAY_PAUSE_S = 2.0
_AT_ONCE = 8


@dataclass
class _Service:
    deployment: Deployment
    busy: bool = False
    """The engine is asked to start or remove its container."""
    restart_at: float | None = None
    """On the clock's monotonic time; only while pending."""

    def should_run(self) -> bool:
        return self.deployment.live and not self.busy and self.restart_at is None


class DockerOrchestrator:
    """See `Orchestrator`. The constructor adopts what an earlier one left.

    Args:
        state_dir: one JSON file per service; made with mode 700.
        logs_dir: what containers printed that are gone by now, one file per service.
        home: tells our things from those of others on the engine: `containers.home_id` of FLOPS_HOME.
        url: of the engine, ``unix:///...``: it runs on this machine; None: ``DOCKER_HOST``, else Docker's
            usual socket.
        advertise: address at which containers reach this machine; None: the engine's bridge.
        backoff_s: pause before a first restart; doubles with each further one, until an attempt has lived for
            `SETTLED_S`.
        labels: what `nodes` says about this machine, besides the labels of the engine.
    Raises:
        UnavailableError: the engine does not answer.
        InvalidInputError: it is on another machine, or ``advertise`` is needed.
    """

    def __init__(
        self,
        state_dir: Path,
        logs_dir: Path,
        *,
        home: str,
        url: str | None = None,
        advertise: str | None = None,
        clock: Clock | None = None,
        backoff_s: float = 0.5,
        labels: Mapping[str, str] | None = None,
        may_act: Callable[[], bool] = lambda: True,
    ) -> None:
        url = url or os.environ.get("DOCKER_HOST") or _DEFAULT_URL
        if not url.startswith("unix://"):
            raise InvalidInputError(
                f"the Docker engine at {url} is not of this machine - name the socket of one that is,"
                " or use the orchestrator 'swarm'"
            )
        self._clock = clock or SystemClock()
        self._may_act = may_act
        self._backoff_s = backoff_s
        self._labels = dict(labels or {})
        self._records = ServiceFiles(state_dir, Deployment.from_json)
        self._logs_dir = logs_dir
        logs_dir.mkdir(parents=True, exist_ok=True)

        self._watchers = Watchers()
        self._changed = threading.Condition(threading.RLock())  # guards all below
        self._services: dict[ServiceName, _Service] = {}
        self._news: deque[ServiceStatus] = deque()

        self._engine = Engine(url)
        self._names = Names(home)
        self._containers = ServiceContainers(self._engine, self._names)
        try:
            self._machine = self._containers.machine()
            self._host = advertise or self._containers.bridge_address()
            with self._changed:
                self._adopt()
        except BaseException:
            self._engine.close()
            raise
        self._events = EngineEvents(
            self._engine,
            {"type": "container", "event": ["die", "destroy"], **self._names.mine()},
            lambda event: str(event.get("id", "")),
            self._step,
            name="flops-docker",
        )
        self._events.start()

    # the port
    @property
    def runs_images(self) -> bool:
        return True

    @property
    def host(self) -> str:
        return self._host

    def address(self, spec: ServiceSpec) -> str:
        return f"{spec.name}:{loopback_address(spec).rpartition(':')[2]}"

    def expect(self, image: str) -> None:
        def pull() -> None:
            with suppress(FlopsError):
                self._containers.pull(image, self._machine.platform)

        threading.Thread(target=pull, name="flops-pull", daemon=True).start()

    def deploy(self, spec: ServiceSpec) -> None:
        image = images_only(spec)
        if spec.node not in (None, self._machine.name):
            raise InvalidInputError(
                f"service {spec.name} is to run on node {spec.node}, and there is only {self._machine.name}"
                " - leave the node out, or use the orchestrator 'swarm'"
            )
        with self._changed:
            if self._is_deployed(spec):
                return
        with _as_failure():
            self._containers.pull(image, self._machine.platform)
        with self._changed:
            if self._is_deployed(spec):
                return
            before = self._services.get(spec.name)
            service = _Service(Deployment.of(spec), busy=True)
            self._save(service.deployment)
            self._services[spec.name] = service
        try:
            with _as_failure():
                self._launch(service.deployment, spec)
        except BaseException:
            self._take_back(service, before)
            raise
        if before is not None:
            with suppress(FlopsError):  # what stays is swept once the engine answers again
                self._bury(before.deployment)
        self._started(service)

    def stop(self, name: ServiceName, grace_s: float = 2.0) -> None:
        self.stop_many([name], grace_s)

    def stop_many(self, names: Iterable[ServiceName], grace_s: float = 2.0) -> None:
        if self._events.acts_here():
            raise RuntimeError("a watcher must not stop services: it would wait for itself")
        with self._changed:
            services = [service for name in names if (service := self._get(name)).deployment.live]
            for service in services:
                self._ask_to_end(service)
        self._events.wake()
        self._signal(services, "SIGTERM")
        if self._have_ended(services, grace_s):
            return
        self._signal(services, "SIGKILL")
        if self._have_ended(services, _KILL_TIMEOUT_S):
            return
        if (away := self._events.away) is not None:
            raise away
        stuck = ", ".join(s.deployment.spec.name for s in services if s.deployment.live)
        raise FailedError(
            f"services {stuck} did not end within {_KILL_TIMEOUT_S:g} s of SIGKILL - see 'docker ps' for why"
        )

    def remove(self, name: ServiceName) -> None:
        self.stop(name)
        with self._changed:
            service = self._get(name)
            if service.deployment.live or service.busy:
                raise ConflictError(f"service {name} was deployed again meanwhile - remove it anew")
            service.busy = True
        try:
            self._containers.discard(service.deployment)
            with self._changed:
                del self._services[name]
                self._records.delete(name)
                self._log_path(name).unlink(missing_ok=True)
        finally:
            self._set_free(service)

    def list(self, project: str | None = None) -> Statuses:
        if self._events.away is not None:
            with self._engine.asking("nobody knows how services are"):
                self._engine.api.ping()
        with self._changed:
            statuses = [service.deployment.status() for service in self._services.values()]
        statuses.sort(key=lambda status: status.name)
        return [status for status in statuses if project in (None, status.project)]

    def watch(self, callback: Watcher) -> Subscription:
        return self._watchers.add(callback)

    def logs(self, name: ServiceName, tail_bytes: int = 65536) -> str:
        with self._changed:
            container = self._get(name).deployment.container
        earlier = logfile.read_tail(self._log_path(name), tail_bytes).encode()
        present = b"" if container is None else self._containers.printed(container, tail_bytes)
        return last_lines(earlier + present, tail_bytes)

    def remove_project(self, project: str) -> None:
        names = [status.name for status in self.list(project)]
        with suppress(NotFoundError):  # one that another caller removed: each is stopped below anyway
            self.stop_many(names)
        for name in names:
            with suppress(NotFoundError):
                self.remove(name)
        self._containers.remove_volumes(f"{project}-")
        self._containers.remove_network(project)

    def nodes(self) -> Sequence[Node]:
        machine = self._machine = self._containers.machine()
        return [
            Node(
                name=machine.name,
                platform=machine.platform,
                cpus=machine.cpus,
                memory_mb=machine.memory_mb,
                labels={**machine.labels, **self._labels},
                address=self._host,
            )
        ]

    def usage(self) -> Sequence[ServiceUsage]:
        return consumed(self._engine, self._names)

    def close(self) -> None:
        self._events.close()
        self._engine.close()

    # records
    def _get(self, name: ServiceName) -> _Service:
        service = self._services.get(name)
        if service is None:
            raise unknown_service(name)
        return service

    def _is_deployed(self, spec: ServiceSpec) -> bool:
        """Whether this very spec is live; the lock is held, and let go of while the service is busy."""
        while (service := self._services.get(spec.name)) is not None and service.busy:
            self._changed.wait()
        if service is None or not service.deployment.live:
            return False
        if service.deployment.stopping:
            raise ConflictError(f"service {spec.name} is being stopped - deploy it once it has ended")
        if service.deployment.digest != Deployment.of(spec).digest:
            raise ConflictError(
                f"service {spec.name} is {service.deployment.state} with another spec - stop it first"
            )
        return True

    def _log_path(self, name: ServiceName) -> Path:
        return self._logs_dir / f"{name}.log"

    def _announce(self, deployment: Deployment) -> None:
        self._news.append(deployment.status())
        self._changed.notify_all()

    def _save(self, deployment: Deployment) -> None:
        name = deployment.spec.name
        try:
            self._records.save(deployment)
        except OSError as error:
            if is_full(error):
                raise disk_full(self._logs_dir, f"service {name}") from error
            raise FailedError(
                f"service {name} cannot start: its state cannot be written: {error}"
                " - check the disk and the rights of the folder"
            ) from error

    def _save_late(self, deployment: Deployment) -> None:
        """Save what has already happened; a full disk must not stop us from seeing the rest."""
        try:
            self._records.save(deployment)
        except OSError:
            _log.exception("the state of service %s was not saved", deployment.spec.name)

    def _set_free(self, service: _Service) -> None:
        with self._changed:
            service.busy = False
            self._changed.notify_all()

    # starting
    def _launch(self, deployment: Deployment, spec: ServiceSpec) -> None:
        """Make the container of a busy service and start it; who calls takes back what there is otherwise."""
        if spec.network == "project":
            self._have_network(spec.project)
        deployment.container = self._containers.make(deployment, spec, self._machine.cpus)
        self._look(deployment, self._containers.start(deployment))

    def _have_network(self, project: str) -> None:
        try:
            self._containers.make_network(project)
        except UnavailableError:
            if not self._prune_networks():
                raise
            self._containers.make_network(project)

    def _prune_networks(self) -> int:
        def live() -> set[str]:
            with self._changed:
                return {s.deployment.spec.project for s in self._services.values() if s.deployment.live}

        return self._containers.prune_networks(live)

    def _look(self, deployment: Deployment, details: Mapping[str, Any]) -> None:
        """Note where a running container is."""
        deployment.pid = details["State"]["Pid"] or None
        deployment.node = self._machine.name
        deployment.endpoint = None
        if deployment.spec.publish:
            bindings = details["NetworkSettings"]["Ports"].get(f"{deployment.spec.port}/tcp") or []
            deployment.endpoint = next((f"{LOOPBACK}:{binding['HostPort']}" for binding in bindings), None)

    def _started(self, service: _Service) -> None:
        """The container of a busy service runs, or has run: it is busy no more."""
        deployment = service.deployment
        with self._changed:
            deployment.state = "running"
            deployment.started_at = self._clock.now()
            deployment.reason = f"restarted after {deployment.ending}" if deployment.restarts else ""
            self._save_late(deployment)
            self._announce(deployment)
            service.busy = False
            stopping = deployment.stopping
        if stopping:  # asked for while the engine was starting it
            self._signal([service], "SIGKILL")
        self._events.tell(str(deployment.container))

    def _take_back(self, service: _Service, before: _Service | None) -> None:
        """The deployment failed: all is as it was."""
        name = service.deployment.spec.name
        with self._changed:
            if before is None:
                del self._services[name]
                self._records.delete(name)
            else:
                self._services[name] = before
                self._save_late(before.deployment)
            service.busy = False
            self._changed.notify_all()
        try:
            self._containers.discard(service.deployment)
            self._prune_networks()
        except FlopsError as error:
            _log.warning("what a failed deployment left is removed later: %s", error)

    # ending
    def _ask_to_end(self, service: _Service) -> None:
        deployment = service.deployment
        deployment.stopping = True
        if service.restart_at is not None:  # between two attempts
            service.restart_at = None
            deployment.state, deployment.reason = "exited", "stopped"
            self._announce(deployment)
        self._save_late(deployment)

    def _signal(self, services: Sequence[_Service], signal: str) -> None:
        """Send a signal to those that run; who is busy learns of it afterwards (`stopping`)."""
        with self._changed:
            containers = [
                service.deployment.container
                for service in services
                if service.should_run() and service.deployment.container is not None
            ]

        def send(container: str) -> None:
            self._containers.signal(container, signal)
            self._events.tell(container)  # it may have ended before

        _at_once(send, containers)

    def _have_ended(self, services: Sequence[_Service], timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: not any(service.deployment.live for service in services), timeout=timeout_s
            )

    def _step(self, told: Collection[str], everything: bool) -> float | None:
        """One turn of the acting thread; returns after how many seconds the next one is due."""
        try:
            if everything:
                self._look_at_all()
            else:
                with self._changed:
                    named = [s for s in self._services.values() if s.deployment.container in told]
                for service in named:
                    self._observe(service)
            with self._changed:
                now = self._clock.monotonic()
                due = [s for s in self._services.values() if s.restart_at is not None and s.restart_at <= now]
                if not self._may_act():
                    for waits in due:
                        waits.restart_at = now + _REFUSED_PAUSE_S
                    due = []
            _at_once(self._restart, due)
        finally:
            self._deliver()
        with self._changed:
            times = [s.restart_at for s in self._services.values() if s.restart_at is not None]
        return max(0.0, min(times) - self._clock.monotonic()) if times else None

    def _observe(self, service: _Service) -> None:
        """Look at the container of a live service, and act on what became of it."""
        deployment = service.deployment
        with self._changed:
            container = deployment.container
            if container is None or not service.should_run():
                return
        details = self._containers.look(container)
        with self._changed:
            if not service.should_run():
                return
            if details is None:
                self._lose(deployment)
            elif not details["State"]["Running"]:
                self._end(service, details["State"])

    def _lose(self, deployment: Deployment) -> None:
        if deployment.stopping:
            deployment.state, deployment.reason = "exited", "stopped"
        else:
            deployment.state, deployment.reason = "lost", "its container was removed by somebody"
        deployment.exit_code, deployment.container = None, None
        self._save_late(deployment)
        self._announce(deployment)

    def _end(self, service: _Service, state: Mapping[str, Any]) -> None:
        deployment = service.deployment
        code, out_of_memory = exit_code_of(state["ExitCode"]), bool(state["OOMKilled"])
        if deployment.started_at is not None and self._clock.now() - deployment.started_at >= SETTLED_S:
            deployment.quick_ends = 0
        verdict = judge_container(
            deployment.spec,
            code,
            out_of_memory=out_of_memory,
            restarts=deployment.restarts,
            stopping=deployment.stopping,
            backoff_s=self._backoff_s,
            quick_ends=deployment.quick_ends,
        )
        deployment.quick_ends += 1
        deployment.state, deployment.reason = verdict.state, verdict.reason
        deployment.exit_code = code
        deployment.ending = describe_end(deployment.spec, code, out_of_memory)
        if verdict.restart_in_s is not None:
            service.restart_at = self._clock.monotonic() + verdict.restart_in_s
        self._save_late(deployment)
        self._announce(deployment)

    def _restart(self, service: _Service) -> None:
        deployment = service.deployment
        with self._changed:
            if service.restart_at is None:  # stopped meanwhile
                return
            service.restart_at = None
            service.busy = True
            deployment.restarts += 1
            self._save_late(deployment)
        try:
            self._look(deployment, self._containers.start(deployment))
        except UnavailableError as error:
            _log.warning("%s", error)
            with self._changed:
                service.busy = False
                deployment.restarts -= 1
                service.restart_at = self._clock.monotonic() + _AWAY_PAUSE_S
                if deployment.stopping:
                    self._ask_to_end(service)
        except FlopsError as error:
            gone = self._containers.look(str(deployment.container)) is None
            with self._changed:
                service.busy = False
                if gone or deployment.stopping:
                    self._lose(deployment)
                else:
                    deployment.state, deployment.reason = "failed", str(error)
                    self._save_late(deployment)
                    self._announce(deployment)
        else:
            self._started(service)

    def _deliver(self) -> None:
        while True:
            with self._changed:
                if not self._news:
                    return
                status = self._news.popleft()
            self._watchers.deliver(status)

    # removing
    def _bury(self, deployment: Deployment) -> None:
        """Remove a container that another one replaced; what it printed is kept."""
        if deployment.container is not None:
            name = deployment.spec.name
            printed = self._containers.printed(deployment.container, _LOG_LIMIT_BYTES)
            path = self._log_path(name)
            try:
                log = logfile.open_log(path)
                try:
                    os.write(log, printed)
                finally:
                    os.close(log)
                logfile.cap(path, _LOG_LIMIT_BYTES)
            except OSError:
                _log.exception("what service %s printed before was not kept", name)
        self._containers.discard(deployment)

    # adopting
    def _adopt(self) -> None:
        """Take over what an earlier manager left; nothing else touches the records yet."""
        deployments, broken = self._records.load()
        for path, why in broken:
            _log.error("state file set aside as %s, its container is removed: %s", path, why)
        for deployment in deployments:
            name = deployment.spec.name
            self._services[name] = service = _Service(deployment)
            if deployment.live and not self._take_over(service):
                del self._services[name]  # it was about to start: who asked for that asks again
                self._containers.discard(deployment)
                self._records.delete(name)
        self._sweep()
        self._news.clear()  # nobody watches yet; `list` tells

    def _take_over(self, service: _Service) -> bool:
        """Learn what became of a live service; whether it is worth keeping."""
        deployment = service.deployment
        details = self._containers.look(self._containers.name_of(deployment))
        first = deployment.started_at is None
        if details is None or details["State"]["Status"] == "created":
            if not first:
                self._lose(deployment)
            return not first
        deployment.container = details["Id"]
        state = details["State"]
        if state["Running"]:
            if deployment.state == "pending":
                deployment.state, deployment.started_at = "running", _stamp(state["StartedAt"])
                deployment.reason = "" if first else f"restarted after {deployment.ending}"
            self._look(deployment, details)
            self._save_late(deployment)
        elif deployment.state == "pending" and not first and not deployment.stopping:
            service.restart_at = self._clock.monotonic()  # it was due
        else:
            deployment.started_at = _stamp(state["StartedAt"])
            self._end(service, state)
        return True

    def _look_at_all(self) -> None:
        """The engine is heard again: see what became of services, complete what was asked meanwhile."""
        self._machine = self._containers.machine()
        self._sweep()
        with self._changed:
            services = [*self._services.values()]
        for service in services:
            self._observe(service)
        self._signal([s for s in services if s.deployment.stopping], "SIGKILL")

    def _sweep(self) -> None:
        def known() -> set[str]:
            with self._changed:
                return {service.deployment.key for service in self._services.values()}

        self._containers.sweep(known)


def _at_once(ask: Callable[[_T], None], targets: Sequence[_T]) -> None:
    """Ask the engine about several things, and wait for all; raises the first error."""
    if targets:
        with ThreadPoolExecutor(min(_AT_ONCE, len(targets))) as threads:
            list(threads.map(ask, targets))


@contextmanager
def _as_failure() -> Iterator[None]:
    """What the engine refuses is a failure to who deploys."""
    try:
        yield
    except (NotFoundError, InvalidInputError, ConflictError) as error:
        raise FailedError(str(error)) from error


def _stamp(text: str) -> float:
    """An engine's time, with nine digits after the dot, in seconds since 1970."""
    return datetime.fromisoformat(text.partition(".")[0].rstrip("Z") + "+00:00").timestamp()
