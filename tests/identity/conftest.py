"""A real database, on each engine, and a clock that is set by hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from flops.core.clock import ManualClock
from flops.identity import AuditLog, IdentityStore
from flops.persistence import open_database


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
