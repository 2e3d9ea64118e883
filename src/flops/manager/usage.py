"""What ran on whose data: of each site that took part in a project, which code, how often, what left it."""

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from flops.core.events import EventKind
from flops.manager import tables
from flops.manager.ownership import Holdings
from flops.manager.states import DATA, IMAGES

_FETCH = "fetch"
_ROUNDS = (EventKind.ROUND_FINISHED, EventKind.CLUSTER_ROUND)


def uses_of_data(
    connection: Connection,
    *,
    site: str | None = None,
    tag: str | None = None,
    user: str | None = None,
    teams: Collection[str] = (),
    holdings: Holdings | None = None,
    limit: int = 100,
) -> list[dict[str, Any]]:
    """One entry for each site and project, those of the newest projects first.

    Args:
        site, tag: only what used data of this site, or under this tag.
        user: only of projects of this user, or of one of ``teams``; None: of all.
        holdings: only what used these data; None: any.
    """
    projects, learners = tables.projects, tables.learners
    query = (
        sa.select(
            learners.c.learner,
            learners.c.site,
            learners.c.state.label("learner_state"),
            *(projects.c[name] for name in ("id", "name", "owner", "source", "created", "state")),
        )
        .join(projects, learners.c.project == projects.c.id)
        .order_by(projects.c.created.desc(), projects.c.id, learners.c.number)
        .limit(limit)
    )
    if site is not None:
        query = query.where(learners.c.site == site)
    if holdings is not None:
        there = learners.c.site.in_(holdings.sites) & learners.c.node.not_in(holdings.strange_nodes)
        query = query.where(there | learners.c.node.in_(holdings.nodes))
    if user is not None:
        query = query.where(sa.or_(projects.c.owner == user, projects.c.team.in_(teams)))
    rows = connection.execute(query).all()
    ids = sorted({row.id for row in rows})
    results = _results(connection, ids)
    sent = _sent(connection, ids)
    return [
        {
            "site": row.site,
            "learner": row.learner,
            "project": row.id,
            "name": row.name,
            "owner": row.owner,
            "state": row.state,
            "source": row.source,
            "commit": results.get((row.id, _FETCH), {}).get("commit"),
            "image": results.get((row.id, IMAGES), {}).get("learner"),
            "tags": list(results.get((row.id, DATA), {}).get("tags", ())),
            "created": row.created,
            "updates": sent.get((row.id, row.learner), (0, 0))[0],
            "bytes_out": sent.get((row.id, row.learner), (0, 0))[1],
        }
        for row in rows
        if tag is None or tag in results.get((row.id, DATA), {}).get("tags", ())
    ]


def _results(connection: Connection, ids: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Of the steps that say what ran, and on which data."""
    table = tables.steps
    query = sa.select(table.c.project, table.c.name, table.c.result).where(
        table.c.project.in_(ids), table.c.name.in_((_FETCH, IMAGES, DATA))
    )
    return {(row.project, row.name): dict(row.result or {}) for row in connection.execute(query)}


def _sent(connection: Connection, ids: list[str]) -> dict[tuple[str, str], tuple[int, int]]:
    """Updates of learners that were made use of, and their bytes: updates of one round are of one size."""
    table = tables.events
    query = sa.select(table.c.project, table.c.data).where(
        table.c.project.in_(ids), table.c.kind.in_([kind.value for kind in _ROUNDS])
    )
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for row in connection.execute(query):
        learners = (
            row.data.get("fit_s") or {}
        )  # of a root's rounds over clusters: those, which are no learners
        for learner in learners:
            count, size = found.get((row.project, learner), (0, 0))
            one = int(row.data.get("bytes_up") or 0) // len(learners)
            found[row.project, learner] = (count + 1, size + one)
    return found
