"""Who comes in after signing in with an issuer, as whom, and as what."""

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from flops.core.clock import ManualClock
from flops.core.errors import ConflictError, ForbiddenError, UnauthorizedError
from flops.identity import IdentityStore, Role
from flops.identity.signing_in import LASTS_S
from tests.identity.conftest import BACK, Door
from tests.issuers import FakeIssuer


def test_whoever_an_admin_added_comes_in_by_their_verified_address(
    door: Callable[..., Door], identity: IdentityStore, issuer: FakeIssuer, clock: ManualClock
) -> None:
    identity.add_user("ann@example.org", Role.AUDITOR, ["blue"])
    begun = door().begin()
    asked = {name: values[0] for name, values in parse_qs(urlsplit(begun.url).query).items()}
    assert begun.url.startswith(f"{issuer.url}/authorize?as=web&")
    assert asked["scope"].split() == ["openid", "email", "profile"]
    assert (asked["response_type"], asked["client_id"], asked["redirect_uri"]) == ("code", "flops", BACK)
    assert (asked["state"], asked["code_challenge_method"]) == (begun.state, "S256")
    assert begun.secret not in begun.url
    issuer.claims["email"] = "Ann@Example.org"
    user, token, text = door().enter(issuer)
    assert (user.name, user.role, user.teams, user.issuer) == (
        "ann@example.org",
        Role.AUDITOR,
        frozenset({"blue"}),
        issuer.url,
    )
    assert token.signed_in
    assert token.expires == clock.now() + LASTS_S
    caller = identity.caller(text)
    assert (caller.user, caller.signed_in) == ("ann@example.org", True)
    clock.advance(LASTS_S)
    with pytest.raises(UnauthorizedError):
        identity.caller(text)


def test_the_subject_stays_the_person_whatever_they_are_called(
    door: Callable[..., Door], identity: IdentityStore, issuer: FakeIssuer
) -> None:
    identity.add_user("ann@example.org", Role.ENGINEER)
    identity.add_user("bob@example.org", Role.ADMIN)
    door().enter(issuer)
    issuer.claims["email"] = "bob@example.org"
    assert door().enter(issuer)[0].name == "ann@example.org"
    issuer.claims |= {"sub": "8", "email": "ann@example.org"}
    with pytest.raises(ForbiddenError, match="bound to somebody else of that name"):
        door().enter(issuer)
    identity.change_user("ann@example.org", unbind=True)
    assert door().enter(issuer)[0].name == "ann@example.org"


@pytest.mark.parametrize(
    ("claims", "values", "message"),
    [
        (
            {"email_verified": False, "preferred_username": "ann"},
            {},
            "there is a user ann already, and no proof",
        ),
        (
            {"email_verified": "true", "preferred_username": "ann"},
            {},
            "there is a user ann already, and no proof",
        ),
        ({"email_verified": False, "preferred_username": "admin"}, {}, "a user admin already"),
        ({"preferred_username": "admin"}, {"user_claim": "preferred_username"}, "a user admin already"),
        ({"email_verified": False}, {"user_claim": "email"}, "not verified"),
        ({"email": "new@example.org"}, {}, "nobody has added new@example.org here"),
        ({"email": "not a name"}, {}, "'email', which is 'not a name' and no user's name"),
        ({"email": None}, {}, "'preferred_username', which is missing"),
        ({"email": ["ann@example.org"]}, {}, "'email', which is missing"),
        ({"groups": {"a": 1}}, {"roles": {"ml": "engineer"}}, "no list of groups"),
        ({"groups": [1]}, {"roles": {"ml": "engineer"}}, "no list of groups"),
        ({"groups": ["g"] * 3000}, {"roles": {"ml": "engineer"}}, "which are too many"),
        ({"groups": ["other"]}, {"roles": {"ml": "engineer"}}, "none of your groups has a role here"),
    ],
)
def test_nobody_takes_anothers_place(
    door: Callable[..., Door],
    identity: IdentityStore,
    issuer: FakeIssuer,
    claims: dict[str, Any],
    values: dict[str, Any],
    message: str,
) -> None:
    for name in ("ann", "ann@example.org"):
        identity.add_user(name, Role.ENGINEER)
    issuer.claims |= claims
    with pytest.raises(ForbiddenError, match=message):
        door(**values).enter(issuer)
    assert identity.tokens() == []
    assert {user.name for user in identity.users()} == {"admin", "ann", "ann@example.org"}


def test_a_claim_that_the_operator_chose_names_users_that_are_there(
    door: Callable[..., Door], identity: IdentityStore, issuer: FakeIssuer
) -> None:
    identity.add_user("e4711", Role.DATA_OWNER)
    issuer.claims["employee"] = "E4711"
    assert door(user_claim="employee").enter(issuer)[0].name == "e4711"


def test_groups_give_newcomers_a_role_and_take_it_away_at_the_next_sign_in(
    door: Callable[..., Door], identity: IdentityStore, issuer: FakeIssuer
) -> None:
    here = door(roles={"ml": "engineer", "ops": "admin"}, teams={"ml": "vision"}, groups_claim="realm.roles")
    issuer.claims["realm"] = {"roles": ["ops", "ml", "other"]}
    user, _, first = here.enter(issuer)
    assert (user.name, user.role, user.teams) == ("ann@example.org", Role.ADMIN, frozenset({"vision"}))
    issuer.claims["realm"] = {"roles": "ml"}
    assert here.enter(issuer)[0].role == Role.ENGINEER
    assert identity.caller(first).role == Role.ENGINEER
    issuer.claims["realm"] = {"roles": []}
    with pytest.raises(ForbiddenError, match=r"none of your groups has a role here, ann@example.org"):
        here.enter(issuer)
    with pytest.raises(UnauthorizedError):
        identity.caller(first)


def test_newcomers_come_in_where_the_operator_lets_them(
    door: Callable[..., Door], issuer: FakeIssuer
) -> None:
    issuer.claims |= {"email_verified": False, "preferred_username": "new"}
    user, _, _ = door(newcomers="auditor").enter(issuer)
    assert (user.name, user.role) == ("new", Role.AUDITOR)


def test_who_is_shut_out_stays_out(
    door: Callable[..., Door], identity: IdentityStore, issuer: FakeIssuer
) -> None:
    here = door(newcomers="engineer")
    here.enter(issuer)
    identity.change_user("ann@example.org", disabled=True)
    with pytest.raises(ForbiddenError, match=r"user ann@example.org is shut out - ask an admin"):
        here.enter(issuer)
    assert len(identity.tokens()) == 1


def test_the_issuer_cannot_take_the_only_admin_away(
    door: Callable[..., Door], identity: IdentityStore, issuer: FakeIssuer
) -> None:
    here = door(roles={"ops": "admin", "ml": "engineer"})
    issuer.claims["groups"] = ["ops"]
    here.enter(issuer)
    identity.change_user("admin", role=Role.ENGINEER)
    issuer.claims["groups"] = ["ml"]
    with pytest.raises(ConflictError, match="the only admin"):
        here.enter(issuer)


def test_signing_in_every_day_leaves_no_pile_of_tokens(
    door: Callable[..., Door], identity: IdentityStore, issuer: FakeIssuer, clock: ManualClock
) -> None:
    here = door(newcomers="engineer")
    for _ in range(25):
        here.enter(issuer)
    assert sum(token.revoked is None for token in identity.tokens()) == 20
    clock.advance(40 * 24 * 3600)
    here.enter(issuer)
    assert len(identity.tokens()) == 1
