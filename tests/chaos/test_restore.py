"""A home that is lost while a project trains: restored elsewhere, another attempt ends with the same bits."""

import time
from pathlib import Path

import pytest

from flops.manager.restore import restore
from tests.chaos.conftest import LEARNERS, submit
from tests.chaos.home import Home
from tests.chaos.outcome import Outcome, outcome

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]


def test_a_project_of_a_lost_home_trains_to_the_same_model_on_another(
    tmp_path: Path, repository: Path, environments: Path, undisturbed: Outcome
) -> None:
    lost, found = Home(tmp_path / "lost"), Home(tmp_path / "found")
    for home in (lost, found):
        home.settings.home.mkdir()
        home.settings.environments_dir.symlink_to(environments)
    backup = tmp_path / "backup.tar"
    try:
        project = submit(lost, repository)
        deadline = time.monotonic() + 240
        while len(lost.events(project, "round.finished")) < 3:
            assert time.monotonic() < deadline, lost.state(project)
            time.sleep(0.05)
        with lost.client() as client, backup.open("wb") as into:
            client.back_up(into)
    finally:
        lost.end()
    assert restore(found.settings, backup)["unfinished"] == 1
    try:
        assert found.state(project)[0] == "failed"
        found.put_data(LEARNERS)
        with found.client() as client:
            client.retry_project(project)
        assert found.wait(project, 240) == "finished", found.state(project)
        assert outcome(found, project).model == undisturbed.model
    finally:
        found.end()
