"""How the store's rows look from outside: one project as the REST API shows it."""

from collections.abc import Mapping, Sequence
from typing import Any

from flops.manager.rows import Learner, Model, Project, Service
from flops.manager.states import State
from flops.orchestration import ServiceStatus


def project_view(
    project: Project,
    *,
    steps: Mapping[str, Mapping[str, Any]],
    learners: Sequence[Learner],
    models: Sequence[Model],
    services: Sequence[Service] = (),
    statuses: Mapping[str, ServiceStatus] | None = None,
    ui_url: str | None = None,
) -> dict[str, Any]:
    """A project with everything that is known about it.

    Args:
        models: the project's own, the newest first.
        statuses: what the orchestrator says about the services, by name.
    """
    model = models[0] if models else None
    tracking = project.tracking or {}
    absent = "waiting" if project.state is State.PAUSED else "done"
    page = tracking.get("page")
    return {
        "id": project.id,
        "name": project.name,
        "state": project.state.value,
        "reason": project.reason,
        "created": project.created,
        "updated": project.updated,
        "finished": project.finished,
        "spec": project.spec,
        "source": project.source,
        "commit": steps.get("fetch", {}).get("commit"),
        "lock": steps.get("lock", {}).get("hash"),
        "contract": steps.get("check-contract", {}).get("kind"),
        "rounds_done": project.rounds_done,
        "rounds_total": project.rounds_total,
        "learners": [
            {
                "id": learner.learner,
                "site": learner.site,
                "state": absent if project.resting and learner.state == "connected" else learner.state,
                "reason": learner.reason,
            }
            for learner in learners
        ],
        "metrics": project.metrics,
        "best_round": project.best_round,
        "model": None if model is None else {"name": model.name, "version": model.version, "uri": model.uri},
        "services": [_service_view(service, statuses or {}) for service in services],
        "experiment_url": f"{ui_url}/{page}" if ui_url is not None and page else None,
    }


def model_view(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "version": model.version,
        "project": model.project,
        "round": model.round,
        "metrics": model.metrics,
        "created": model.created,
        "uri": model.uri,
    }


def _service_view(service: Service, statuses: Mapping[str, ServiceStatus]) -> dict[str, Any]:
    status = statuses.get(service.name)
    return {
        "name": service.name,
        "role": service.role,
        "learner": service.learner,
        "state": status.state if status is not None else "pending",
        "reason": service.over or (status.reason if status is not None else "") or None,
        "restarts": service.restarts,
        "pid": status.pid if status is not None else None,
    }
