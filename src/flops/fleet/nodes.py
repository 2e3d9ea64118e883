"""Join tokens and joined nodes in the manager's database. Safe from any thread; every method is one
transaction.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flops.core import tokens as texts
from flops.core.clock import Clock, SystemClock
from flops.core.consent import Consent
from flops.core.errors import ConflictError, InvalidInputError, NotFoundError, UnauthorizedError
from flops.fleet import tables
from flops.persistence import reading, writing

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
LONGEST_S = 30 * 24 * 3600.0
"""How long a join token may be good for."""
AWAY_S = 30.0
"""A node that was not heard of for so long is not ready."""
LOST_S = 600.0
"""What ran on a node that was not heard of for so long is lost."""
_NOTED_EVERY_S = 5.0
_MAX_TOKENS = 100


@dataclass(frozen=True)
class JoinToken:
    """What is known of what lets a machine join; never its text."""

    id: str
    node: str
    owner: str
    created: float
    expires: float
    used: float | None


@dataclass(frozen=True)
class JoinedNode:
    """A machine that joined, also after it left."""

    name: str
    owner: str
    credential: str
    """The id of its credential, which is no secret."""
    platform: str
    cpus: int
    memory_mb: int
    version: str
    joined: float
    last_seen: float
    gone: float | None
    gone_reason: str | None
    allowance: dict[str, list[str]]
    holdings: list[dict[str, Any]]
    number: int

    def ready(self, now: float) -> bool:
        return self.gone is None and now - self.last_seen < AWAY_S

    def lost(self, now: float) -> bool:
        """Whether nobody waits for it any more."""
        return self.gone is not None or now - self.last_seen >= LOST_S

    @property
    def consent(self) -> Consent:
        """What its owner allows to run there."""
        return Consent.from_json(self.allowance)


class NodeStore:
    """All of them."""

    def __init__(self, engine: sa.Engine, clock: Clock | None = None) -> None:
        self._engine = engine
        self._clock = clock or SystemClock()

    def add_token(self, node: str, owner: str, lasts_s: float) -> tuple[JoinToken, str]:
        """A token with which one machine joins as ``node``, and its text, which nobody can ask for again.

        Raises:
            InvalidInputError: the name cannot be one, or the time is out of bounds.
            ConflictError: such a node is there, or was somebody else's; the owner has too many tokens.
        """
        if not _NAME.fullmatch(node):
            raise InvalidInputError(
                f"'{node[:60]}' cannot be the name of a node - use up to 40 of a-z, 0-9 and '-', "
                "a letter or digit at both ends"
            )
        if not 0 < lasts_s <= LONGEST_S:
            raise InvalidInputError(f"a join token lasts up to {LONGEST_S:.0f} s - ask for less")
        number, text = texts.make(texts.JOIN)
        now = self._clock.now()
        token = JoinToken(number, node, owner, now, now + lasts_s, None)
        table = tables.join_tokens
        with writing(self._engine) as connection:
            self._check_free(connection, node, owner)
            connection.execute(sa.delete(table).where(table.c.expires < now))
            live = sa.select(sa.func.count()).where(table.c.owner == owner, table.c.used.is_(None))
            if (connection.execute(live).scalar() or 0) >= _MAX_TOKENS:
                raise ConflictError(f"{_MAX_TOKENS} join tokens of {owner} wait to be used - use some first")
            connection.execute(sa.insert(table).values(**vars(token), sha256=texts.digest(text)))
        return token, text

    def join(
        self, text: str, *, platform: str, cpus: int, memory_mb: int, version: str
    ) -> tuple[JoinedNode, str]:
        """Use a join token up; answers the new node and the text of its credential.

        Raises:
            UnauthorizedError: the token is none of ours, used or expired; which of them is not told.
            ConflictError: such a node has joined meanwhile.
        """
        number = texts.id_of(text, texts.JOIN)
        table = tables.join_tokens
        credential, secret = texts.make(texts.NODE)
        now = self._clock.now()
        with writing(self._engine) as connection:
            row = connection.execute(sa.select(table).where(table.c.id == number)).first()
            if row is None or not texts.fits(text, row.sha256) or row.used is not None or now >= row.expires:
                raise UnauthorizedError(
                    "the join token is wrong, used or expired - ask for another one: 'flops node token NAME'"
                )
            before = self._check_free(connection, row.node, row.owner)
            connection.execute(sa.update(table).where(table.c.id == number).values(used=now))
            node = JoinedNode(
                *(row.node, row.owner, credential, platform, cpus, memory_mb, version, now, now, None, None),
                allowance={},
                holdings=[],
                # What a node of this name was told before was another set.
                number=before.number + 1 if before is not None else 0,
            )
            nodes = tables.joined_nodes
            connection.execute(sa.delete(nodes).where(nodes.c.name == node.name))
            connection.execute(sa.insert(nodes).values(**vars(node), sha256=texts.digest(secret)))
        return node, secret

    def proven(self, text: str) -> JoinedNode:
        """The node that brings this credential.

        Raises:
            UnauthorizedError: it is none of ours, or its node has left; which of the two is not told.
        """
        number = texts.id_of(text, texts.NODE)
        table = tables.joined_nodes
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(table).where(table.c.credential == number)).first()
        if row is None or not texts.fits(text, row.sha256) or row.gone is not None:
            raise UnauthorizedError(
                "the node's credential is wrong, or the node has left - join again with a new join token"
            )
        return _to_node(row)

    def check(self, node: JoinedNode) -> None:
        """Raises: UnauthorizedError: it has left since it proved itself."""
        with reading(self._engine) as connection:
            now = _get(connection, node.name)
        if now is None or now.gone is not None or now.credential != node.credential:
            raise UnauthorizedError(f"node {node.name} has left - join again with a new join token")

    def node(self, name: str) -> JoinedNode:
        """Raises: NotFoundError: no machine has joined under this name."""
        with reading(self._engine) as connection:
            found = _get(connection, name)
        if found is None:
            raise NotFoundError(f"no node '{name[:60]}' has joined - see 'flops node ls'")
        return found

    def nodes(self, *, owner: str | None = None, gone: bool = False) -> list[JoinedNode]:
        """By name.

        Args:
            owner: only theirs.
            gone: also those that have left.
        """
        table = tables.joined_nodes
        query = sa.select(table).order_by(table.c.name)
        if owner is not None:
            query = query.where(table.c.owner == owner)
        if not gone:
            query = query.where(table.c.gone.is_(None))
        with reading(self._engine) as connection:
            return [_to_node(row) for row in connection.execute(query)]

    def heard(
        self, node: JoinedNode, allowance: Mapping[str, Any], holdings: Iterable[Mapping[str, Any]]
    ) -> None:
        """A node said what it allows and holds, or only that it is there."""
        now = self._clock.now()
        said = {"allowance": dict(allowance), "holdings": [dict(holding) for holding in holdings]}
        same = said == {"allowance": node.allowance, "holdings": node.holdings}
        if same and 0 <= now - node.last_seen < _NOTED_EVERY_S:
            return
        table = tables.joined_nodes
        with writing(self._engine) as connection:
            connection.execute(
                sa.update(table)
                .where(table.c.name == node.name, table.c.credential == node.credential)
                .values(last_seen=now, **({} if same else said))
            )

    def leave(self, name: str, reason: str) -> JoinedNode:
        """From now on nobody comes in with the node's credential; a second time changes nothing.

        Raises:
            NotFoundError: no machine has joined under this name.
        """
        table = tables.joined_nodes
        with writing(self._engine) as connection:
            if _get(connection, name) is None:
                raise NotFoundError(f"no node '{name[:60]}' has joined - see 'flops node ls'")
            connection.execute(
                sa.update(table)
                .where(table.c.name == name, table.c.gone.is_(None))
                .values(gone=self._clock.now(), gone_reason=reason)
            )
            found = _get(connection, name)
        assert found is not None
        return found

    def _check_free(self, connection: sa.Connection, name: str, owner: str) -> JoinedNode | None:
        """The node of that name that has left, if there is one."""
        before = _get(connection, name)
        if before is None:
            return None
        if before.gone is None:
            raise ConflictError(f"a node '{name}' has joined already - choose another name")
        # Projects that learned there may go on there: not on somebody else's machine.
        if before.owner != owner:
            raise ConflictError(f"node '{name}' was somebody else's before it left - choose another name")
        return before


def _get(connection: sa.Connection, name: str) -> JoinedNode | None:
    table = tables.joined_nodes
    row = connection.execute(sa.select(table).where(table.c.name == name)).first()
    return _to_node(row) if row is not None else None


def _to_node(row: Any) -> JoinedNode:
    return JoinedNode(**{key: value for key, value in row._mapping.items() if key != "sha256"})
