"""What every test shares: a component that is missing skips on a laptop and fails in CI."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.postgres import PostgresServer, postgres_installed, postgres_server

Require = Callable[[bool, str], None]


@pytest.fixture(scope="session")
def require() -> Require:
    """``require(there, what)`` skips the test when ``what`` is missing; with FLOPS_REQUIRE=all it fails."""

    def _require(there: bool, what: str) -> None:
        if there:
            return
        if os.environ.get("FLOPS_REQUIRE") == "all":
            pytest.fail(f"{what} is missing, and FLOPS_REQUIRE=all allows no skip")
        pytest.skip(f"{what} is missing")

    return _require


@pytest.fixture(scope="session")
def postgres(require: Require) -> Iterator[PostgresServer]:
    """A PostgreSQL of our own; tests make databases in it, and leave it running as it is."""
    require(postgres_installed(), "PostgreSQL 15")
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where an empty database is, on each engine: for `open_database`."""
    if request.param == "sqlite":
        return tmp_path / "manager.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.database()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In CI a skip mark is a mistake: say so before anything runs."""
    if os.environ.get("FLOPS_REQUIRE") != "all":
        return
    marked = [item.nodeid for item in items if item.get_closest_marker("skip")]
    if marked:
        raise pytest.UsageError(f"FLOPS_REQUIRE=all allows no skipped tests: {', '.join(marked)}")
