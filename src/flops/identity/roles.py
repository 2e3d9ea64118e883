"""Roles and what they permit, as pure functions.

A permission is ``AREA:read`` or ``AREA:write``. A role permits some of them, a token's scopes narrow that
down for whoever holds the token. Which projects a caller sees or changes follows from their owner and team.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from flops.core.errors import InvalidInputError

_AREAS = ("projects", "models", "data", "nodes", "images", "users", "tokens", "audit", "manager")
PERMISSIONS = frozenset(f"{area}:{verb}" for area in _AREAS for verb in ("read", "write"))
_READ = frozenset(permission for permission in PERMISSIONS if permission.endswith(":read"))
_OWN = frozenset({"tokens:read", "tokens:write"})


class Role(StrEnum):
    ADMIN = "admin"
    """May do everything."""
    ENGINEER = "engineer"
    """Runs projects: their own, and those of their teams."""
    DATA_OWNER = "data-owner"
    """Brings data, and sees what is done with them."""
    AUDITOR = "auditor"
    """Reads everything, changes nothing but their own tokens."""


_PERMITTED = {
    Role.ADMIN: PERMISSIONS,
    Role.ENGINEER: _OWN
    | {"projects:read", "projects:write", "models:read", "models:write", "data:read", "nodes:read"}
    | {"images:read", "manager:read"},
    Role.DATA_OWNER: _OWN | {"data:read", "data:write", "nodes:read", "nodes:write", "manager:read"},
    Role.AUDITOR: _READ | _OWN,
}
_SEES_ALL = frozenset({Role.ADMIN, Role.AUDITOR})


@dataclass(frozen=True)
class Caller:
    """Who asks, and what this token of theirs is good for."""

    user: str
    role: Role
    teams: frozenset[str] = frozenset()
    scopes: frozenset[str] = PERMISSIONS
    token: str = ""
    """Id of the token; empty: the token file of the FLOPS_HOME."""
    expires: float | None = None
    """Of the token, seconds since the epoch."""
    signed_in: bool = False
    """The token came from signing in with an issuer."""

    def may(self, permission: str) -> bool:
        return permission in _PERMITTED[self.role] and permission in self.scopes

    @property
    def sees_all(self) -> bool:
        """Projects of everybody."""
        return self.role in _SEES_ALL

    def sees(self, owner: str, team: str | None) -> bool:
        """Whether a project of that owner and team is there for the caller."""
        return self.sees_all or self.owns(owner, team)

    def owns(self, owner: str, team: str | None) -> bool:
        """Whether such a project is the caller's to change, as far as permissions reach."""
        return self.role is Role.ADMIN or owner == self.user or (team is not None and team in self.teams)


def check_scopes(scopes: Iterable[str]) -> frozenset[str]:
    """Scopes as permissions; ``projects`` is both of ``projects:read`` and ``projects:write``.

    Raises:
        InvalidInputError: there is no such permission.
    """
    found: set[str] = set()
    for scope in scopes:
        matching = {one for one in PERMISSIONS if scope in (one, one.partition(":")[0])}
        if not matching:
            raise InvalidInputError(
                f"'{scope[:40]}' is no scope - use {', '.join(sorted(_AREAS))}, with ':read' or ':write'"
            )
        found |= matching
    return frozenset(found)
