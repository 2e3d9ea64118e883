"""A FLOPS_HOME for one test, and small disks for it."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.home import Home
from tests.chaos.outcome import Outcome, outcome
from tests.chaos.repository import make_repository, project_spec

LEARNERS, ROUNDS, SEED = 2, 25, 5

MountDisk = Callable[[Path, str], Path]
Require = Callable[[bool, str], None]


@pytest.fixture
def mount_disk(require: Require) -> Iterator[MountDisk]:
    """Mount a small disk (a tmpfs) on a folder; as root only."""
    mounted: list[Path] = []

    def mount(folder: Path, size: str) -> Path:
        require(os.geteuid() == 0, "the right to mount a disk")
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", str(folder)]
        require(subprocess.run(command, check=False).returncode == 0, "the right to mount a disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("chaos") / "repository")


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once, for all homes."""
    return tmp_path_factory.mktemp("environments")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, repository: Path, environments: Path) -> Outcome:
    """How the project of these tests ends when nothing disturbs it."""
    home = Home(tmp_path_factory.mktemp("undisturbed"))
    home.settings.environments_dir.symlink_to(environments)
    try:
        project = submit(home, repository)
        home.wait(project, 600)
        result = outcome(home, project)
    finally:
        home.end()
    assert result.state == "finished", result.reason
    return result


def submit(home: Home, repository: Path) -> str:
    home.put_data(LEARNERS)
    return home.submit(project_spec(repository, learners=LEARNERS, rounds=ROUNDS, seed=SEED))
