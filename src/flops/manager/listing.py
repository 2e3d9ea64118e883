"""Pages of projects and of models: filtered, ordered and cut by the database, projects with what one line
shows of them.

A cursor names the last one of a page by its place (when it was created, and its id), so what comes or goes
meanwhile neither repeats nor hides others.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from flops.core.errors import InvalidInputError
from flops.core.ids import ProjectId, project_id
from flops.manager import tables
from flops.manager.rows import Model
from flops.manager.states import State

_COLUMNS = (
    "id",
    "name",
    "owner",
    "team",
    "state",
    "reason",
    "source",
    "created",
    "updated",
    "finished",
    "rounds_done",
    "rounds_total",
    "metrics",
    "best_round",
)
_SEARCHED = ("id", "name", "source", "reason")


@dataclass(frozen=True)
class Wanted:
    """Which projects, and how many of them.

    Args:
        user: whose they are; None: everybody's.
        teams: whose they may be as well.
        states: any of these; none: all.
        name: exactly.
        text: somewhere in id, name, source or reason, in any case.
        after: a page's ``next``; None: from the newest on.
        limit: None: all of them.
    """

    user: str | None = None
    teams: Collection[str] = ()
    states: Sequence[State] = ()
    name: str | None = None
    text: str | None = None
    after: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Page:
    """Projects, the newest first; ``next`` is the cursor of those behind them, None: there are none."""

    projects: list[dict[str, Any]]
    next: str | None


def page_of_projects(connection: Connection, wanted: Wanted) -> Page:
    """Two queries, however many projects there are.

    Raises:
        InvalidInputError: ``after`` is no cursor.
    """
    table = tables.projects
    query = sa.select(*(table.c[name] for name in _COLUMNS)).order_by(table.c.created.desc(), table.c.id)
    if wanted.user is not None:
        query = query.where(sa.or_(table.c.owner == wanted.user, table.c.team.in_(wanted.teams)))
    if wanted.states:
        query = query.where(table.c.state.in_([state.value for state in wanted.states]))
    if wanted.name is not None:
        query = query.where(table.c.name == wanted.name)
    if wanted.text:
        found = (table.c[name].icontains(wanted.text, autoescape=True) for name in _SEARCHED)
        query = query.where(sa.or_(*found))
    if wanted.after is not None:
        created, last = _place(wanted.after)
        behind = sa.and_(table.c.created == created, table.c.id > last)
        query = query.where(sa.or_(table.c.created < created, behind))
    if wanted.limit is not None:
        query = query.limit(wanted.limit + 1)
    rows = [dict(row._mapping) for row in connection.execute(query)]
    more = wanted.limit is not None and len(rows) > wanted.limit
    rows = rows[: wanted.limit]
    models = _newest_models(connection, [row["id"] for row in rows])
    return Page(
        [row | {"model": models.get(row["id"])} for row in rows],
        f"{rows[-1]['created']!r}~{rows[-1]['id']}" if more and rows else None,
    )


@dataclass(frozen=True)
class Sight:
    """Whose models somebody sees: their own, and those of their teams."""

    user: str
    teams: Collection[str] = ()


def models_seen(sight: Sight | None = None) -> sa.Select[Any]:
    """Of everybody's models, or of those that are in sight."""
    table = tables.models
    query = sa.select(*(table.c[field.name] for field in fields(Model)))
    if sight is None:
        return query
    return query.where(sa.or_(table.c.owner == sight.user, table.c.team.in_(sight.teams)))


def page_of_models(
    connection: Connection, name: str | None, after: str | None, limit: int, sight: Sight | None = None
) -> tuple[list[Model], str | None]:
    """Versions of models, the newest first, and the cursor of those behind them.

    Raises:
        InvalidInputError: ``after`` is no cursor.
    """
    table = tables.models
    order = table.c.created.desc(), table.c.name, table.c.version
    query = models_seen(sight).order_by(*order).limit(limit + 1)
    if name is not None:
        query = query.where(table.c.name == name)
    if after is not None:
        created, version, last = _place_of_model(after)
        behind = sa.or_(table.c.name > last, sa.and_(table.c.name == last, table.c.version > version))
        query = query.where(sa.or_(table.c.created < created, sa.and_(table.c.created == created, behind)))
    found = [Model(**dict(row._mapping)) for row in connection.execute(query)]
    if len(found) <= limit:
        return found, None
    end = found[limit - 1]
    return found[:limit], f"{end.created!r}~{end.version}~{end.name}"


def _place_of_model(cursor: str) -> tuple[float, int, str]:
    created, _, rest = cursor.partition("~")
    version, _, name = rest.partition("~")
    try:
        place = float(created), int(version), name
    except ValueError:
        place = math.nan, 0, ""
    if not math.isfinite(place[0]) or not 0 < place[1] < 2**31:
        raise _no_cursor(cursor)
    return place


def _no_cursor(cursor: str) -> InvalidInputError:
    return InvalidInputError(f"after: '{cursor[:60]}' is no cursor - send 'next' of the page before")


def _place(cursor: str) -> tuple[float, ProjectId]:
    created, _, last = cursor.partition("~")
    try:
        place = float(created), project_id(last)
    except (ValueError, InvalidInputError):
        place = math.nan, ProjectId("")
    if not math.isfinite(place[0]):
        raise _no_cursor(cursor)
    return place


def _newest_models(connection: Connection, projects: Sequence[str]) -> dict[str, dict[str, Any]]:
    table = tables.models
    newest: dict[str, dict[str, Any]] = {}
    for start in range(0, len(projects), 500):  # a statement holds so many values
        query = (
            sa.select(table.c.project, table.c.name, table.c.version, table.c.uri)
            .where(table.c.project.in_(projects[start : start + 500]))
            .order_by(table.c.created)
        )
        for row in connection.execute(query):
            newest[row.project] = {"name": row.name, "version": row.version, "uri": row.uri}
    return newest
