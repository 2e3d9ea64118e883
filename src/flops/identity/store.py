"""Users and tokens in the manager's database. Safe from any thread; every method is one transaction."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flops.core import tokens as texts
from flops.core.clock import Clock, SystemClock
from flops.core.errors import ConflictError, InvalidInputError, NotFoundError, UnauthorizedError
from flops.identity import tables
from flops.identity.roles import PERMISSIONS, Caller, Role, check_scopes
from flops.persistence import reading, writing

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._@+-]{0,58}[a-z0-9])?")
_MAX_TOKENS = 100
_MAX_TEAMS = 50
_NOTED_EVERY_S = 60.0
ADMIN = "admin"
"""The user that is there from the start, and whose the FLOPS_HOME's own token is."""
LONGEST_S = 366 * 24 * 3600.0
"""How long a token may be good for."""


@dataclass(frozen=True)
class User:
    """Somebody, or a program, that uses the manager."""

    name: str
    role: Role
    teams: frozenset[str]
    disabled: bool
    created: float


@dataclass(frozen=True)
class Token:
    """What is known of a token; never its text."""

    id: str
    user: str
    name: str
    scopes: frozenset[str]
    created: float
    expires: float | None
    last_used: float | None
    revoked: float | None


class IdentityStore:
    """All users and tokens."""

    def __init__(self, engine: sa.Engine, clock: Clock | None = None) -> None:
        self._engine = engine
        self._clock = clock or SystemClock()

    # users

    def add_user(self, name: str, role: Role, teams: Iterable[str] = ()) -> User:
        """Raises: InvalidInputError: the name, or a team's, cannot be one. ConflictError: it is taken."""
        user = User(_checked(name, "user"), role, _teams(teams), False, self._clock.now())
        with writing(self._engine) as connection:
            if self._user(connection, name) is not None:
                raise ConflictError(f"user '{name}' is there already - choose another name")
            connection.execute(
                sa.insert(tables.users).values(
                    name=name, role=role.value, teams=sorted(user.teams), disabled=False, created=user.created
                )
            )
        return user

    def change_user(
        self,
        name: str,
        *,
        role: Role | None = None,
        teams: Iterable[str] | None = None,
        disabled: bool | None = None,
    ) -> User:
        """Change what is given. A user who is disabled is refused with every token.

        Raises:
            NotFoundError: there is no such user.
            ConflictError: nobody would be left who may change users.
        """
        values: dict[str, Any] = {}
        if role is not None:
            values["role"] = role.value
        if teams is not None:
            values["teams"] = sorted(_teams(teams))
        if disabled is not None:
            values["disabled"] = disabled
        with writing(self._engine) as connection:
            self._must(connection, name)
            if values:
                connection.execute(
                    sa.update(tables.users).where(tables.users.c.name == name).values(**values)
                )
            if not self._has_admin(connection):
                raise ConflictError(f"user '{name}' is the only admin - make another one first")
            return self._must(connection, name)

    def user(self, name: str) -> User:
        """Raises: NotFoundError: there is no such user."""
        with reading(self._engine) as connection:
            return self._must(connection, name)

    def users(self) -> list[User]:
        """All of them, by name."""
        with reading(self._engine) as connection:
            return [
                _to_user(row)
                for row in connection.execute(sa.select(tables.users).order_by(tables.users.c.name))
            ]

    def ensure_admin(self) -> None:
        """Make the user ``admin`` where there is no user yet."""
        with writing(self._engine) as connection:
            if connection.execute(sa.select(tables.users.c.name).limit(1)).first() is None:
                values = {"role": Role.ADMIN.value, "teams": [], "disabled": False}
                connection.execute(
                    sa.insert(tables.users).values(name=ADMIN, created=self._clock.now(), **values)
                )

    # tokens

    def add_token(
        self, user: str, name: str, scopes: Iterable[str] | None = None, lasts_s: float | None = None
    ) -> tuple[Token, str]:
        """A new token and its text, which nobody can ask for again.

        Args:
            scopes: what it is good for, see `check_scopes`; None: all that the user may do.
            lasts_s: None: until it is revoked.
        Raises:
            NotFoundError: there is no such user.
            InvalidInputError: name, scopes or time are out of bounds.
            ConflictError: the user has too many.
        """
        wanted = PERMISSIONS if scopes is None else check_scopes(scopes)
        if not name or len(name) > 100 or not name.isprintable():
            raise InvalidInputError("a token's name has 1 to 100 printable characters - say what it is for")
        if lasts_s is not None and not 0 < lasts_s <= LONGEST_S:
            raise InvalidInputError(f"a token lasts up to {LONGEST_S:.0f} s - ask for less, or leave it out")
        number, text = texts.make(texts.USER)
        table = tables.tokens
        with writing(self._engine) as connection:
            self._must(connection, user)
            live = sa.select(sa.func.count()).where(table.c.user == user, table.c.revoked.is_(None))
            if (connection.execute(live).scalar() or 0) >= _MAX_TOKENS:
                raise ConflictError(f"user '{user}' has {_MAX_TOKENS} tokens - revoke some first")
            now = self._clock.now()
            token = Token(number, user, name, wanted, now, now + lasts_s if lasts_s else None, None, None)
            values = {**vars(token), "scopes": sorted(wanted), "sha256": texts.digest(text)}
            connection.execute(sa.insert(table).values(**values))
        return token, text

    def tokens(self, user: str | None = None) -> list[Token]:
        """Of one user or of all, the newest first; revoked ones too."""
        table = tables.tokens
        query = sa.select(table).order_by(table.c.created.desc(), table.c.id)
        if user is not None:
            query = query.where(table.c.user == user)
        with reading(self._engine) as connection:
            return [_to_token(row) for row in connection.execute(query)]

    def token(self, number: str) -> Token:
        """Raises: NotFoundError: there is no such token."""
        with reading(self._engine) as connection:
            return self._token(connection, number)

    def revoke(self, number: str) -> Token:
        """From now on nobody comes in with it; a second time changes nothing.

        Raises:
            NotFoundError: there is no such token.
        """
        table = tables.tokens
        with writing(self._engine) as connection:
            self._token(connection, number)
            connection.execute(
                sa.update(table)
                .where(table.c.id == number, table.c.revoked.is_(None))
                .values(revoked=self._clock.now())
            )
            return self._token(connection, number)

    def caller(self, text: str) -> Caller:
        """Who brings this token.

        Raises:
            UnauthorizedError: it is none of ours, or no longer good; which of the two is not told.
        """
        number = texts.id_of(text, texts.USER)
        if number is None:
            raise _refused()
        table = tables.tokens
        query = sa.select(table, tables.users.c.role, tables.users.c.teams, tables.users.c.disabled).join(
            tables.users
        )
        with reading(self._engine) as connection:
            row = connection.execute(query.where(table.c.id == number)).first()
        now = self._clock.now()
        # The secret first: whoever does not know it learns nothing about the token.
        if row is None or not texts.fits(text, row.sha256):
            raise _refused()
        if row.revoked is not None or row.disabled or (row.expires is not None and now >= row.expires):
            raise _refused()
        if row.last_used is None or now - row.last_used >= _NOTED_EVERY_S:
            with writing(self._engine) as connection:
                connection.execute(sa.update(table).where(table.c.id == number).values(last_used=now))
        return Caller(
            row.user,
            Role(row.role),
            frozenset(row.teams),
            frozenset(row.scopes) & PERMISSIONS,
            number,
            row.expires,
        )

    def _user(self, connection: sa.Connection, name: str) -> User | None:
        row = connection.execute(sa.select(tables.users).where(tables.users.c.name == name)).first()
        return _to_user(row) if row is not None else None

    def _must(self, connection: sa.Connection, name: str) -> User:
        user = self._user(connection, name)
        if user is None:
            raise NotFoundError(f"there is no user '{name[:60]}' - see 'flops user ls'")
        return user

    def _has_admin(self, connection: sa.Connection) -> bool:
        table = tables.users
        query = sa.select(table.c.name).where(table.c.role == Role.ADMIN.value, table.c.disabled.is_(False))
        return connection.execute(query.limit(1)).first() is not None

    def _token(self, connection: sa.Connection, number: str) -> Token:
        row = connection.execute(sa.select(tables.tokens).where(tables.tokens.c.id == number)).first()
        if row is None:
            raise NotFoundError(f"there is no token '{number[:20]}' - see 'flops token ls'")
        return _to_token(row)


def _refused() -> UnauthorizedError:
    return UnauthorizedError("the token is wrong, revoked or expired - ask an admin for another one")


def _checked(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"'{name[:60]}' cannot be the name of a {what} - use up to 60 of a-z, 0-9 and . _ @ + -, "
            "a letter or digit at both ends"
        )
    return name


def _teams(teams: Iterable[str]) -> frozenset[str]:
    checked = frozenset(_checked(team, "team") for team in teams)
    if len(checked) > _MAX_TEAMS:
        raise InvalidInputError(f"{len(checked)} teams are too many - a user is in up to {_MAX_TEAMS}")
    return checked


def _to_user(row: Any) -> User:
    return User(row.name, Role(row.role), frozenset(row.teams), row.disabled, row.created)


def _to_token(row: Any) -> Token:
    return Token(
        row.id,
        row.user,
        row.name,
        frozenset(row.scopes) & PERMISSIONS,
        row.created,
        row.expires,
        row.last_used,
        row.revoked,
    )
