"""What is wanted of joined nodes, and what they said of it. Safe from any thread; every method is one
transaction.

A node is told a numbered set of services; each change raises the number. What a node says counts where it is
of the attempt that is wanted, or where it knows the set from which the service is missing.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flops.fleet import tables
from flops.persistence import reading, writing

_LIVE = frozenset({"pending", "running"})


@dataclass(frozen=True)
class NodeService:
    """One service that is, or was, wanted on a joined node, and what the node said last of it."""

    name: str
    node: str
    project: str
    role: str
    wanted: bool
    attempt: int
    digest: str
    assignment: dict[str, Any]
    number: int
    state: str = "pending"
    exit_code: int | None = None
    reason: str = ""
    restarts: int = 0
    started_at: float | None = None

    @property
    def live(self) -> bool:
        return self.state in _LIVE

    def same(
        self, *, node: str, project: str, role: str, assignment: Mapping[str, Any], files: Mapping[str, str]
    ) -> bool:
        """Whether another attempt of it would be told the same."""
        told = {**assignment, "attempt": self.attempt}
        return (node, project, role) == (self.node, self.project, self.role) and (
            _digest(told, files) == self.digest
        )


@dataclass(frozen=True)
class Seen:
    """What a node says of a service."""

    name: str
    digest: str
    state: str
    exit_code: int | None
    reason: str
    restarts: int
    started_at: float | None


class ServiceStore:
    """All of them."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def want(
        self,
        name: str,
        *,
        node: str,
        project: str,
        role: str,
        assignment: Mapping[str, Any],
        files: Mapping[str, str],
    ) -> NodeService:
        """A new attempt of a service.

        Args:
            files: hashes of the files that travel with it.
        """
        table = tables.node_services
        with writing(self._engine) as connection:
            before = _get(connection, name)
            attempt = before.attempt + 1 if before is not None else 1
            told = {**assignment, "attempt": attempt}
            service = NodeService(
                *(name, node, project, role, True, attempt, _digest(told, files), told),
                number=_raise_number(connection, node),
            )
            connection.execute(sa.delete(table).where(table.c.name == name))
            connection.execute(sa.insert(table).values(**vars(service)))
        return service

    def unwant(self, names: Collection[str]) -> None:
        """They are to end; no effect on those that are not wanted."""
        table = tables.node_services
        with writing(self._engine) as connection:
            query = sa.select(table.c.node).where(table.c.name.in_(names), table.c.wanted).distinct()
            for node in connection.execute(query).scalars().all():
                connection.execute(
                    sa.update(table)
                    .where(table.c.name.in_(names), table.c.wanted, table.c.node == node)
                    .values(wanted=False, number=_raise_number(connection, node))
                )

    def settle(self, names: Collection[str], state: str, reason: str) -> None:
        """This became of those that are live; what their node says of them does not count any more."""
        table = tables.node_services
        with writing(self._engine) as connection:
            connection.execute(
                sa.update(table)
                .where(table.c.name.in_(names), table.c.state.in_(_LIVE))
                .values(wanted=False, state=state, reason=reason)
            )

    def forget(self, names: Collection[str]) -> None:
        table = tables.node_services
        with writing(self._engine) as connection:
            connection.execute(sa.delete(table).where(table.c.name.in_(names)))

    def seen(self, node: str, known: int, said: Iterable[Seen]) -> list[NodeService]:
        """Take over what a node says, while it knows the set of number ``known``; answers what changed."""
        there = {one.name: one for one in said}
        changed = []
        for service in self.services(node=node):
            after = _after(service, known, there.get(service.name))
            if after != service:
                changed.append(after)
        if changed:
            table = tables.node_services
            with writing(self._engine) as connection:
                for one in changed:
                    connection.execute(
                        sa.update(table)
                        .where(table.c.name == one.name, table.c.attempt == one.attempt)
                        .values(
                            state=one.state,
                            exit_code=one.exit_code,
                            reason=one.reason,
                            restarts=one.restarts,
                            started_at=one.started_at,
                        )
                    )
        return changed

    def services(self, *, node: str | None = None, project: str | None = None) -> list[NodeService]:
        """By name."""
        table = tables.node_services
        query = sa.select(table).order_by(table.c.name)
        if node is not None:
            query = query.where(table.c.node == node)
        if project is not None:
            query = query.where(table.c.project == project)
        with reading(self._engine) as connection:
            return [_to_service(row) for row in connection.execute(query)]

    def service(self, name: str) -> NodeService | None:
        with reading(self._engine) as connection:
            return _get(connection, name)

    def wanted(self, node: str) -> tuple[int, list[NodeService]]:
        """The set that a node is told, and its number."""
        nodes, table = tables.joined_nodes, tables.node_services
        query = sa.select(table).where(table.c.node == node, table.c.wanted).order_by(table.c.name)
        with reading(self._engine) as connection:
            number = connection.execute(sa.select(nodes.c.number).where(nodes.c.name == node)).scalar() or 0
            return int(number), [_to_service(row) for row in connection.execute(query)]


def _after(service: NodeService, known: int, said: Seen | None) -> NodeService:
    """A service after its node said this, or nothing, of it."""
    values = dict(vars(service))
    if said is not None and said.digest == service.digest and service.live:
        values.update({key: value for key, value in vars(said).items() if key not in ("name", "digest")})
    ended = said is None or said.state not in _LIVE
    if not service.wanted and known >= service.number and ended and values["state"] in _LIVE:
        values.update(state="exited", reason="stopped")
    return NodeService(**values)


def _digest(assignment: Mapping[str, Any], files: Mapping[str, str]) -> str:
    text = json.dumps([dict(assignment), dict(files)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _raise_number(connection: sa.Connection, node: str) -> int:
    nodes = tables.joined_nodes
    here = nodes.c.name == node
    connection.execute(sa.update(nodes).where(here).values(number=nodes.c.number + 1))
    return int(connection.execute(sa.select(nodes.c.number).where(here)).scalar() or 0)


def _get(connection: sa.Connection, name: str) -> NodeService | None:
    table = tables.node_services
    row = connection.execute(sa.select(table).where(table.c.name == name)).first()
    return _to_service(row) if row is not None else None


def _to_service(row: Any) -> NodeService:
    return NodeService(**row._mapping)
