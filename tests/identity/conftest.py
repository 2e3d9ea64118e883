"""A real database, on each engine, a clock that is set by hand, and an issuer that does what a test says."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from flops.core.clock import Clock, ManualClock
from flops.core.issuer import IssuerSettings
from flops.identity import AuditLog, IdentityStore
from flops.identity.signing_in import Begun, SignIns
from flops.identity.store import Account, Token, User
from flops.persistence import open_database
from tests.issuers import FakeIssuer

BACK = "http://127.0.0.1:4711/login/oidc"


class Door:
    """One manager's sign-ins, one step after the other."""

    def __init__(self, store: IdentityStore, settings: IssuerSettings, clock: Clock) -> None:
        self.sign_ins = SignIns(store, settings, clock)

    def begin(self) -> Begun:
        return asyncio.run(self.sign_ins.begin(BACK))

    def account(
        self,
        begun: Begun,
        code: str,
        *,
        state: str | None = None,
        secret: str | None = None,
        issuer: str | None = None,
    ) -> Account:
        return asyncio.run(self.sign_ins.account(state or begun.state, secret or begun.secret, code, issuer))

    def enter(self, issuer: FakeIssuer) -> tuple[User, Token, str]:
        begun = self.begin()
        return self.sign_ins.admit(self.account(begun, issuer.come_back(begun.url)))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def engine(database: Path | str) -> Iterator[sa.Engine]:
    engine = open_database(database)
    yield engine
    engine.dispose()


@pytest.fixture
def identity(engine: sa.Engine, clock: ManualClock) -> IdentityStore:
    return IdentityStore(engine, clock)


@pytest.fixture
def audit(engine: sa.Engine, clock: ManualClock) -> AuditLog:
    return AuditLog(engine, clock)


@pytest.fixture
def issuer(clock: ManualClock) -> Iterator[FakeIssuer]:
    issuer = FakeIssuer(clock)
    yield issuer
    issuer.close()


@pytest.fixture
def door(identity: IdentityStore, clock: ManualClock, issuer: FakeIssuer) -> Callable[..., Door]:
    """Makes one, configured as the arguments say."""
    identity.ensure_admin()

    def make(**values: Any) -> Door:
        return Door(identity, issuer.settings(**values), clock)

    return make
