"""The orchestrator of a Docker Swarm: services on many machines, placed by Swarm, restarted by us.

Services use the networks of their nodes, each on a port of its own: nothing has to be set up between nodes,
and an address is known before there is a service. One that is to have no network gets an overlay network of
its own, in which there is nobody else and from which no way leads out.

Durability: all that the next manager has to know lies in the swarm, in labels of the services, and is written
with the order that it belongs to; an end is known even when nobody watched. Concurrency: Swarm tells of no
task in its events, so one thread asks for all of ours twice a second, decides and restarts; another calls the
watchers. One lock orders our requests that change something, one guards what is known and is never held
during a request. Belongs to one manager at a time.
"""

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flops.core.clock import Clock, SystemClock
from flops.core.errors import (
    ConflictError,
    FailedError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from flops.core.ids import ServiceName
from flops.orchestration import swarm_objects as objects
from flops.orchestration.container_stats import consumed
from flops.orchestration.containers import (
    Engine,
    Names,
    home_id,
    images_only,
    judge_container,
    last_lines,
)
from flops.orchestration.deployments import Deployment
from flops.orchestration.ending import SETTLED_S, describe_exit
from flops.orchestration.port import (
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
from flops.orchestration.swarm_objects import Place, Task
from flops.orchestration.swarm_requests import Sight, Swarm
from flops.orchestration.swarm_volumes import SwarmVolumes
from flops.orchestration.watchers import Watchers

_log = logging.getLogger(__name__)

_DEFAULT_URL = "unix:///var/run/docker.sock"
_POLL_S = 0.5
_WAITED_FOR_POLL_S = 0.1
_REFUSED_PAUSE_S = 0.5
_AWAY_S = 2.0
_SETTLE_S = 0.3
"""An init that finds no program to start says so within this time after its container was started."""
_PLACE_S = 2.0
"""How long the scheduler may find no node before we say that a service waits for one."""
_STOP_S = 30.0
"""How long an end may take beyond its grace: Swarm itself waits two seconds before it signals anything."""
_CLEAN_S = 15.0
_NOT_FOUND_CODES = (126, 127)
_NO_IMAGE = "No such image"


@dataclass
class _Service:
    deployment: Deployment
    id: str = ""
    task: Task | None = None
    """Of the present attempt."""
    deploying: bool = False
    """`deploy` waits to hear how its start goes."""
    failure: FlopsError | None = None
    """Why it does not start; only while deploying."""
    doubtful: bool = False
    """Deploying, and it ended as if there were no such program."""
    since: float = 0.0
    """While deploying: when it was first seen running, or waiting for a node; on the monotonic clock."""
    restart_at: float | None = None
    unsaved: bool = False
    """Its label says something older."""


class SwarmOrchestrator:
    """See `Orchestrator`. The constructor adopts what an earlier one left.

    Args:
        url: of the engine of one of the swarm's managers; None: ``DOCKER_HOST``, else Docker's usual socket.
        home: FLOPS_HOME; tells our things from those of others in the swarm.
        advertise: address at which services reach this machine; None: the node's own, if the engine is on
            this machine, else the address from which the engine is reached.
        backoff_s: pause before a first restart; doubles with each further one, until an attempt has lived for
            `SETTLED_S`.
        stop_grace_s: how long services may take to end before they are killed. Swarm wants to know it when a
            service starts, so that the graces of `stop` are not looked at.
        start_timeout_s: how long a node may take to pull an image and start a service.
        python: of images, as `remove_project` uses it to empty volumes.
    Raises:
        UnavailableError: the engine does not answer.
        FailedError: it is not a manager of a swarm.
    """

    def __init__(
        self,
        url: str | None,
        home: Path,
        *,
        advertise: str | None = None,
        clock: Clock | None = None,
        backoff_s: float = 0.5,
        stop_grace_s: float = 3.0,
        start_timeout_s: float = 900.0,
        python: str = "/opt/flops/bin/python",
        may_act: Callable[[], bool] = lambda: True,
    ) -> None:
        self._clock = clock or SystemClock()
        self._may_act = may_act
        self._backoff_s = backoff_s
        self._stop_grace_s = stop_grace_s
        self._start_timeout_s = start_timeout_s
        self._names = Names(home_id(home))

        self._watchers = Watchers()
        self._news: queue.SimpleQueue[ServiceStatus | None] = queue.SimpleQueue()
        self._sweeping = threading.Lock()
        self._orders = threading.RLock()  # around requests that change something; taken before the next
        self._changed = threading.Condition(threading.RLock())  # guards all below
        self._services: dict[ServiceName, _Service] = {}
        self._nodes: dict[str, Node] = {}
        self._down: frozenset[str] = frozenset()
        self._littered = True
        self._hurried = 0
        self._away: FlopsError | None = None
        self._closing = False

        self._engine = Engine(url or os.environ.get("DOCKER_HOST") or _DEFAULT_URL)
        try:
            self._swarm = Swarm(self._engine, self._names)
            own_node = self._swarm.own_node()
            self._volumes = SwarmVolumes(self._engine, self._names, own_node, python)
            self._adopt()
            self._host = advertise or _address_towards(self._engine.url) or self._nodes[own_node].address
        except BaseException:
            self._engine.close()
            raise
        self._teller = threading.Thread(target=self._tell, name="flops-swarm-news", daemon=True)
        self._poller = threading.Thread(target=self._poll, name="flops-swarm", daemon=True)
        self._teller.start()
        self._poller.start()

    # the port
    @property
    def runs_images(self) -> bool:
        return True

    @property
    def host(self) -> str:
        return self._host

    def address(self, spec: ServiceSpec) -> str:
        port = loopback_address(spec).rpartition(":")[2]
        if spec.node is None or spec.network == "none":
            raise InvalidInputError(
                f"service {spec.name} has no address before it runs: in a swarm that is its node's"
                " - name its node, and give it the network of its project"
            )
        return f"{self._node_named(spec.node).address}:{port}"

    def expect(self, image: str) -> None:
        """Nodes pull by themselves, those that a task comes to."""

    def deploy(self, spec: ServiceSpec) -> None:
        images_only(spec)
        while True:
            with self._changed:
                if self._is_deployed(spec):
                    return
            with self._orders:
                with self._changed:
                    before = self._services.get(spec.name)
                    if before is not None and (before.deployment.live or before.deploying):
                        continue  # somebody was faster
                service = self._place(spec, before)
                with self._changed:
                    self._services[spec.name] = service
            break
        self._await_start(spec, service, before)

    def stop(self, name: ServiceName, grace_s: float = 2.0) -> None:
        self.stop_many([name], grace_s)

    def stop_many(self, names: Iterable[ServiceName], grace_s: float = 2.0) -> None:
        if threading.current_thread() is self._teller:
            raise RuntimeError("a watcher must not stop services: others would hear of the end too late")
        with self._orders:
            with self._changed:
                services = [service for name in names if (service := self._get(name)).deployment.live]
            for service in services:
                self._ask_to_end(service)
        if not services:
            return
        timeout_s = self._stop_grace_s + _STOP_S
        with self._hurry():
            if self._changed.wait_for(lambda: not any(s.deployment.live for s in services), timeout_s):
                return
            if self._away is not None:
                raise UnavailableError(str(self._away))
            stuck = ", ".join(s.deployment.spec.name for s in services if s.deployment.live)
        raise FailedError(
            f"services {stuck} did not end within {timeout_s:g} s - see 'docker service ps' for why"
        )

    def remove(self, name: ServiceName) -> None:
        self.stop(name)
        self._forget(name)
        self._await_collection()

    def list(self, project: str | None = None) -> Statuses:
        with self._changed:
            if self._away is not None:
                raise UnavailableError(str(self._away))
            statuses = [service.deployment.status() for service in self._services.values()]
        statuses.sort(key=lambda status: status.name)
        return [status for status in statuses if project in (None, status.project)]

    def watch(self, callback: Watcher) -> Subscription:
        return self._watchers.add(callback)

    def logs(self, name: ServiceName, tail_bytes: int = 65536) -> str:
        with self._changed:
            service = self._get(name)
        return last_lines(self._swarm.printed(service.id, name, tail_bytes), tail_bytes)

    def remove_project(self, project: str) -> None:
        names = [status.name for status in self.list(project)]
        self.stop_many(names)
        for name in names:
            with suppress(NotFoundError):
                self._forget(name)
        self._await_collection()
        with self._sweeping:
            self._volumes.remove(f"{project}-")

    def nodes(self) -> Sequence[Node]:
        values = self._swarm.nodes()
        with self._changed:
            self._see_nodes(values)
            return sorted(self._nodes.values(), key=lambda node: node.name)

    def usage(self) -> Sequence[ServiceUsage]:
        return consumed(self._engine, self._names)

    def close(self) -> None:
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._poller.join()
        self._news.put(None)
        if threading.current_thread() is not self._teller:
            self._teller.join()
        self._engine.close()

    # what is known
    def _get(self, name: ServiceName) -> _Service:
        service = self._services.get(name)
        if service is None:
            raise unknown_service(name)
        return service

    def _announce(self, service: _Service) -> None:
        self._news.put(service.deployment.status())
        self._changed.notify_all()

    def _is_deployed(self, spec: ServiceSpec) -> bool:
        """Whether this very spec is live; the lock is held, and let go of while the service starts."""
        self._changed.wait_for(lambda: not ((s := self._services.get(spec.name)) and s.deploying))
        service = self._services.get(spec.name)
        if service is None or not service.deployment.live:
            return False
        if service.deployment.stopping:
            raise ConflictError(f"service {spec.name} is being stopped - deploy it once it has ended")
        if service.deployment.digest != Deployment.of(spec).digest:
            raise ConflictError(
                f"service {spec.name} is {service.deployment.state} with another spec - stop it first"
            )
        return True

    @contextmanager
    def _hurry(self) -> Iterator[None]:
        """Somebody waits: look more often. The lock is held within."""
        with self._changed:
            self._hurried += 1
            self._changed.notify_all()
            try:
                yield
            finally:
                self._hurried -= 1

    def _see_nodes(self, values: Sequence[Mapping[str, Any]]) -> None:
        self._nodes = objects.nodes_of(values)
        self._down = objects.down_nodes(values)

    def _node_named(self, name: str) -> Node:
        for again in (False, True):
            for node in self.nodes() if again else [*self._nodes.values()]:
                if node.name == name:
                    return node
        raise InvalidInputError(f"no node of the swarm is called {name} - see 'docker node ls' for the names")

    # starting
    def _place(self, spec: ServiceSpec, before: _Service | None) -> _Service:
        """Ask the swarm to run a service."""
        service = _Service(Deployment.of(spec), deploying=True, id="" if before is None else before.id)
        with self._changed:
            place = Place.of(spec, self._nodes)
        try:
            if place.node_id is not None:
                self._volumes.note(spec, place.node_id)
            template = self._swarm.template(spec, service.deployment, place, self._stop_grace_s)
            self._ask_for(service, template)
        except BaseException as error:
            with self._changed:
                self._littered = True
            if isinstance(error, NotFoundError | ConflictError):
                raise FailedError(str(error)) from error
            raise
        return service

    def _ask_for(self, service: _Service, template: Mapping[str, Any]) -> None:
        if service.id:
            with suppress(NotFoundError):  # somebody removed it
                self._swarm.change(service.id, service.deployment, lambda _: template, "cannot start")
                return
        service.id = self._swarm.create(service.deployment, template)

    def _await_start(self, spec: ServiceSpec, service: _Service, before: _Service | None) -> None:
        """Wait until a service runs, or waits for a node; else take it back."""
        deadline = self._clock.monotonic() + self._start_timeout_s
        while True:
            with self._hurry():
                self._changed.wait_for(
                    lambda: not service.deploying or service.failure or service.doubtful or self._closing,
                    timeout=max(0.0, deadline - self._clock.monotonic()),
                )
                doubtful, failure = service.doubtful, service.failure
                if not service.deploying:
                    self._littered = self._littered or before is not None
                    break
            if self._closing:
                raise UnavailableError(
                    f"service {spec.name} was being started when its orchestrator was closed"
                    " - the next one knows what became of it"
                )
            if not doubtful:
                break
            failure = self._unknown_program(spec, service)
            with self._changed:
                service.doubtful = False
                if failure is not None:
                    service.failure = failure
                    break
                service.deploying = False
        if not service.deploying:
            if spec.node is None and service.task is not None and service.task.node_id:
                self._volumes.note(spec, service.task.node_id)
            return
        self._take_back(spec, service, before)
        if failure is None:
            failure = UnavailableError(
                f"service {spec.name} did not start within {self._start_timeout_s:g} s"
                " - see 'docker service ps', and the node's way to the image's registry"
            )
        if _NO_IMAGE in str(failure) and spec.image is not None:
            why = self._swarm.why_no_image(spec.image)
            failure = type(why)(f"service {spec.name} cannot start: {why}")
        raise failure

    def _unknown_program(self, spec: ServiceSpec, service: _Service) -> FailedError | None:
        """The error for a service that ended as if its program did not exist, if that is why."""
        with suppress(FlopsError):
            printed = self._swarm.printed(service.id, spec.name, 2000)
            last = last_lines(printed, 2000).rstrip().rpartition("\n")[2]
            if "[FATAL tini" in last:
                why = last.rpartition("failed: ")[2] or last
                return FailedError(
                    f"service {spec.name} cannot start '{spec.command[0]}': {why}"
                    f" - check its command, and that image {spec.image} has that program"
                )
        return None

    def _take_back(self, spec: ServiceSpec, service: _Service, before: _Service | None) -> None:
        """Undo a deployment that failed; what was known before is known again."""
        with self._orders:
            try:
                if before is None:
                    self._swarm.delete(service.id)
                else:
                    what = "did not start anew, and that cannot be taken back"
                    before.id = service.id
                    self._swarm.change(before.id, before.deployment, objects.parked, what)
            except FlopsError as error:
                _log.warning("%s", error)
            with self._changed:
                service.deploying = False
                if before is None:
                    self._services.pop(spec.name, None)
                else:
                    self._services[spec.name] = before
                self._littered = True
                self._changed.notify_all()

    # ending
    def _ask_to_end(self, service: _Service) -> None:
        deployment = service.deployment
        with self._changed:
            waits = service.restart_at is not None  # between two attempts
            deployment.stopping = True
        try:
            self._swarm.change(service.id, deployment, objects.parked, "cannot be stopped")
        except BaseException:
            with self._changed:
                deployment.stopping = False
            raise
        with self._changed:
            service.deploying = False
            if waits:
                service.restart_at = None
                self._settle(service, "exited", "stopped")

    def _forget(self, name: ServiceName) -> None:
        """Remove a service that was stopped."""
        with self._orders:
            with self._changed:
                service = self._get(name)
                if service.deployment.live or service.deploying:
                    raise ConflictError(f"service {name} was deployed again meanwhile - remove it anew")
            self._swarm.delete(service.id)
            with self._changed:
                del self._services[name]
                self._littered = True

    def _await_collection(self) -> None:
        """Wait until what removed services left is gone; what takes longer goes later."""
        with self._hurry():
            self._changed.wait_for(lambda: not self._littered or self._closing, _CLEAN_S)

    # watching
    def _tell(self) -> None:
        while (status := self._news.get()) is not None:
            self._watchers.deliver(status)

    def _poll(self) -> None:
        while True:
            started = time.monotonic()
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 - without this thread no end of a service is ever seen
                self._lost_sight(error)
                pause_s = _AWAY_S
            else:
                self._see_again()
                pause_s = self._pause_s(time.monotonic() - started)
            with self._changed:
                self._changed.wait_for(partial(self._hurried_more_than, self._hurried), pause_s)
                if self._closing:
                    return

    def _pause_s(self, took_s: float) -> float:
        """How long services need not be looked at."""
        with self._changed:
            if self._hurried:
                return _WAITED_FOR_POLL_S
            due = [s.restart_at for s in self._services.values() if s.restart_at is not None]
            # A swarm that takes long to answer is not asked all the time.
            pause_s = max(_POLL_S, 4 * took_s)
            return min([pause_s, *(max(0.0, at - self._clock.monotonic()) for at in due)])

    def _hurried_more_than(self, before: int) -> bool:
        return self._closing or self._hurried > before

    def _lost_sight(self, error: Exception) -> None:
        if not isinstance(error, UnavailableError):
            _log.error("services are looked at again in %g s", _AWAY_S, exc_info=error)
            return
        with self._changed:
            if self._away is None:
                _log.warning("services are looked at again every %g s: %s", _AWAY_S, error)
            self._away = error

    def _see_again(self) -> None:
        with self._changed:
            if self._away is not None:
                _log.warning("the swarm of the engine at %s answers again", self._engine.url)
            self._away = None

    def _step(self) -> None:
        """See how all services are, and do what follows from it."""
        with self._orders:
            try:
                sight = self._swarm.see()
            except FlopsError as error:
                raise UnavailableError(str(error)) from error
            with self._changed:
                self._see_nodes(sight.nodes)
                for service in self._services.values():
                    if service.deployment.live:
                        self._observe(service, sight)
                self._changed.notify_all()
                unsaved = [service for service in self._services.values() if service.unsaved]
                now = self._clock.monotonic()
                due = [s for s in self._services.values() if s.restart_at is not None and s.restart_at <= now]
                if not self._may_act():
                    for waits in due:
                        waits.restart_at = now + _REFUSED_PAUSE_S
                    due = []
            for service in unsaved:
                self._save(service)
            for service in due:
                self._restart(service)
            if self._littered:
                gone = self._swarm.collect()
                with self._changed:
                    self._littered = not gone
                    self._changed.notify_all()

    def _observe(self, service: _Service, sight: Sight) -> None:
        """Act on what became of a live service; the lock is held."""
        deployment = service.deployment
        task = objects.newest(sight.tasks.get(service.id, ()), objects.attempt_of(deployment))
        if service.id not in sight.services:
            self._lose(service, "its service was removed from the swarm by somebody")
        elif deployment.stopping and (task is None or not task.node_id):
            self._settle(service, "exited", "stopped")
        elif task is None:
            if service.task is not None:
                self._lose(service, "the swarm has forgotten its task, and with it how it ended")
        elif task.id == deployment.container:  # its end is known: only a restart can be missing
            if service.restart_at is None:
                service.restart_at = self._clock.monotonic()
        elif not service.failure and not service.doubtful:
            service.task = task
            self._follow(service, task)

    def _follow(self, service: _Service, task: Task) -> None:
        deployment = service.deployment
        node = self._nodes.get(task.node_id)
        if node is not None and node.name != deployment.node:
            deployment.node = node.name
        gone = bool(task.node_id) and (node is None or task.node_id in self._down)
        if task.ended and task.state != "orphaned":
            self._ended(service, task)
        elif gone or task.state == "orphaned":
            where = f"node {deployment.node or task.node_id} is down"
            if service.deploying:
                service.failure = UnavailableError(
                    f"service {deployment.spec.name} cannot start: {where} - start it, or choose another"
                )
            else:
                self._lose(service, where)
        elif task.state == "running":
            if not service.deploying or self._has_lasted(service, _SETTLE_S):
                self._runs(service, task.stamp)
        else:
            self._waits(service, task)

    def _has_lasted(self, service: _Service, seconds: float) -> bool:
        now = self._clock.monotonic()
        service.since = service.since or now
        return now - service.since >= seconds

    def _waits(self, service: _Service, task: Task) -> None:
        """A task that is on its way."""
        deployment = service.deployment
        if not task.error:
            service.since = 0.0
            return
        if service.deploying and not self._has_lasted(service, _PLACE_S):
            return
        wanted = deployment.spec.node
        if wanted and not any(node.name == wanted for node in self._nodes.values()):
            reason = f"waits for a node: none is called {wanted}"
        elif wanted and not any(node.name == wanted and node.ready for node in self._nodes.values()):
            reason = f"waits for a node: {wanted} is down, or takes no services"
        else:
            reason = f"waits for a node: {task.error}"
        if service.deploying or deployment.reason != reason:
            service.deploying = False
            deployment.reason = reason
            self._announce(service)

    def _runs(self, service: _Service, started_at: float) -> None:
        deployment = service.deployment
        service.deploying = False
        if deployment.state == "running":
            return
        deployment.state, deployment.started_at = "running", started_at
        deployment.reason = f"restarted after {deployment.ending}" if deployment.restarts else ""
        node = self._nodes.get(service.task.node_id) if service.task is not None else None
        if deployment.spec.publish and node is not None:
            deployment.endpoint = f"{node.address}:{deployment.spec.port}"
        self._announce(service)

    def _ended(self, service: _Service, task: Task) -> None:
        deployment = service.deployment
        if service.deploying:
            if not task.started:
                where = f"node {deployment.node or task.node_id} cannot start it"
                service.failure = FailedError(
                    f"service {deployment.spec.name} cannot start '{deployment.spec.command[0]}': {where}:"
                    f" {task.error or task.state} - check its image {deployment.spec.image} and its command"
                )
                return
            if task.exit_code in _NOT_FOUND_CODES:
                service.doubtful = True
                return
        if task.started and deployment.state != "running" and not deployment.stopping:
            self._runs(service, task.stamp)
        self._end(service, task)

    def _end(self, service: _Service, task: Task) -> None:
        deployment = service.deployment
        spec, code = deployment.spec, task.exit_code
        deployment.container = task.id
        if not task.started and not deployment.stopping:
            self._settle(service, "failed", f"node {deployment.node} could not start it: {task.error}")
            return
        if task.state in ("shutdown", "remove") and not deployment.stopping:
            self._lose(service, f"the swarm ended it, as when node {deployment.node} is drained")
            return
        if deployment.started_at is not None and task.stamp - deployment.started_at >= SETTLED_S:
            deployment.quick_ends = 0
        verdict = judge_container(
            spec,
            code,
            out_of_memory=False,
            restarts=deployment.restarts,
            stopping=deployment.stopping,
            backoff_s=self._backoff_s,
            quick_ends=deployment.quick_ends,
        )
        deployment.quick_ends += 1
        deployment.exit_code, deployment.ending = code, _describe_end(spec, code)
        if verdict.restart_in_s is not None:
            service.restart_at = self._clock.monotonic() + verdict.restart_in_s
        reason = verdict.reason
        if code is not None and not deployment.stopping:
            reason = reason.replace(describe_exit(code), deployment.ending, 1)
        self._settle(service, verdict.state, reason)

    def _lose(self, service: _Service, why: str) -> None:
        if service.deploying:
            service.failure = FailedError(f"service {service.deployment.spec.name} cannot start: {why}")
            return
        service.deployment.exit_code = None
        self._settle(service, "lost", why)

    def _settle(self, service: _Service, state: Any, reason: str) -> None:
        deployment = service.deployment
        deployment.state, deployment.reason = state, reason
        service.deploying, service.unsaved = False, True
        self._announce(service)

    def _save(self, service: _Service) -> None:
        service.unsaved = False
        try:
            self._swarm.change(service.id, service.deployment, lambda template: template, "is not noted")
        except NotFoundError:
            return
        except Exception:
            service.unsaved = True
            raise

    def _restart(self, service: _Service) -> None:
        deployment = service.deployment
        service.restart_at = None
        deployment.restarts += 1
        try:
            attempt = partial(objects.attempting, deployment=deployment)
            self._swarm.change(service.id, deployment, attempt, "cannot start again")
        except Exception:
            deployment.restarts -= 1
            service.restart_at = self._clock.monotonic() + _AWAY_S
            raise
        service.task = None

    # adopting
    def _adopt(self) -> None:
        """Take over what an earlier manager left; nothing else touches the records yet."""
        deployments, broken = self._swarm.deployments()
        for service, why in broken:
            _log.error("service %s is removed, its label cannot be read: %s", service, why)
            self._swarm.delete(service)
        for service, deployment in deployments.items():
            self._services[deployment.spec.name] = _Service(deployment, id=service)
        self._step()
        self._volumes.clean()
        while not self._news.empty():
            self._news.get()  # nobody watches yet; `list` tells


def _describe_end(spec: ServiceSpec, exit_code: int | None) -> str:
    """`describe_exit`; Swarm does not tell who killed a container."""
    if exit_code is None:
        return "an unknown end"
    what = describe_exit(exit_code)
    if exit_code == -9 and spec.memory_mb is not None:
        return f"{what}, probably by its memory limit ({spec.memory_mb} MB)"
    return what


def _address_towards(url: str) -> str | None:
    """Ours, as an engine elsewhere sees it; None for an engine of this machine."""
    parts = urlsplit(url)
    if parts.hostname is None:
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 2375))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None
