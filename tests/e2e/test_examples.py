"""The example repositories, as their README says to run them, on scikit-learn's small digits."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(900)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEST_DIGITS = 360
User = Any


def test_pytorch_on_shards_is_judged_on_all_test_examples(user: User) -> None:
    project = _run(
        user,
        str(EXAMPLES / "mnist-pytorch"),
        *("--mock", "digits", "--learners", "3", "--shards", "2", "--test-split", "--rounds", "3"),
        *("--min-learners", "3", "--strategy", "FedProx", "--strategy-param", "proximal_mu=0.1"),
    )
    assert project["state"] == "finished", project["reason"]
    assert project["model"]
    right = project["metrics"]["accuracy"] * TEST_DIGITS
    assert right == pytest.approx(round(right), abs=1e-3)
    assert right > TEST_DIGITS / 4
    assert not [data for data in user.events(project["id"], "warning") if "pickle" in str(data)]


def test_a_repository_that_knows_no_splits_sees_training_examples_only(user: User) -> None:
    put = user.flops("data", "mock", "digits", "--tag", "split", "--sites", "2", "--test-split", "--json")
    assert put.code == 0, put.stderr
    assert [fragment["tags"] for fragment in put.document] == [["split"]] * 2 + [["split-test"]] * 2
    project = _run(user, str(EXAMPLES / "mnist-sklearn"), "--tag", "split", "--rounds", "1")
    assert project["state"] == "finished", project["reason"]
    assert project["metrics"]["accuracy"] > 0.6


def _run(user: User, *arguments: str) -> dict[str, Any]:
    # PyTorch's wheel is fetched and unpacked first: that may take minutes.
    ended = user.flops("run", *arguments, "--json", timeout_s=800)
    assert ended.lines, ended.stderr
    project: dict[str, Any] = ended.lines[-1]
    return project
