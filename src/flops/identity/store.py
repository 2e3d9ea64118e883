"""Users and tokens in the manager's database. Safe from any thread; every method is one transaction."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import sqlalchemy as sa

from flops.core import tokens as texts
from flops.core.clock import Clock, SystemClock
from flops.core.errors import (
    ConflictError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    UnauthorizedError,
)
from flops.core.recent import Recent
from flops.identity import tables
from flops.identity.roles import PERMISSIONS, Caller, Role, check_scopes
from flops.identity.uses import Uses
from flops.persistence import reading, writing

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._@+-]{0,58}[a-z0-9])?")
_MAX_TOKENS = 100
_MAX_TEAMS = 50
_KEPT_S = 5.0
"""Tokens are not looked up again so soon; who changes the database past the store waits so long for it."""
_MANY = 10_000
_MAX_SIGN_INS = 20
"""At a time, of one user; the oldest one ends with the next."""
_SIGN_INS_KEPT_S = 30 * 24 * 3600.0
ADMIN = "admin"
"""The user that is there from the start, and whose the FLOPS_HOME's own token is."""
LONGEST_S = 366 * 24 * 3600.0
"""How long a token may be good for."""


_USERS = sa.select(
    tables.users,
    sa.select(sa.func.max(tables.accounts.c.issuer))
    .where(tables.accounts.c.user == tables.users.c.name)
    .scalar_subquery()
    .label("issuer"),
)


@dataclass(frozen=True)
class User:
    """Somebody, or a program, that uses the manager."""

    name: str
    role: Role
    teams: frozenset[str]
    disabled: bool
    created: float
    issuer: str | None = None
    """With which they sign in; None: with tokens only, so far."""


@dataclass(frozen=True)
class Account:
    """Somebody, as an issuer of OpenID Connect tells."""

    issuer: str
    subject: str
    """Stays the same whatever they are called."""
    name: str
    may_take_place: bool
    """A user of that name whom an admin added is sure to be them."""
    role: Role | None
    """What follows from what the issuer says; None: nothing."""
    role_binds: bool
    """It is the issuer's word who has which role, also of users who are there."""
    teams: frozenset[str] | None
    """None: they are not the issuer's to say."""


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
    signed_in: bool = False
    """It came from signing in with an issuer."""


