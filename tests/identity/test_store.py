"""Users and tokens on a real database."""

from typing import NoReturn

import pytest
import sqlalchemy as sa

from flops.core.clock import ManualClock
from flops.core.errors import ConflictError, InvalidInputError, NotFoundError, UnauthorizedError
from flops.identity import IdentityStore, Role, uses
from flops.persistence import DatabaseAwayError, metadata, reading


def test_the_first_user_is_an_admin_and_made_once(identity: IdentityStore) -> None:
    identity.ensure_admin()
    identity.ensure_admin()
    (admin,) = identity.users()
    assert (admin.name, admin.role) == ("admin", Role.ADMIN)
    identity.add_user("second", Role.ADMIN)
    identity.ensure_admin()
    assert len(identity.users()) == 2


def test_a_token_brings_its_user_in_until_it_is_revoked(identity: IdentityStore, clock: ManualClock) -> None:
    identity.add_user("ann@example.org", Role.ENGINEER, ["blue"])
    token, text = identity.add_token("ann@example.org", "laptop", ["projects:read"])
    caller = identity.caller(text)
    assert (caller.user, caller.role, caller.teams) == ("ann@example.org", Role.ENGINEER, frozenset({"blue"}))
    assert caller.scopes == {"projects:read"}
    assert caller.token == token.id
    assert identity.token(token.id).last_used == clock.now()
    assert identity.recent_caller(text) == caller
    assert identity.caller(text) == caller
    identity.revoke(token.id)
    revoked = identity.token(token.id).revoked
    clock.advance(5)
    assert identity.revoke(token.id).revoked == revoked
    with pytest.raises(UnauthorizedError, match="wrong, revoked or expired"):
        identity.caller(text)


def test_a_token_expires(identity: IdentityStore, clock: ManualClock) -> None:
    identity.add_user("ann", Role.ENGINEER)
    _, text = identity.add_token("ann", "ci", lasts_s=60)
    clock.advance(59)
    for _ in range(2):
        identity.caller(text)
    clock.advance(1)
    with pytest.raises(UnauthorizedError):
        identity.caller(text)


def test_a_disabled_user_is_out_and_comes_back(identity: IdentityStore) -> None:
    identity.ensure_admin()
    identity.add_user("ann", Role.ENGINEER)
    _, text = identity.add_token("ann", "laptop")
    for _ in range(2):  # it is looked up no more
        identity.caller(text)
    identity.change_user("ann", disabled=True)
    with pytest.raises(UnauthorizedError):
        identity.caller(text)
    identity.change_user("ann", disabled=False, role=Role.AUDITOR, teams=["red"])
    caller = identity.caller(text)
    assert (caller.role, caller.teams) == (Role.AUDITOR, frozenset({"red"}))


def test_the_only_admin_stays(identity: IdentityStore) -> None:
    identity.ensure_admin()
    for change in ({"disabled": True}, {"role": Role.ENGINEER}):
        with pytest.raises(ConflictError, match="the only admin"):
            identity.change_user("admin", **change)
    assert identity.user("admin").role is Role.ADMIN
    identity.add_user("second", Role.ADMIN)
    assert identity.change_user("admin", disabled=True).disabled


def test_a_change_past_the_store_is_seen_soon(
    identity: IdentityStore, engine: sa.Engine, clock: ManualClock
) -> None:
    identity.ensure_admin()
    token, text = identity.add_token("admin", "test")
    for _ in range(2):
        identity.caller(text)
    IdentityStore(engine, clock).revoke(token.id)
    clock.advance(5)
    with pytest.raises(UnauthorizedError):
        identity.caller(text)


def test_a_recent_token_is_compared_all_the_same(identity: IdentityStore) -> None:
    identity.ensure_admin()
    _, text = identity.add_token("admin", "test")
    for _ in range(2):
        identity.caller(text)
    with pytest.raises(UnauthorizedError):
        identity.recent_caller(text[:-1] + ("A" if text[-1] != "A" else "B"))


