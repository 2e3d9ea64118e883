"""What roles and scopes permit."""

import pytest

from flops.core.errors import InvalidInputError
from flops.identity import PERMISSIONS, Caller, Role, check_scopes


@pytest.mark.parametrize(
    ("role", "may", "may_not"),
    [
        (Role.ADMIN, sorted(PERMISSIONS), []),
        (
            Role.ENGINEER,
            ["projects:read", "projects:write", "models:write", "data:read", "tokens:write"],
            ["data:write", "users:read", "users:write", "audit:read", "manager:write", "nodes:write"],
        ),
        (
            Role.DATA_OWNER,
            ["data:read", "data:write", "nodes:write", "tokens:write"],
            ["projects:write", "models:read", "users:read", "audit:read", "manager:write"],
        ),
        (
            Role.AUDITOR,
            ["projects:read", "models:read", "data:read", "users:read", "audit:read", "tokens:write"],
            ["projects:write", "models:write", "data:write", "users:write", "manager:write", "images:write"],
        ),
    ],
)
def test_roles(role: Role, may: list[str], may_not: list[str]) -> None:
    caller = Caller("somebody", role)
    assert [one for one in may if not caller.may(one)] == []
    assert [one for one in may_not if caller.may(one)] == []


def test_a_tokens_scopes_narrow_a_role_down_and_never_widen_it() -> None:
    caller = Caller("ann", Role.ENGINEER, scopes=check_scopes(["projects:read", "users"]))
    assert {one for one in PERMISSIONS if caller.may(one)} == {"projects:read"}


def test_projects_belong_to_their_owner_and_to_a_team() -> None:
    ann = Caller("ann", Role.ENGINEER, frozenset({"blue"}))
    assert ann.sees("ann", None)
    assert ann.sees("bob", "blue")
    assert ann.owns("bob", "blue")
    assert not ann.sees("bob", None)
    assert not ann.sees("bob", "red")
    auditor = Caller("eve", Role.AUDITOR)
    assert auditor.sees("ann", None)
    assert not auditor.owns("ann", None)
    assert Caller("root", Role.ADMIN).owns("ann", None)


def test_unknown_scopes_are_named() -> None:
    assert check_scopes(["projects", "data:read"]) == {"projects:read", "projects:write", "data:read"}
    with pytest.raises(InvalidInputError, match="'project' is no scope - use audit, data"):
        check_scopes(["project"])
