"""What nodes and services use at this moment: processor, memory, bytes over the network.

A look is two samples of the orchestrators' counters: the present one, and the last one that is old enough to
make a rate of. Callers that look at the same time share a look, so many of them cost no more than one.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flops.core.clock import Clock
from flops.core.errors import FlopsError
from flops.core.ids import ProjectId, ServiceName
from flops.manager.rows import Project, Service
from flops.manager.store import Store
from flops.orchestration import Node, Orchestrator, ServiceStatus, ServiceUsage, consumed, rate

log = logging.getLogger(__name__)

OWN = "flops"
"""In place of a project: services of the manager itself, and the manager."""
_MANAGER, _STEPS = ServiceName("flops-manager"), ServiceName("flops-steps")
_SHORTEST_S, _LONGEST_S = 0.4, 15.0
"""Between two samples that a rate is made of."""
_FIRST_S = 0.25
"""Where there is no earlier sample."""


@dataclass(frozen=True)
class _Sample:
    """One look at everything that runs."""

    at: float
    used: Mapping[str, ServiceUsage] = field(default_factory=dict)
    bytes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Received and sent by projects' aggregators, as they reported it, by project."""
    statuses: Sequence[ServiceStatus] = ()
    projects: Sequence[Project] = ()
    services: Mapping[str, Service] = field(default_factory=dict)
    nodes: Sequence[Node] = ()
    away: str | None = None


