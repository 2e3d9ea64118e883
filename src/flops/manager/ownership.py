"""Whose data are whose: a site of the manager's own nodes belongs to the data owner who first put data there.

What a joined machine holds belongs to its owner, which `flops.fleet` knows. A site that nobody claimed is the
operators': admins put data anywhere, and own nothing by it.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from flops.core.clock import Clock
from flops.core.errors import ForbiddenError
from flops.manager import tables
from flops.persistence import reading, writing


@dataclass(frozen=True)
class Holdings:
    """What of all data is a data owner's.

    Args:
        sites: of the manager's own nodes.
        nodes: joined ones, those that have left among them.
        strange_nodes: joined ones of others.
    """

    sites: Collection[str]
    nodes: Collection[str]
    strange_nodes: Collection[str]


class SiteOwners:
    """All sites that belong to somebody. Safe from any thread; every method is one transaction."""

    def __init__(self, engine: sa.Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    def of(self, owner: str) -> frozenset[str]:
        """Their sites."""
        table = tables.sites
        with reading(self._engine) as connection:
            return frozenset(connection.scalars(sa.select(table.c.site).where(table.c.owner == owner)))

    def claim(self, sites: Iterable[str], owner: str, holding: Callable[[], Collection[str]]) -> None:
        """Let sites that nobody has be theirs: all of them, or none.

        Args:
            holding: answers which sites hold data; asked only where one of the wanted ones is new.
        Raises:
            ForbiddenError: one of them is somebody else's, or holds data of nobody in particular.
        """
        wanted, table = frozenset(sites), tables.sites
        new = wanted - self.of(owner)
        if not new:
            return
        for site in sorted(new & frozenset(holding())):
            raise _taken(site)
        with writing(self._engine) as connection:
            query = sa.select(table.c.site, table.c.owner).where(table.c.site.in_(wanted))
            known = {row.site: row.owner for row in connection.execute(query)}
            for site in sorted(wanted):
                if known.get(site, owner) != owner:
                    raise _taken(site)
            rows = [
                {"site": site, "owner": owner, "created": self._clock.now()} for site in wanted - known.keys()
            ]
            if rows:
                connection.execute(sa.insert(table), rows)


def _taken(site: str) -> ForbiddenError:
    return ForbiddenError(
        f"site '{site[:80]}' is not yours - use another name for your site, or ask an admin"
    )
