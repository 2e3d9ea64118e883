"""Running a service with other settings than it runs with."""

import logging

from flops.core.errors import ConflictError
from flops.orchestration.port import Orchestrator, ServiceSpec

log = logging.getLogger(__name__)


def deploy_in_place(orchestrator: Orchestrator, spec: ServiceSpec, grace_s: float = 2.0) -> None:
    """`Orchestrator.deploy`; what is live under the name with another spec is stopped first.

    Raises:
        ConflictError, FailedError: see `Orchestrator.deploy`, `Orchestrator.stop`.
    """
    try:
        orchestrator.deploy(spec)
    except ConflictError:
        log.info("service %s runs with other settings: it is started again", spec.name)
        orchestrator.stop(spec.name, grace_s)
        orchestrator.deploy(spec)
