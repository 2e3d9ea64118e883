"""What goes wrong with a user's repository, and the exact words in which FLOps says so."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.network, pytest.mark.slow]

User = Any
Repository = Any


def test_a_repository_without_model_manager(user: User, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("numpy\n")
    project = user.project(str(tmp_path), "--tag", "e2e")
    assert project["reason"] == (
        "the repository has no model_manager.py at its root - add one with a class ModelManager"
    )


def test_a_model_manager_that_is_not_python(user: User, repository: Repository) -> None:
    project = user.project(str(repository(header="class :\n")), "--tag", "e2e")
    assert project["reason"] == (
        "model_manager.py of the repository has a syntax error in line 1: invalid syntax - mend it"
    )


def test_a_constructor_that_loads_data(user: User, repository: Repository) -> None:
    folder = repository(
        header="from flops_utils.ml_repo_building_blocks import load_dataset\n",
        constructor="load_dataset()",
    )
    project = user.project(str(folder), "--tag", "e2e")
    assert project["reason"].endswith(
        "the constructor of ModelManager loads data - move the loading to set_model_data(), "
        "which runs on learners only"
    )


def test_dependencies_that_clash(user: User, repository: Repository) -> None:
    folder = repository(requirements="numpy==1.26.4\nnumpy>=2\n")
    project = user.project(str(folder), "--tag", "e2e")
    assert "numpy==1.26.4" in project["reason"]
    assert "numpy>=2" in project["reason"]


def test_tags_that_no_fragment_carries(user: User, repository: Repository) -> None:
    project = user.project(str(repository()), "--tag", "unheard of")
    assert project["reason"] == (
        "no fragment is tagged 'unheard of' - put data with 'flops data put', or use --mock"
    )


def test_more_learners_than_sites(user: User, repository: Repository) -> None:
    project = user.project(str(repository()), "--tag", "e2e", "--learners", "4")
    assert project["reason"].startswith(
        "4 learners are asked for, but only 3 sites have fragments tagged 'e2e'"
    )


def test_a_wrong_reference(user: User, repository: Repository) -> None:
    project = user.project(f"{repository()}@v9", "--tag", "e2e")
    assert "v9" in project["reason"]
    assert project["state"] == "failed"


@pytest.mark.parametrize(
    ("fit", "refusal"),
    [
        (
            "self.parameters[0][0, 0] = float('nan')",
            "it contains NaN or infinite values",
        ),
        (
            "self.parameters[0] = self.parameters[0].T",
            "after training it has array 0 has shape (3, 4) instead of (4, 3)",
        ),
    ],
)
def test_updates_that_cannot_count(user: User, repository: Repository, fit: str, refusal: str) -> None:
    project = user.project(str(repository(fit=fit)), "--tag", "e2e", "--rounds", "2")
    assert project["state"] == "failed"
    assert project["reason"] == (
        f"round 1 of project {project['id']} needs 1 update, 0 of 3 learners returned a usable one; "
        f"learner-1: {refusal} (and 2 more)"
    )
    refused = user.events(project["id"], "update.refused")
    assert {data["reason"] for data in refused} == {refusal}


@pytest.mark.parametrize("fault", ["raise ValueError('no such scan')", "raise SystemExit(4)"])
def test_user_code_that_fails_on_every_learner(user: User, repository: Repository, fault: str) -> None:
    project = user.project(str(repository(data=fault)), "--tag", "e2e")
    assert project["state"] == "failed"
    assert "set_model_data" in project["reason"]
    assert ("no such scan" if "scan" in fault else "SystemExit") in project["reason"]


def test_a_strategy_that_does_not_exist(user: User, repository: Repository) -> None:
    ended = user.flops("run", str(repository()), "--tag", "e2e", "--strategy", "FedAvrg")
    assert ended.code == 1
    assert ended.stderr.strip() == "error: strategy 'FedAvrg' is unknown - did you mean FedAvg?"
