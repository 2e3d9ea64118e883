"""A PostgreSQL that is killed under a project that trains, and away for a while: the same bits at the end."""

import time
from pathlib import Path

import pytest

from tests.chaos.conftest import Require, submit
from tests.chaos.home import HomeOnPostgres
from tests.chaos.outcome import Outcome, outcome, problems
from tests.postgres import postgres_installed, postgres_server

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

AWAY_S = (8.0, 0.5, 20.0)
"""How long it is away each time; the project needs some four seconds of undisturbed training."""


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
