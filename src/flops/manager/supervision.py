"""What to do about services that ended while a project trains; a pure function of what was seen.

A service may be restarted for ever, as long as there is progress: its budget counts ends without progress,
and a round that it took part in makes it whole again (`flops.manager.reports`). What is killed from outside
has a larger budget than what ends by itself, and both rest longer before each attempt. A full disk is
nobody's failure: it is waited for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from flops.core.disk import EXIT_WITHOUT_SPACE
from flops.core.ids import ProjectId, ServiceName
from flops.manager.grounds import WORKER
from flops.manager.rows import Service
from flops.orchestration import ServiceStatus

MAX_RESTARTS = 3
"""Without progress, of a service that ends by itself."""
MAX_RESTARTS_OF_KILLED = 20
"""Without progress, of one that is killed, or vanishes."""

_AT_ONCE = 3
_LONGEST_PAUSE_S = 30.0
_TOLD_TO_END = frozenset({-9, -15, -2, -1, 143, 130, 129})


class Verdict(Enum):
    RESTART = "restart"
    WAIT = "wait"
    """Start it again after the pause, for as often as it takes; nothing is counted."""
    OVER = "over"
    FAIL = "fail"


@dataclass(frozen=True)
class Action:
    service: Service
    verdict: Verdict
    reason: str
    pause_s: float = 0.0
    """How long to rest before it is restarted."""


def judge(
    project: ProjectId,
    services: Sequence[Service],
    statuses: Mapping[ServiceName, ServiceStatus],
    last_line: Callable[[ServiceName], str],
) -> Iterator[Action]:
    """What has to be done, in order; nothing after a FAIL.

    An aggregator resumes from its own state, so any end of it that brought no result is followed by a
    restart; a cluster can be done without where its aggregator does not come back, the root cannot. An agent
    is started again where it did not end by itself (killed, lost with its machine); one that ended by itself
    has said why, and would end the same way again.

    Args:
        services: what the project wants.
        statuses: what the orchestrator sees; a service that was never deployed is not in it.
        last_line: what a service printed last.
    """
    over: list[str] = []
    clusters_over: list[str] = []
    agents = [service for service in services if service.learner is not None and service.role != WORKER]
    clusters = [service for service in services if service.cluster is not None]
    for service in services:
        status = statuses.get(service.name)
        if status is not None and status.live:
            continue
        lost = clusters_over if service.cluster is not None else over
        if service.role == WORKER:
            lost = []  # its agent says what that means
        is_root = service.learner is None and service.cluster is None
        if service.over is not None:
            lost.append(service.over)
            continue
        if not is_root and status is not None and status.exit_code == 0:
            continue  # the aggregator told it that training is over; its own word on that is on the way
        why = _end(service, status, last_line) + _of_its_worker(service, services, statuses)
        code = None if status is None else status.exit_code
        if code == EXIT_WITHOUT_SPACE:
            yield Action(service, Verdict.WAIT, why, _pause_s(service.restarts + _AT_ONCE + 2))
            continue
        outside = code is None or code in _TOLD_TO_END
        budget = MAX_RESTARTS_OF_KILLED if outside else MAX_RESTARTS
        by_itself = (code is not None and code >= 0 and not outside) or (status is not None and status.final)
        if service.learner is not None and by_itself and service.role != WORKER:
            over.append(why)
            yield Action(service, Verdict.OVER, why)
        elif service.restarts < budget:
            number = service.restarts + 1
            yield Action(
                service,
                Verdict.RESTART,
                f"{why} - restart {number} of {budget} without progress",
                _pause_s(number if outside else number + _AT_ONCE - 1),
            )
        elif not is_root:
            lost.append(why)
            yield Action(service, Verdict.OVER, f"{why}; given up after {service.restarts} restarts")
        else:
            yield Action(
                service,
                Verdict.FAIL,
                f"{why}; given up after {service.restarts} restarts without progress - see "
                f"'flops logs {project}'",
            )
            return
    if agents and len(over) == len(agents):
        yield Action(
            agents[0],
            Verdict.FAIL,
            f"no learner is left of {len(agents)}: {over[-1]} - see 'flops logs {project}'",
        )
    elif clusters and len(clusters_over) == len(clusters):
        yield Action(
            clusters[0],
            Verdict.FAIL,
            f"no cluster is left of {len(clusters)}: {clusters_over[-1]} - see 'flops logs {project}'",
        )


def _of_its_worker(
    service: Service, services: Sequence[Service], statuses: Mapping[ServiceName, ServiceStatus]
) -> str:
    """How the worker of an agent ended, where it was for lack of memory: the agent cannot know."""
    for other in services:
        if other.role == WORKER != service.role and other.learner == service.learner is not None:
            status = statuses.get(other.name)
            if status is not None and "memory" in status.reason:
                return f" - its worker was {status.reason}"
    return ""


def _pause_s(number: int) -> float:
    """Before restart ``number`` of a service that was killed: none at first, then doubling."""
    return 0.0 if number <= _AT_ONCE else min(_LONGEST_PAUSE_S, 0.25 * 2.0 ** (number - _AT_ONCE))


def _end(service: Service, status: ServiceStatus | None, last_line: Callable[[ServiceName], str]) -> str:
    who = service.learner or f"the {service.role}"
    if service.role == WORKER:
        who = f"the worker of {service.learner}"
    if service.cluster is not None:
        who += f" of cluster {service.cluster}"
    if status is None:
        return f"{who} is not there any more"
    line = last_line(service.name)
    if status.final:
        return f"{who} is over ({status.reason})"
    what = status.reason or f"exit code {status.exit_code}"
    return f"{who} ended ({what})" + (f": {line}" if line else "")
