"""Names in MLflow: FLOps' own tags, and how any text becomes a name that MLflow takes."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from flops.tracking.records import RunStarted

PROJECT_TAG = "flops.project"
ROUND_TAG = "flops.round"
ROUNDS_TAG = "flops.rounds"
REASON_TAG = "flops.reason"
CLUSTER_TAG = "flops.cluster"
AUDIENCE_TAG = "flops.audience"
"""Of experiments and registered models: who sees them, ``user:NAME`` or ``team:NAME``."""
KIND_TAG = "mlflow.experimentKind"  # MLflow's own, by which its GUI shows training before agents and prompts
KIND = "custom_model_development"
FIRST_ADMIN = "user:admin"
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own, by which its GUI shows a tree

_MAX_KEY = 250
_MAX_EXPERIMENT = 500
_MAX_MODEL = 200


def run_started(
    *,
    time: float,
    experiment: str,
    name: str,
    spec: Mapping[str, Any],
    repository: str,
    commit: str | None = None,
    lock: str | None = None,
    mode: str | None = None,
    strategy: str | None = None,
    tags: Mapping[str, str] | None = None,
    audience: str = "",
) -> RunStarted:
    """The record that begins a project's run.

    Args:
        experiment: the project family's name.
        name: the run's name.
        spec: the project's specification as JSON; becomes a tag as it is, and one parameter for each value.
        lock: hash of the dependency lock.
        tags: more tags; ``flops.`` names are FLOps' own.
        audience: who sees the run, see `audience`.
    """
    own = {
        "flops.repository": repository,
        "flops.commit": commit,
        "flops.lock": lock,
        "flops.spec": json.dumps(spec, sort_keys=True),
        "flops.mode": mode,
        "flops.strategy": strategy,
        # MLflow's own names, which its GUI shows as the run's source
        "mlflow.source.name": repository,
        "mlflow.source.type": "PROJECT",
        "mlflow.source.git.commit": commit,
    }
    return RunStarted(
        time=time,
        experiment=experiment,
        name=name,
        tags={key: value for key, value in {**own, **(tags or {})}.items() if value},
        params=dict(_flat(spec)),
        audience=audience,
    )


def audience(owner: str, team: str | None) -> str:
    """Who sees the runs of a project, besides those who see everything: its team, else its owner."""
    return f"team:{team}" if team else f"user:{owner}"


def is_of(found: str | None, wanted: str) -> bool:
    """Whether an experiment or registered model with that audience may take in what is of the wanted one.

    What is of no audience was made before there were any, and may hold runs of several users: the first
    admin's go on there, all others begin anew.
    """
    return found == wanted or (not found and wanted in ("", FIRST_ADMIN))


def shared_names(name: str, wanted: str, longer: str = "{} ({})") -> Iterator[str]:
    """Names to try for what belongs to an audience, where others may have taken the first one."""
    yield name
    kind, _, who = wanted.partition(":")
    who = f"team {who}" if kind == "team" else who or "earlier"
    yield longer.format(name, who)
    yield longer.format(name, f"{who} {hashlib.sha256(wanted.encode()).hexdigest()[:8]}")


def _flat(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{where}.{key}" if where else str(key))
    elif value is not None:
        yield where, value if isinstance(value, str) else json.dumps(value)


def key(text: str) -> str:
    """A metric's, parameter's or tag's key: letters, digits, ``_-. :``, and ``/`` between parts."""
    parts = re.sub(r"[^/\w.\- :]", "_", text).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:_MAX_KEY] or "_"


def experiment(text: str) -> str:
    return text.strip()[:_MAX_EXPERIMENT] or "flops"


def model(text: str) -> str:
    """A registered model's name, fit for addresses ``models:/NAME/VERSION``, filters and file names."""
    return re.sub(r"[^\w -]+", "-", text).strip(" -")[:_MAX_MODEL] or "model"


def folder(text: str) -> str:
    """A folder name for an experiment's artifacts: readable, and different for different names."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:60]}-{digest}"