def test_a_tokens_last_use_is_noted_again_after_a_while_and_written_soon(
    identity: IdentityStore, engine: sa.Engine, clock: ManualClock
) -> None:
    identity.ensure_admin()
    token, text = identity.add_token("admin", "test")
    other = IdentityStore(engine, clock)
    identity.caller(text)
    assert identity.tokens("admin")[0].last_used == clock.now()
    assert other.token(token.id).last_used is None
    for _ in range(40):
        clock.advance(3)
        identity.caller(text)
    assert clock.now() - (identity.token(token.id).last_used or 0) <= 63
    assert clock.now() - (other.token(token.id).last_used or 0) <= 75
    clock.advance(100)
    identity.caller(text)
    identity.close()
    assert other.token(token.id).last_used == clock.now()


def test_a_token_is_good_while_its_use_cannot_be_written(
    identity: IdentityStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity.ensure_admin()
    token, text = identity.add_token("admin", "test")

    def away(engine: sa.Engine) -> NoReturn:
        raise DatabaseAwayError("it is away")

    with monkeypatch.context() as patch:
        patch.setattr(uses, "writing", away)
        clock.advance(20)
        identity.caller(text)
        identity.close()
    identity.close()
    assert identity.token(token.id).last_used == clock.now()


@pytest.mark.parametrize("change", [slice(0, -1), slice(1, None), slice(0, 20)])
def test_nothing_near_a_token_comes_in(identity: IdentityStore, change: slice) -> None:
    identity.ensure_admin()
    _, text = identity.add_token("admin", "test")
    wrong = [text[change], text[:-1] + ("A" if text[-1] != "A" else "B"), text + "A", "", "flops__"]
    for one in wrong:
        with pytest.raises(UnauthorizedError):
            identity.caller(one)


def test_no_tokens_text_is_in_the_database(identity: IdentityStore, engine: sa.Engine) -> None:
    identity.ensure_admin()
    _, text = identity.add_token("admin", "test")
    secret = text.rpartition("_")[2]
    with reading(engine) as connection:
        for table in metadata.sorted_tables:
            assert secret not in repr(connection.execute(sa.select(table)).all())


@pytest.mark.parametrize("name", ["", "Ann", "-ann", "ann-", "a b", "ä", "a" * 61, "a\n", "../x"])
def test_impossible_names_are_refused(identity: IdentityStore, name: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot be the name of a user"):
        identity.add_user(name, Role.ENGINEER)
    with pytest.raises(InvalidInputError, match="cannot be the name of a team"):
        identity.add_user("ann", Role.ENGINEER, [name])
    assert identity.users() == []


def test_what_is_not_there_is_named(identity: IdentityStore) -> None:
    with pytest.raises(NotFoundError, match="no user 'bob'"):
        identity.add_token("bob", "x")
    with pytest.raises(NotFoundError, match="no user 'bob'"):
        identity.change_user("bob", disabled=True)
    with pytest.raises(NotFoundError, match="no token 'f00'"):
        identity.revoke("f00")
    identity.add_user("ann", Role.ENGINEER)
    with pytest.raises(ConflictError, match="user 'ann' is there already"):
        identity.add_user("ann", Role.ADMIN)
    for name, lasts_s in (("", None), ("a\x00", None), ("x" * 101, None), ("x", 0.0), ("x", 1e9)):
        with pytest.raises(InvalidInputError):
            identity.add_token("ann", name, lasts_s=lasts_s)


def test_a_user_has_a_bounded_number_of_tokens(identity: IdentityStore) -> None:
    identity.add_user("ann", Role.ENGINEER)
    first = identity.add_token("ann", "0")[0]
    for number in range(1, 100):
        identity.add_token("ann", str(number))
    with pytest.raises(ConflictError, match="has 100 tokens - revoke some first"):
        identity.add_token("ann", "one more")
    identity.revoke(first.id)
    identity.add_token("ann", "one more")
    assert len(identity.tokens("ann")) == 101
