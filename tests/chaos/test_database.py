"""A PostgreSQL that is killed under a project that trains, and away for a while: the same bits at the end."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.string import TextLoader

from tests.chaos.conftest import Require, submit
from tests.chaos.home import Home
from tests.chaos.outcome import Outcome, outcome, problems
from tests.postgres import PostgresServer, postgres_installed, postgres_server

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

AWAY_S = (8.0, 0.5, 20.0)
"""How long it is away each time; the project needs some four seconds of undisturbed training."""


class HomeOnPostgres(Home):
    """Its manager's rows are on the server; they can be read while that is there."""

    def __init__(self, folder: Path, server: PostgresServer) -> None:
        self._server = server
        self._url = server.database()
        super().__init__(folder, {"FLOPS_DATABASE": self._url})

    def query(self, sql: str, *values: Any, file: Path | None = None) -> list[tuple[Any, ...]]:
        if file is not None:
            return super().query(sql, *values, file=file)
        with closing(psycopg.connect(self._url)) as connection:
            connection.adapters.register_loader("json", TextLoader)
            return connection.execute(sql.replace("?", "%s").encode(), values).fetchall()


def test_a_project_outlives_a_database_that_is_killed(
    tmp_path: Path, require: Require, repository: Path, environments: Path, undisturbed: Outcome
) -> None:
    require(postgres_installed(), "PostgreSQL 15")
    with postgres_server() as server:
        home = HomeOnPostgres(tmp_path / "home", server)
        home.settings.home.mkdir()
        home.settings.environments_dir.symlink_to(environments)
        try:
            project = submit(home, repository)
            for number, away_s in enumerate(AWAY_S, start=1):
                deadline = time.monotonic() + 240
                while len(home.events(project, "round.finished")) < 3 * number:
                    assert not home.over(project), home.state(project)
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                server.kill()
                time.sleep(away_s)
                server.start()
            assert home.wait(project, 240) == "finished", home.state(project)
            assert undisturbed.differences(outcome(home, project)) == []
            assert problems(home, project) == []
        finally:
            home.end()
        log = (home.settings.logs_dir / "manager.log").read_text()
        assert "cannot be used now" in log
        assert server.password not in log
