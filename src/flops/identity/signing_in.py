"""Signing in with an issuer: from the first step, over what it says of a person, to a token of ours.

Whoever begins gets a secret that never passes the issuer or an address, and only with that they finish: a
code that leaks, or an answer that somebody else slips in, is good for nothing. Sign-ins under way are kept in
memory, for ten minutes, each for one try.
"""

import hmac
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flops.core.clock import Clock, SystemClock
from flops.core.errors import ForbiddenError, InvalidInputError, UnauthorizedError
from flops.core.issuer import IssuerSettings
from flops.identity.issuer import Issuer
from flops.identity.roles import Role
from flops.identity.store import ADMIN, Account, IdentityStore, Token, User, check_name, is_name

LASTS_S = 12 * 3600.0
"""How long the token of a sign-in is good for."""
_UNDER_WAY_S = 600.0
_MOST_UNDER_WAY = 10_000
_MOST_GROUPS = 2000
_RANKED = (Role.ADMIN, Role.ENGINEER, Role.DATA_OWNER, Role.AUDITOR)
"""Who is in several groups has the first of their roles."""


@dataclass(frozen=True)
class Begun:
    """A sign-in under way."""

    url: str
    """Where the person goes."""
    state: str
    """What comes back from there."""
    secret: str
    """What whoever began keeps for themselves."""


@dataclass(frozen=True)
class _UnderWay:
    redirect_uri: str
    secret: str
    nonce: str
    verifier: str
    until: float


class SignIns:
    """All sign-ins with one issuer.

    Raises:
        InvalidInputError: what the operator configured cannot be.
    """

    def __init__(self, store: IdentityStore, settings: IssuerSettings, clock: Clock | None = None) -> None:
        self.settings = settings
        self._store = store
        self._clock = clock or SystemClock()
        self._issuer = Issuer(settings, self._clock)
        self._roles = {group: _role(role, "FLOPS_OIDC_ROLES") for group, role in settings.roles.items()}
        self._teams = {group: check_name(team, "team") for group, team in settings.teams.items()}
        self._newcomers = _role(settings.newcomers, "FLOPS_OIDC_NEWCOMERS") if settings.newcomers else None
        self._under_way: OrderedDict[str, _UnderWay] = OrderedDict()
        if settings.secret_file is not None:
            self._issuer.secret()

    async def begin(self, redirect_uri: str) -> Begun:
        """Raises: UnavailableError: the issuer is away, or not what it should be."""
        state, secret, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(4))
        url = await self._issuer.address(redirect_uri, state, nonce, verifier)
        until = self._clock.monotonic() + _UNDER_WAY_S
        self._under_way[state] = _UnderWay(redirect_uri, secret, nonce, verifier, until)
        while len(self._under_way) > _MOST_UNDER_WAY:
            self._under_way.popitem(last=False)
        return Begun(url, state, secret)

    async def account(self, state: str, secret: str, code: str, issuer: str | None) -> Account:
        """Who came back, as far as the issuer is to be believed.

        Args:
            issuer: as the redirect names it (``iss``), where it does.
        Raises:
            UnauthorizedError: no such sign-in is under way, or the issuer does not stand by it.
            ForbiddenError: it is, for somebody who cannot be a user.
            UnavailableError: the issuer is away.
        """
        begun = self._under_way.get(state)
        if begun is None or not hmac.compare_digest(begun.secret.encode(), secret.encode()):
            raise UnauthorizedError("no such sign-in is under way, it was over or used - begin again")
        del self._under_way[state]  # one try
        if self._clock.monotonic() >= begun.until:
            raise UnauthorizedError("the sign-in took too long - begin again")
        claims = await self._issuer.claims(
            code, begun.redirect_uri, begun.nonce, begun.verifier, named=issuer, wanted=self._wanted()
        )
        return self._account(claims)

    def admit(self, account: Account) -> tuple[User, Token, str]:
        """Let somebody in: their user, made where that may be, and a token.

        Raises:
            ForbiddenError: they may not come in.
            ConflictError: nobody would be left who may change users.
        """
        return self._store.sign_in(account, f"sign-in with {self.settings.host}"[:100], LASTS_S)

    def _wanted(self) -> frozenset[str]:
        wanted = {self.settings.user_claim} if self.settings.user_claim else {"email", "email_verified"}
        if self._roles or self._teams:
            wanted.add(self.settings.groups_claim.partition(".")[0])
        return frozenset(wanted)

    def _account(self, claims: Mapping[str, Any]) -> Account:
        name, sure = self._name(claims)
        groups = self._groups(claims) if self._roles or self._teams else frozenset()
        given = {role for group, role in self._roles.items() if group in groups}
        role = next((role for role in _RANKED if role in given), self._newcomers)
        return Account(
            issuer=self.settings.url,
            subject=str(claims["sub"]),
            name=name,
            may_take_place=sure and name != ADMIN,
            role=role,
            role_binds=bool(self._roles),
            teams=frozenset(team for group, team in self._teams.items() if group in groups)
            if self._teams
            else None,
        )

    def _name(self, claims: Mapping[str, Any]) -> tuple[str, bool]:
        """What they are called, and whether a user of that name is sure to be them.

        People choose their preferred user name themselves at many issuers, and an e-mail address too, until
        it is verified.
        """
        chosen = self.settings.user_claim
        verified = claims.get("email_verified") is True
        if chosen == "email" and not verified:
            raise ForbiddenError(
                f"your e-mail address at {self.settings.host} is not verified - verify it there first"
            )
        claim = chosen or ("email" if verified and claims.get("email") else "preferred_username")
        value = claims.get(claim)
        if not isinstance(value, str) or not is_name(value.strip().lower()):
            shown = repr(value[:60]) if isinstance(value, str) else "missing"
            raise ForbiddenError(
                f"{self.settings.host} says who you are with '{claim[:40]}', which is {shown} and no user's "
                "name here - ask an admin to look at FLOPS_OIDC_CLAIM_USER"
            )
        return value.strip().lower(), claim != "preferred_username" or chosen is not None

    def _groups(self, claims: Mapping[str, Any]) -> frozenset[str]:
        claim = self.settings.groups_claim
        value: Any = claims.get(claim)
        if value is None:
            value = claims
            for part in claim.split("."):
                value = value.get(part) if isinstance(value, dict) else None
        groups = [value] if isinstance(value, str) else value or []
        if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
            raise ForbiddenError(
                f"'{claim[:40]}' of {self.settings.host} is no list of groups - ask an admin"
            )
        if len(groups) > _MOST_GROUPS:
            raise ForbiddenError(
                f"you are in {len(groups)} groups at {self.settings.host}, which are too many"
            )
        return frozenset(groups)


def _role(text: str, variable: str) -> Role:
    try:
        return Role(text)
    except ValueError as error:
        raise InvalidInputError(
            f"{variable} gives the role '{text[:40]}' - use one of {', '.join(Role)}"
        ) from error