class Top:
    """See the module. Safe from any thread.

    Args:
        programs: runs programs of this machine, the manager's own services among them.
        joined: machines that joined, besides the orchestrator's.
        wait: for so many seconds.
    """

    def __init__(
        self,
        store: Store,
        programs: Orchestrator,
        orchestrator: Orchestrator,
        clock: Clock,
        joined: Callable[[], Sequence[Node]] = tuple,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self._store = store
        self._programs, self._orchestrator = programs, orchestrator
        self._joined = joined
        self._clock, self._wait = clock, wait
        self._lock = threading.Lock()
        self._before: _Sample | None = None
        self._last: _Sample | None = None
        self._moved: Mapping[str, tuple[int, int, int]] = {}

    def view(self, sees: Callable[[str, str | None], bool], *, own: bool) -> dict[str, Any]:
        """What there is to see.

        Args:
            sees: whether projects of an owner and a team are shown.
            own: show the manager and its own services, too.
        """
        before, now = self._look()
        projects = {project.id: project for project in now.projects if sees(project.owner, project.team)}
        lines = []
        for status in now.statuses:
            project = projects.get(ProjectId(status.project))
            if status.live and (project is not None or (own and status.project == OWN)):
                lines.append(self._line(status, project, before, now))
        if own:
            lines += [_own(name, before, now, self._here(now)) for name in (_MANAGER, _STEPS)]
        lines = [line for line in lines if line["name"] != _STEPS or line["threads"]]
        return {
            "time": self._clock.now(),
            "away": now.away,
            "nodes": [_of_node(node, lines) for node in sorted(now.nodes, key=lambda node: node.name)],
            "services": sorted(
                lines, key=lambda line: (line["project"] == OWN, line["project"], line["name"])
            ),
            "totals": {"services": len(lines)} | {name: _sum(lines, name) for name in _SUMMED},
        }

    def _look(self) -> tuple[_Sample, _Sample]:
        with self._lock:
            now = self._clock.monotonic()
            last = self._last
            if last is not None and self._before is not None and now - last.at < _SHORTEST_S:
                return self._before, last
            if last is None or now - last.at > _LONGEST_S:
                last = self._sample()
                self._wait(_FIRST_S)
            self._before, self._last = last, self._sample()
            return self._before, self._last

    def _sample(self) -> _Sample:
        statuses: list[ServiceStatus] = []
        nodes: list[Node] = []
        used: dict[str, ServiceUsage] = {}
        away = None
        orchestrators = [self._orchestrator]
        if self._programs is not self._orchestrator:
            orchestrators.append(self._programs)
        for orchestrator in orchestrators:
            try:
                found = orchestrator.list()
                used.update({str(one.name): one for one in orchestrator.usage()})
                nodes += [] if orchestrator is not self._orchestrator else orchestrator.nodes()
            except FlopsError as error:
                away = str(error)
                continue
            known = {one.name for one in statuses}  # one orchestrator may stand behind both
            statuses += [one for one in found if one.name not in known]
        nodes += self._joined()
        used.update(_of_this_process(statuses))
        at = self._clock.monotonic()
        projects = self._store.projects_of({one.project for one in statuses if one.live} - {OWN})
        services = {str(one.name): one for project in projects for one in self._store.services(project.id)}
        moved: dict[str, tuple[int, int, int]] = {project.id: self._moved_by(project) for project in projects}
        self._moved = moved  # what is over is forgotten
        told: dict[str, tuple[int, int]] = {
            project: (received, sent) for project, (_, received, sent) in moved.items()
        }
        return _Sample(at, used, told, statuses, projects, services, nodes, away)

    def _moved_by(self, project: Project) -> tuple[int, int, int]:
        """Last round, and bytes that its aggregator has received and sent up to there."""
        number, received, sent = self._moved.get(project.id, (0, 0, 0))
        for data in self._store.rounds(project.id, number) if project.rounds_done > number else ():
            received += int(data.get("bytes_up") or 0)
            sent += int(data.get("bytes_down") or 0)
            number = max(number, int(data["round"]))
        return number, received, sent

    def _here(self, now: _Sample) -> str:
        """The node that the manager is on, where it is one."""
        return next((one.node for one in now.statuses if one.project == OWN and one.node), "")

    def _line(
        self, status: ServiceStatus, project: Project | None, before: _Sample, now: _Sample
    ) -> dict[str, Any]:
        service = now.services.get(status.name)
        line = _own(status.name, before, now, status.node)
        line |= {
            "project": status.project,
            "role": status.role,
            "learner": service.learner if service is not None else None,
            "cluster": service.cluster if service is not None else None,
            "state": status.state,
            "restarts": status.restarts,
        }
        if project is not None:
            line |= {"round": project.rounds_done, "rounds": project.rounds_total}
            root = service is not None and service.role == "aggregator" and service.cluster is None
            if root and line["received_bytes"] is None:  # no network of its own: as it reported
                (received, sent), (was_received, was_sent) = (
                    sample.bytes.get(project.id, (0, 0)) for sample in (now, before)
                )
                line |= {"received_bytes": received, "sent_bytes": sent}
                line["received_bytes_per_s"] = rate(was_received, received, now.at - before.at)
                line["sent_bytes_per_s"] = rate(was_sent, sent, now.at - before.at)
        return line


_SUMMED = ("cpu_percent", "memory_bytes", "threads", "received_bytes_per_s", "sent_bytes_per_s")


def _own(name: str, before: _Sample, now: _Sample, node: str) -> dict[str, Any]:
    used, was = now.used.get(name), before.used.get(name)
    taken_s = now.at - before.at
    line: dict[str, Any] = {
        "node": node,
        "project": OWN,
        "name": name,
        "role": name.removeprefix("flops-").rstrip("s"),
        "learner": None,
        "cluster": None,
        "state": "running",
        "restarts": 0,
        "round": None,
        "rounds": None,
    }
    for key in ("memory_bytes", "threads", "received_bytes", "sent_bytes"):
        line[key] = getattr(used, key) if used is not None else None
    cpu = rate(was.cpu_s, used.cpu_s, taken_s) if used is not None and was is not None else None
    line["cpu_percent"] = None if cpu is None else round(100 * cpu, 1)
    if used is not None and used.cpu_percent is not None:
        line["cpu_percent"] = used.cpu_percent
    for key in ("received_bytes", "sent_bytes"):
        counted = getattr(was, key, None), getattr(used, key, None)
        line[f"{key}_per_s"] = rate(*counted, taken_s)
    return line


def _of_node(node: Node, lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    mine = [line for line in lines if line["node"] == node.name]
    return {
        "name": node.name,
        "ready": node.ready,
        "cpus": node.cpus,
        "capacity_bytes": node.memory_mb * 1_000_000,
        "services": len(mine),
        "cpu_percent": _sum(mine, "cpu_percent"),
        "memory_bytes": _sum(mine, "memory_bytes"),
    }


def _sum(lines: Iterable[Mapping[str, Any]], name: str) -> Any:
    """Of those that are known; None: none is."""
    known = [line[name] for line in lines if line[name] is not None]
    return round(sum(known), 1) if known else None


def _of_this_process(statuses: Iterable[ServiceStatus]) -> dict[str, ServiceUsage]:
    """The manager, and the processes of steps that it has started."""
    leaders = {status.name: status.pid for status in statuses if status.pid is not None}
    found = {usage.name: usage for usage in consumed({**leaders, _MANAGER: os.getpid()})}
    all_of_it = found[_MANAGER]
    times = os.times()
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        fields = file.read().split()
    memory_bytes = (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    alone = ServiceUsage(_MANAGER, times.user + times.system, memory_bytes, threads)
    steps = ServiceUsage(
        _STEPS,
        max(0.0, (all_of_it.cpu_s or 0.0) - sum(times[:4])),  # without what has ended
        max(0, (all_of_it.memory_bytes or 0) - memory_bytes),
        max(0, (all_of_it.threads or 0) - threads),
    )
    return {_MANAGER: alone, _STEPS: steps}
