"""What every test shares: a component that is missing skips on a laptop and fails in CI."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.issuers import RealIssuer, install_provider, node_is_there
from tests.postgres import PostgresServer, postgres_installed, postgres_server

Require = Callable[[bool, str], None]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """What tests that run at a time have to have like others."""
    worker, given = os.environ.get("PYTEST_XDIST_WORKER", ""), config.option.basetemp
    if not worker:
        return
    if given:  # folders with short names: those of Unix sockets are limited
        config.option.basetemp = str(Path(given).parent / worker.removeprefix("gw"))
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored, their programs would ignore it as well


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


@pytest.fixture(scope="session")
def installed_provider(require: Require, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certified provider of OpenID Connect, fetched once."""
    require(node_is_there(), "npm and node")
    return install_provider(tmp_path_factory.mktemp("provider"))


@pytest.fixture(scope="session")
def real_issuer(installed_provider: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealIssuer]:
    """It runs; what it knows of people is each test's own."""
    issuer = RealIssuer(installed_provider, tmp_path_factory.mktemp("people") / "people.json")
    yield issuer
    issuer.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each test has an id of its own, since of those that share one only one would run beside others. In CI a
    skip mark is a mistake: say so before anything runs.
    """
    for item in items:
        if not item.nodeid.endswith(f"::{item.name}"):
            # schemathesis names its operations in the name alone, which pytest 9.2 makes no id of.
            setattr(item, "_id", type(item.id).parse(f"{item.nodeid.partition('::')[0]}::{item.name}"))  # noqa: B010
    shared = [name for name, count in Counter(item.nodeid for item in items).items() if count > 1]
    if shared:
        raise pytest.UsageError(f"tests have the same name: {', '.join(shared)}")
    if os.environ.get("FLOPS_REQUIRE") != "all":
        return
    marked = [item.nodeid for item in items if item.get_closest_marker("skip")]
    if marked:
        raise pytest.UsageError(f"FLOPS_REQUIRE=all allows no skipped tests: {', '.join(marked)}")