class IdentityStore:
    """All users and tokens."""

    def __init__(self, engine: sa.Engine, clock: Clock | None = None) -> None:
        self._engine = engine
        self._clock = clock or SystemClock()
        self._recent: Recent[str, Any] = Recent(self._clock, kept_s=_KEPT_S, most=_MANY)
        self._changes = count(1)
        self._version = 0
        self._uses = Uses(engine, self._clock)

    @contextmanager
    def _changing(self) -> Iterator[sa.Connection]:
        """Like `writing`; no token is known by what was read before."""
        try:
            with writing(self._engine) as connection:
                yield connection
        finally:  # a commit whose answer was lost may have come about
            self._version = next(self._changes)

    # users

    def add_user(self, name: str, role: Role, teams: Iterable[str] = ()) -> User:
        """Raises: InvalidInputError: the name, or a team's, cannot be one. ConflictError: it is taken."""
        user = User(check_name(name, "user"), role, _teams(teams), False, self._clock.now())
        with self._changing() as connection:
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
        unbind: bool = False,
    ) -> User:
        """Change what is given. A user who is disabled is refused with every token.

        Args:
            unbind: forget who they are at issuers; whoever has their name there may take their place anew.

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
        with self._changing() as connection:
            self._must(connection, name)
            if values:
                connection.execute(
                    sa.update(tables.users).where(tables.users.c.name == name).values(**values)
                )
            if unbind:
                connection.execute(sa.delete(tables.accounts).where(tables.accounts.c.user == name))
                self._end_sign_ins(connection, name)
            self._check_admin(connection, name)
            return self._must(connection, name)

    def user(self, name: str) -> User:
        """Raises: NotFoundError: there is no such user."""
        with reading(self._engine) as connection:
            return self._must(connection, name)

    def users(self) -> list[User]:
        """All of them, by name."""
        with reading(self._engine) as connection:
            return [_to_user(row) for row in connection.execute(_USERS.order_by(tables.users.c.name))]

    def ensure_admin(self) -> None:
        """Make the user ``admin`` where there is no user yet."""
        with self._changing() as connection:
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
        with self._changing() as connection:
            self._must(connection, user)
            live = sa.select(sa.func.count()).where(*self._live(user, signed_in=False))
            if (connection.execute(live).scalar() or 0) >= _MAX_TOKENS:
                raise ConflictError(f"user '{user}' has {_MAX_TOKENS} tokens - revoke some first")
            return self._insert_token(connection, user, name, wanted, lasts_s)

    def sign_in(self, account: Account, name: str, lasts_s: float) -> tuple[User, Token, str]:
        """Let in whom an issuer stands by: bound to a user the first time, role and teams as it says now.

        Args:
            name: of the token.
        Raises:
            ForbiddenError: they may not come in.
            ConflictError: nobody would be left who may change users.
        """
        with self._changing() as connection:
            user = self._bound(connection, account)
            role = account.role if account.role_binds else user.role
            if role is None:  # the issuer gives them none any more: those let in before are out as well
                self._end_sign_ins(connection, user.name)
            else:
                teams = user.teams if account.teams is None else account.teams
                connection.execute(
                    sa.update(tables.users)
                    .where(tables.users.c.name == user.name)
                    .values(role=role.value, teams=sorted(_teams(teams)))
                )
                self._check_admin(connection, user.name)
                self._end_sign_ins(connection, user.name, but=_MAX_SIGN_INS - 1)
                made = self._insert_token(connection, user.name, name, PERMISSIONS, lasts_s, signed_in=True)
                return self._must(connection, user.name), *made
        raise ForbiddenError(f"none of your groups has a role here, {user.name} - ask an admin")

    def _bound(self, connection: sa.Connection, account: Account) -> User:
        """The user behind an account, who may come in."""
        table, now = tables.accounts, self._clock.now()
        this = (table.c.issuer == account.issuer, table.c.subject == account.subject)
        found = connection.execute(sa.select(table.c.user).where(*this)).first()
        if found is not None:
            connection.execute(sa.update(table).where(*this).values(last=now))
            return _let_in(self._must(connection, found.user))
        user = self._user(connection, account.name)
        if user is None:
            if account.role is None:
                raise ForbiddenError(
                    f"nobody has added {account.name} here - ask an admin for 'flops user add {account.name}'"
                )
            user = User(account.name, account.role, frozenset(), False, now)
            connection.execute(
                sa.insert(tables.users).values(
                    name=user.name, role=user.role.value, teams=[], disabled=False, created=now
                )
            )
        elif not account.may_take_place:
            raise ForbiddenError(
                f"there is a user {user.name} already, and no proof that it is you - ask an admin to add you "
                "by your verified e-mail address"
            )
        other = sa.select(table.c.subject).where(table.c.user == user.name, table.c.issuer == account.issuer)
        if connection.execute(other).first() is not None:
            raise ForbiddenError(
                f"user {user.name} is bound to somebody else of that name - ask an admin for "
                f"'flops user set {user.name} --unbind'"
            )
        _let_in(user)
        values = {"issuer": account.issuer, "subject": account.subject}
        connection.execute(sa.insert(table).values(user=user.name, created=now, last=now, **values))
        return user

    def _live(self, user: str, *, signed_in: bool) -> list[sa.ColumnElement[bool]]:
        table = tables.tokens
        return [
            table.c.user == user,
            table.c.signed_in.is_(signed_in),
            table.c.revoked.is_(None),
            sa.or_(table.c.expires.is_(None), table.c.expires > self._clock.now()),
        ]

    def _end_sign_ins(self, connection: sa.Connection, user: str, *, but: int = 0) -> None:
        """Revoke what came from signing in, but for the newest ones, and forget what was over long ago."""
        table, now = tables.tokens, self._clock.now()
        newest = sa.select(table.c.id).where(*self._live(user, signed_in=True))
        ids = list(connection.execute(newest.order_by(table.c.created.desc(), table.c.id)).scalars())
        connection.execute(sa.update(table).where(table.c.id.in_(ids[but:])).values(revoked=now))
        old = (table.c.user == user, table.c.signed_in.is_(True), table.c.expires < now - _SIGN_INS_KEPT_S)
        connection.execute(sa.delete(table).where(*old))

    def _insert_token(
        self,
        connection: sa.Connection,
        user: str,
        name: str,
        scopes: frozenset[str],
        lasts_s: float | None,
        *,
        signed_in: bool = False,
    ) -> tuple[Token, str]:
        number, text = texts.make(texts.USER)
        now = self._clock.now()
        ends = now + lasts_s if lasts_s else None
        token = Token(number, user, name, scopes, now, ends, None, None, signed_in)
        values = {**vars(token), "scopes": sorted(scopes), "sha256": texts.digest(text)}
        connection.execute(sa.insert(tables.tokens).values(**values))
        return token, text

    def tokens(self, user: str | None = None) -> list[Token]:
        """Of one user or of all, the newest first; revoked ones too."""
        table = tables.tokens
        query = sa.select(table).order_by(table.c.created.desc(), table.c.id)
        if user is not None:
            query = query.where(table.c.user == user)
        with reading(self._engine) as connection:
            return [self._to_token(row) for row in connection.execute(query)]

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
        with self._changing() as connection:
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
        if (known := self.recent_caller(text)) is not None:
            return known
        number = texts.id_of(text, texts.USER)
        if number is None:
            raise _refused()
        table = tables.tokens
        query = sa.select(table, tables.users.c.role, tables.users.c.teams, tables.users.c.disabled).join(
            tables.users
        )
        version = self._version
        with reading(self._engine) as connection:
            row = connection.execute(query.where(table.c.id == number)).first()
        caller = self._proven(row, text)
        self._recent.keep(number, row, version)
        self._uses.write_if_due()
        return caller

    def recent_caller(self, text: str) -> Caller | None:
        """The same, where that takes no look into the database; None: it does."""
        number = texts.id_of(text, texts.USER)
        row = self._recent.get(number, self._version) if number is not None else None
        return self._proven(row, text) if row is not None else None

    def close(self) -> None:
        """Write down what is only known here; see `Uses`."""
        self._uses.write()

    def _proven(self, row: Any, text: str) -> Caller:
        # The secret first: whoever does not know it learns nothing about the token.
        if row is None or not texts.fits(text, row.sha256):
            raise _refused()
        expired = row.expires is not None and self._clock.now() >= row.expires
        if row.revoked is not None or row.disabled or expired:
            raise _refused()
        self._uses.note(row.id, row.last_used)
        return Caller(
            row.user,
            Role(row.role),
            frozenset(row.teams),
            frozenset(row.scopes) & PERMISSIONS,
            row.id,
            row.expires,
            row.signed_in,
        )

    def _user(self, connection: sa.Connection, name: str) -> User | None:
        row = connection.execute(_USERS.where(tables.users.c.name == name)).first()
        return _to_user(row) if row is not None else None

    def _must(self, connection: sa.Connection, name: str) -> User:
        user = self._user(connection, name)
        if user is None:
            raise NotFoundError(f"there is no user '{name[:60]}' - see 'flops user ls'")
        return user

    def _check_admin(self, connection: sa.Connection, changed: str) -> None:
        table = tables.users
        query = sa.select(table.c.name).where(table.c.role == Role.ADMIN.value, table.c.disabled.is_(False))
        if connection.execute(query.limit(1)).first() is None:
            raise ConflictError(f"user '{changed}' is the only admin - make another one first")

    def _token(self, connection: sa.Connection, number: str) -> Token:
        row = connection.execute(sa.select(tables.tokens).where(tables.tokens.c.id == number)).first()
        if row is None:
            raise NotFoundError(f"there is no token '{number[:20]}' - see 'flops token ls'")
        return self._to_token(row)

    def _to_token(self, row: Any) -> Token:
        return Token(
            row.id,
            row.user,
            row.name,
            frozenset(row.scopes) & PERMISSIONS,
            row.created,
            row.expires,
            self._uses.last(row.id, row.last_used),
            row.revoked,
            row.signed_in,
        )


def _refused() -> UnauthorizedError:
    return UnauthorizedError("the token is wrong, revoked or expired - ask an admin for another one")


def _let_in(user: User) -> User:
    if user.disabled:
        raise ForbiddenError(f"user {user.name} is shut out - ask an admin")
    return user


def is_name(text: str) -> bool:
    """Whether a user or a team can be called that."""
    return _NAME.fullmatch(text) is not None


def check_name(name: str, what: str) -> str:
    """Raises: InvalidInputError: nothing can be called that."""
    if not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"'{name[:60]}' cannot be the name of a {what} - use up to 60 of a-z, 0-9 and . _ @ + -, "
            "a letter or digit at both ends"
        )
    return name


def _teams(teams: Iterable[str]) -> frozenset[str]:
    checked = frozenset(check_name(team, "team") for team in teams)
    if len(checked) > _MAX_TEAMS:
        raise InvalidInputError(f"{len(checked)} teams are too many - a user is in up to {_MAX_TEAMS}")
    return checked


def _to_user(row: Any) -> User:
    return User(row.name, Role(row.role), frozenset(row.teams), row.disabled, row.created, row.issuer)
