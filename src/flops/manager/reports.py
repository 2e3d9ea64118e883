"""Reports of services: checked as something that came from outside, and what each kind changes in the
tables.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from flops.core.errors import InvalidInputError
from flops.core.events import EventKind
from flops.core.ids import ProjectId
from flops.manager import tables
from flops.manager.rows import VIRTUAL

MAX_REPORTS = 10_000
MAX_DATA_BYTES = 1 << 20

_ACCEPTED = frozenset(
    {
        EventKind.WARNING,
        EventKind.LEARNER_CONNECTED,
        EventKind.LEARNER_LEFT,
        EventKind.LEARNER_EJECTED,
        EventKind.CLUSTERS_FORMED,
        EventKind.CLUSTER_CONNECTED,
        EventKind.CLUSTER_LEFT,
        EventKind.CLUSTER_ROUND,
        EventKind.TRAINING_WAITING,
        EventKind.ROUND_STARTED,
        EventKind.UPDATE_RECEIVED,
        EventKind.UPDATE_REFUSED,
        EventKind.ROUND_FINISHED,
        EventKind.TRAINING_FINISHED,
        EventKind.TRAINING_FAILED,
    }
)


@dataclass(frozen=True)
class Report:
    """One event as its source tells it; ``seq`` counts the source's own reports from 1."""

    seq: int
    time: float
    kind: EventKind
    data: Mapping[str, Any]


def parse_report(seq: int, time: float, kind: str, data: Mapping[str, Any]) -> Report:
    """Check one report.

    Raises:
        InvalidInputError: a kind that a service may not report, or data out of bounds.
    """
    if kind not in _ACCEPTED:
        raise InvalidInputError(
            f"report {seq} is of kind '{kind[:40]}' - a service may report " + ", ".join(sorted(_ACCEPTED))
        )
    if seq < 1 or not math.isfinite(time):
        raise InvalidInputError(f"report {seq} has an impossible number or time")
    bounded = _bounded(data)
    if bounded is None:
        message = f"a report of kind {kind} had more than {MAX_DATA_BYTES} bytes of data and was dropped"
        return Report(seq, time, EventKind.WARNING, {"message": message})
    return Report(seq, time, EventKind(kind), {key: _finite(value) for key, value in bounded.items()})


def _bounded(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The data, without what is told of single members where it is too much; None where even that is.

    It is not refused: its source would send it again for ever, and nothing that came after it.
    """
    kept = dict(data)
    for detail in ("", "learners", "updates", "left_out", "fit_s"):
        kept.pop(detail, None)
        if len(json.dumps(kept)) <= MAX_DATA_BYTES:
            return kept
    return None


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as null: JSON has no words for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def apply_report(connection: Connection, project: ProjectId, report: Report) -> None:
    """Change what the tables say about the project, inside the transaction that adds the event."""
    match report.kind:
        case EventKind.LEARNER_CONNECTED:
            _set_learner(connection, project, report.data, "connected")
        case EventKind.LEARNER_LEFT if not _trained(connection, project):
            _set_learner(connection, project, report.data, "left")
        case EventKind.LEARNER_EJECTED:
            _set_learner(connection, project, report.data, "ejected")
            # A root names its member, whatever that is.
            member = {**report.data, "cluster": report.data.get("learner")}
            _set_cluster(connection, project, member, "ejected")
        case EventKind.CLUSTERS_FORMED:
            _put_into_clusters(connection, project, report.data)
        case EventKind.CLUSTER_CONNECTED:
            _set_cluster(connection, project, report.data, "connected")
        case EventKind.CLUSTER_LEFT if not _trained(connection, project):
            _set_cluster(connection, project, report.data, "left")
        case EventKind.CLUSTER_ROUND:
            _count_cluster_round(connection, project, report.data)
        case EventKind.ROUND_FINISHED if "cluster" not in report.data:
            _add_round(connection, project, report)
        case EventKind.TRAINING_FINISHED:
            _end_training(connection, project, "finished", report.data)
        case EventKind.TRAINING_FAILED:
            _end_training(connection, project, "failed", report.data)
        case _:
            pass


def _trained(connection: Connection, project: ProjectId) -> bool:
    """Whether the training is over: who leaves now has done its part."""
    table = tables.projects
    query = sa.select(table.c.id).where(table.c.id == project, table.c.training.is_not(None))
    return connection.execute(query).first() is not None


def _set_learner(connection: Connection, project: ProjectId, data: Mapping[str, Any], state: str) -> None:
    table = tables.learners
    connection.execute(
        sa.update(table)
        .where(
            table.c.project == project,
            table.c.learner == str(data.get("learner")),
            table.c.state != "ejected",  # its leaving is told, too
        )
        .values(state=state, reason=data.get("reason"))
    )


def _put_into_clusters(connection: Connection, project: ProjectId, data: Mapping[str, Any]) -> None:
    table = tables.learners
    for cluster, learners in dict(data.get("clusters") or {}).items():
        connection.execute(
            sa.update(table)
            .where(table.c.project == project, table.c.learner.in_([str(one) for one in learners]))
            .values(cluster=str(cluster))
        )


def _set_cluster(connection: Connection, project: ProjectId, data: Mapping[str, Any], state: str) -> None:
    table = tables.clusters
    connection.execute(
        sa.update(table)
        .where(table.c.project == project, table.c.cluster == str(data.get("cluster")))
        .values(state=state, reason=data.get("reason"))
    )


def _count_cluster_round(connection: Connection, project: ProjectId, data: Mapping[str, Any]) -> None:
    table, cluster = tables.clusters, str(data.get("cluster"))
    connection.execute(
        sa.update(table)
        .where(table.c.project == project, table.c.cluster == cluster)
        .values(rounds_done=int(data["round"]))
    )
    _renew_chances(connection, project, data.get("fit_s"), tables.services.c.cluster == cluster)


def _add_round(connection: Connection, project: ProjectId, report: Report) -> None:
    number = int(report.data["round"])
    table = tables.rounds
    known = connection.execute(
        sa.select(table.c.number).where(table.c.project == project, table.c.number == number)
    ).first()
    if known is None:
        connection.execute(
            sa.insert(table).values(
                project=project, number=number, finished=report.time, data=dict(report.data)
            )
        )
        _renew_chances(connection, project, report.data.get("fit_s"), tables.services.c.learner.is_(None))
    metrics = report.data.get("metrics") or None
    values: dict[str, Any] = {"rounds_done": number}
    if metrics is not None:
        values["metrics"] = metrics
    connection.execute(sa.update(tables.projects).where(tables.projects.c.id == project).values(**values))


def _renew_chances(
    connection: Connection, project: ProjectId, learners: Any, aggregators: sa.ColumnElement[bool]
) -> None:
    """A round is progress for all who brought it about: they may be restarted as often as at first."""
    services = tables.services
    names = [str(learner) for learner in learners] if isinstance(learners, Mapping) else []
    virtual = services.c.learner.startswith(VIRTUAL)  # some of its learners did
    took_part = sa.or_(aggregators, services.c.learner.in_(names), virtual)
    connection.execute(
        sa.update(services)
        .where(services.c.project == project, services.c.restarts > 0, took_part)
        .values(restarts=0)
    )


def _end_training(connection: Connection, project: ProjectId, outcome: str, data: Mapping[str, Any]) -> None:
    connection.execute(
        sa.update(tables.projects)
        .where(tables.projects.c.id == project, tables.projects.c.training.is_(None))
        .values(training={"outcome": outcome, **data}, best_round=data.get("best_round"))
    )
