"""What to do about services that ended while a project trains; a pure function of what was seen."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from flops.core.ids import ProjectId, ServiceName
from flops.manager.rows import Service
from flops.orchestration import ServiceStatus

MAX_RESTARTS = 3


class Verdict(Enum):
    RESTART = "restart"
    OVER = "over"
    FAIL = "fail"


@dataclass(frozen=True)
class Action:
    service: Service
    verdict: Verdict
    reason: str


def judge(
    project: ProjectId,
    services: Sequence[Service],
    statuses: Mapping[ServiceName, ServiceStatus],
    last_line: Callable[[ServiceName], str],
) -> Iterator[Action]:
    """What has to be done, in order; nothing after a FAIL.

    The aggregator resumes from its own state, so any end of it that brought no result is followed by a
    restart. An agent is started again where it did not end by itself (killed, lost with its machine); one
    that ended by itself has said why, and would end the same way again.

    Args:
        services: what the project wants.
        statuses: what the orchestrator sees; a service that was never deployed is not in it.
        last_line: what a service printed last.
    """
    over: list[str] = []
    agents = [service for service in services if service.learner is not None]
    for service in services:
        status = statuses.get(service.name)
        if status is not None and status.live:
            continue
        if service.over is not None:
            over.append(service.over)
            continue
        if service.learner is not None and status is not None and status.exit_code == 0:
            continue  # the aggregator told it that training is over; its own word on that is on the way
        why = _end(service, status, last_line)
        by_itself = status is not None and status.exit_code is not None and status.exit_code >= 0
        if service.learner is not None and by_itself:
            over.append(why)
            yield Action(service, Verdict.OVER, why)
        elif service.restarts < MAX_RESTARTS:
            yield Action(
                service,
                Verdict.RESTART,
                f"{why} - restart {service.restarts + 1} of {MAX_RESTARTS}",
            )
        elif service.learner is not None:
            over.append(why)
            yield Action(service, Verdict.OVER, why)
        else:
            yield Action(
                service,
                Verdict.FAIL,
                f"{why}; given up after {MAX_RESTARTS} restarts - see 'flops logs {project}'",
            )
            return
    if agents and len(over) == len(agents):
        yield Action(
            agents[0],
            Verdict.FAIL,
            f"no learner is left of {len(agents)}: {over[-1]} - see 'flops logs {project}'",
        )


def _end(service: Service, status: ServiceStatus | None, last_line: Callable[[ServiceName], str]) -> str:
    who = service.learner or f"the {service.role}"
    if status is None:
        return f"{who} is not there any more"
    line = last_line(service.name)
    what = status.reason or f"exit code {status.exit_code}"
    return f"{who} ended ({what})" + (f": {line}" if line else "")
