"""How the store's rows look from outside: one project as the REST API shows it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flops.fleet import JoinedNode
from flops.manager.rows import Cluster, Learner, Model, Project, Service
from flops.manager.states import State
from flops.manager.topology import parent_of
from flops.orchestration import ServiceStatus


def project_view(
    project: Project,
    *,
    steps: Mapping[str, Mapping[str, Any]],
    learners: Sequence[Learner],
    clusters: Sequence[Cluster],
    models: Sequence[Model],
    services: Sequence[Service] = (),
    statuses: Mapping[str, ServiceStatus] | None = None,
    deployment: Mapping[str, Any] | None = None,
    gui: str = "",
) -> dict[str, Any]:
    """A project with everything that is known about it.

    Args:
        models: the project's own, the newest first.
        deployment: what is served of it.
        gui: the address of MLflow's GUI.
        statuses: what the orchestrator says about the services, by name.
    """
    model = models[0] if models else None
    tracking = project.tracking or {}
    absent = "waiting" if project.state is State.PAUSED else "done"

    def now(state: str) -> str:
        return absent if project.resting and state == "connected" else state

    page = tracking.get("page")
    return {
        "id": project.id,
        "name": project.name,
        "owner": project.owner,
        "team": project.team,
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
                "node": learner.node,
                "cluster": learner.cluster,
                "state": now(learner.state),
                "reason": learner.reason,
            }
            for learner in learners
        ],
        "clusters": [
            {
                "id": cluster.cluster,
                "parent": parent_of(cluster.cluster),
                "state": now(cluster.state),
                "reason": cluster.reason,
                "rounds_done": cluster.rounds_done,
            }
            for cluster in clusters
        ],
        "metrics": project.metrics,
        "best_round": project.best_round,
        "model": None if model is None else {"name": model.name, "version": model.version, "uri": model.uri},
        "deployment": None if deployment is None else dict(deployment),
        "services": [_service_view(service, statuses or {}) for service in services],
        "experiment_url": f"{gui}/{page}" if gui and page else None,
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
        "cluster": service.cluster,
        "state": status.state if status is not None else "pending",
        "reason": service.over or (status.reason if status is not None else "") or None,
        "restarts": service.restarts,
        "pid": status.pid if status is not None else None,
    }


def held_fragments(
    nodes: Sequence[JoinedNode], tags: Sequence[str], site: str | None
) -> list[dict[str, Any]]:
    """What joined nodes hold, each holding as one fragment: more of them is not known here."""
    found = []
    for node in nodes:
        for holding in node.holdings:
            if tags and not set(tags).intersection(holding["tags"]):
                continue
            if site not in (None, holding["site"]):
                continue
            words = json.dumps([node.name, holding["site"], holding["tags"], holding["labels"]])
            number = hashlib.sha256(words.encode()).hexdigest()[:16]
            found.append(
                {**holding, "id": number, "columns": {}, "content_hash": ""}
                | {"created": node.joined, "node": node.name, "owner": node.owner}
            )
    return found


def joined_node_view(node: JoinedNode, now: float) -> dict[str, Any]:
    """A machine that joined, as callers see it."""
    return {
        "name": node.name,
        "platform": node.platform,
        "cpus": node.cpus,
        "memory_mb": node.memory_mb,
        "labels": {},
        "address": "",
        "ready": node.ready(now),
        "kind": "joined",
        "owner": node.owner,
        "joined": node.joined,
        "last_seen": node.last_seen,
        "tags": sorted({tag for holding in node.holdings for tag in holding["tags"]}),
        "policy": node.consent.to_json(),
        "version": node.version,
    }
