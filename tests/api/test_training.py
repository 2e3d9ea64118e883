"""Whole projects on real rooms: small repositories, environments made by uv, learners as processes."""

import io
import json
import os
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess

pytestmark = [pytest.mark.network, pytest.mark.slow]

_REPOSITORY = """
import sys, time
import numpy as np
from flops_utils.ml_repo_templates import ModelManagerTemplate

class ModelManager(ModelManagerTemplate):
    def __init__(self):
        self.weights = np.zeros(4, dtype=np.float32)
    def set_model_data(self):
        pass
    def get_model(self):
        return self.weights
    def get_model_parameters(self):
        return [self.weights]
    def set_model_parameters(self, parameters):
        self.weights = parameters[0]
    def fit_model(self):
        time.sleep({pause_s})
        {body}
        self.weights = self.weights + 1
        return 10
    def evaluate_model(self):
        return float(100 - self.weights.sum()), 0.5, 10
"""


_SKLEARN = """
import numpy as np
from flops_utils.ml_repo_templates import ModelManagerTemplate
from sklearn.linear_model import LogisticRegression

class ModelManager(ModelManagerTemplate):
    def __init__(self):
        self.model = LogisticRegression(warm_start=True, max_iter=5)
        self.model.classes_ = np.array([0, 1])
        self.model.coef_, self.model.intercept_ = np.zeros((1, 2)), np.zeros(1)
    def set_model_data(self):
        self.x, self.y = np.array([[0.0, 1.0], [1.0, 0.0]] * 5), np.array([0, 1] * 5)
    def get_model(self):
        return self.model
    def get_model_parameters(self):
        return [self.model.coef_, self.model.intercept_]
    def set_model_parameters(self, parameters):
        self.model.coef_, self.model.intercept_ = parameters
    def fit_model(self):
        self.model.fit(self.x, self.y)
        return 10
    def evaluate_model(self):
        return 0.25, float(self.model.score(self.x, self.y)), 10
"""


@pytest.fixture
def sklearn_repository(tmp_path: Path) -> Path:
    (tmp_path / "requirements.txt").write_text("scikit-learn\n")
    (tmp_path / "model_manager.py").write_text(_SKLEARN)
    return tmp_path


@pytest.fixture
def make_repository(tmp_path: Path) -> Callable[..., Path]:
    def make(pause_s: float = 0.0, body: str = "pass") -> Path:
        folder = tmp_path / "tiny"
        folder.mkdir()
        (folder / "requirements.txt").write_text("numpy\n")
        (folder / "model_manager.py").write_text(_REPOSITORY.format(pause_s=pause_s, body=body))
        return folder

    return make


class Run:
    """One project, followed from outside."""

    def __init__(
        self, manager: "ManagerProcess", repository: Path, rounds: int, initial: str | None = None
    ) -> None:
        self.manager = manager
        self.client = manager.client()
        spec = {
            "repo": str(repository),
            "model": {"initial": initial},
            "data": {"mock": {"dataset": "digits", "num_examples": 40}},
            "training": {"learners": 2, "rounds": rounds},
        }
        answer = self.client.post("/v1/projects", json={"spec": spec})
        assert answer.status_code == 201, answer.text
        self.id: str = answer.json()["id"]

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        address = f"/v1/projects/{self.id}/events"
        with self.client.stream("GET", address, params={"follow": "true", "after": after}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def until(self, kind: str, **data: Any) -> dict[str, Any]:
        for event in self.events():
            if event["kind"] == kind and data.items() <= event["data"].items():
                return event
        raise AssertionError(f"no {kind}: {self.shown()}")

    def shown(self) -> dict[str, Any]:
        project: dict[str, Any] = self.client.get(f"/v1/projects/{self.id}").json()
        return project

    def again(self) -> None:
        """The manager was started anew."""
        self.client = self.manager.client()

    def processes(self) -> list[str]:
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            line = " ".join(process.info["cmdline"] or [])
            if self.id in line and process.status() != psutil.STATUS_ZOMBIE:
                found.append(line)
        return found

    def settled(self) -> bool:
        """Whether its services are gone, which follows the end it was told of."""
        return all(service["state"] in ("exited", "failed") for service in self.shown()["services"])

    def rounds(self) -> list[int]:
        return [event["data"]["round"] for event in self.events() if event["kind"] == "round.finished"]


def test_a_project_ends_with_a_registered_model(manager: "ManagerProcess", sklearn_repository: Path) -> None:
    run = Run(manager, sklearn_repository, rounds=3)
    events = list(run.events())
    project = run.shown()
    assert project["state"] == "finished", project
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert (project["rounds_done"], project["rounds_total"]) == (3, 3)
    assert project["metrics"] == {"loss": 0.25, "accuracy": 1.0}
    assert [learner["site"] for learner in project["learners"]] == [f"{run.id}-1", f"{run.id}-2"]
    assert run.processes() == []
    assert project["model"] is not None, [e["data"] for e in events if e["kind"] == "warning"]
    name, version = project["model"]["name"], project["model"]["version"]
    (shown,) = [
        model for model in run.client.get("/v1/models").json()["models"] if model["project"] == run.id
    ]
    assert (shown["name"], shown["metrics"]) == (name, project["metrics"])
    assert run.client.get(f"/v1/models/{name}/versions/{version}").json() == shown
    assert run.client.get(f"/v1/models/{name}").json()["versions"][0] == shown
    (listed,) = run.client.get("/v1/projects", params={"text": run.id}).json()["projects"]
    assert (listed["model"], listed["metrics"]) == (project["model"], project["metrics"])
    figures = run.client.get("/v1/metrics").text
    assert 'flops_step_seconds_count{step="environment"}' in figures
    assert 'flops_rounds_total{where="root"}' in figures
    run.client.delete(f"/v1/projects/{run.id}").raise_for_status()
    assert run.client.get("/v1/data/fragments", params={"tag": f"mock-{run.id}"}).json()["fragments"] == []
    archive = run.client.get(f"/v1/models/{name}/versions/{version}/archive").content
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        assert {"MLmodel", "parameters.safetensors"} <= set(files.getnames())


def test_an_extended_project_registers_a_second_version(
    manager: "ManagerProcess", sklearn_repository: Path
) -> None:
    run = Run(manager, sklearn_repository, rounds=2)
    run.until("project.state", state="finished")
    address = f"/v1/projects/{run.id}/extend"
    assert run.client.post(address, json={"rounds": 0}).status_code == 422
    assert run.client.post(address, json={"rounds": 100_000}).status_code == 422
    answer = run.client.post(address, json={"rounds": 2})
    assert answer.json()["state"] in ("submitted", "deploying", "training"), answer.text
    assert run.rounds() == [1, 2, 3, 4]
    project = run.shown()
    assert (project["state"], project["rounds_total"]) == ("finished", 4)
    mine = [model for model in run.client.get("/v1/models").json()["models"] if model["project"] == run.id]
    assert sorted(model["version"] - mine[-1]["version"] for model in mine) == [0, 1]
    assert project["model"]["version"] == mine[0]["version"]
    for model in mine:
        archive = f"/v1/models/{model['name']}/versions/{model['version']}/archive"
        assert run.client.get(archive).status_code == 200
    (export,) = (manager.home / "projects" / run.id / "export").iterdir()
    assert export.name == "rounds-4"
    assert run.processes() == []


def test_a_training_starts_from_the_parameters_of_a_registered_model(
    manager: "ManagerProcess", sklearn_repository: Path, make_repository: Callable[..., Path]
) -> None:
    first = Run(manager, sklearn_repository, rounds=1)
    first.until("project.state", state="finished")
    model = first.shown()["model"]
    reference = f"{model['name']}/{model['version']}"
    first.client.delete(f"/v1/projects/{first.id}").raise_for_status()

    second = Run(manager, sklearn_repository, rounds=1, initial=reference)
    step = second.until("step.finished", step="initial-model")
    assert step["data"]["initial"] == reference
    second.until("project.state", state="finished")
    archive = first.client.get(f"/v1/models/{model['name']}/versions/{model['version']}/archive").content
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        parameters = files.extractfile("parameters.safetensors")
        assert parameters is not None
        started = manager.home / "projects" / second.id / "initial.safetensors"
        assert started.read_bytes() == parameters.read()

    other = Run(manager, make_repository(), rounds=1, initial=reference)
    reason = other.until("project.state", state="failed")["data"]["reason"]
    assert reason == (
        f"model {reference} does not fit this repository's model: 2 arrays instead of 1 - name a model with "
        "the same arrays in model.initial, or leave it out"
    )
    spec = {"repo": str(sklearn_repository), "model": {"initial": f"{model['name']}/99"}}
    answer = first.client.post("/v1/projects", json={"spec": spec})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("model.initial: there is no version 99 of a model")


def test_a_model_without_a_flavor_keeps_its_parameters(
    manager: "ManagerProcess", make_repository: Callable[..., Path]
) -> None:
    run = Run(manager, make_repository(), rounds=2)
    warnings = [event["data"]["message"] for event in run.events() if event["kind"] == "warning"]
    project = run.shown()
    assert (project["state"], project["model"]) == ("finished", None)
    assert any("only its parameters are kept" in warning for warning in warnings)


def test_a_killed_manager_goes_on_with_its_training(
    own_manager: "ManagerProcess", make_repository: Callable[..., Path]
) -> None:
    run = Run(own_manager, make_repository(pause_s=0.5), rounds=20)
    run.until("round.finished", round=2)
    before = {service["name"]: service["pid"] for service in run.shown()["services"]}
    own_manager.kill()
    own_manager.start()
    run.again()
    run.until("round.finished", round=4)
    assert {service["name"]: service["pid"] for service in run.shown()["services"]} == before
    assert run.rounds() == list(range(1, 21))
    project = run.shown()
    assert (project["state"], project["metrics"]["loss"]) == ("finished", 20.0)
    seqs = [event["seq"] for event in run.events()]
    assert seqs == list(range(1, len(seqs) + 1))
    assert run.processes() == []


def test_a_killed_aggregator_is_started_again_and_training_goes_on(
    manager: "ManagerProcess", make_repository: Callable[..., Path]
) -> None:
    run = Run(manager, make_repository(pause_s=0.3), rounds=6)
    run.until("round.finished", round=2)
    (pid,) = [service["pid"] for service in run.shown()["services"] if service["role"] == "aggregator"]
    os.kill(pid, signal.SIGKILL)
    assert run.rounds() == list(range(1, 7))
    project = run.shown()
    assert (project["state"], project["metrics"]["loss"]) == ("finished", 76.0)
    warnings = [event["data"]["message"] for event in run.events() if event["kind"] == "warning"]
    assert any("the aggregator ended (killed by SIGKILL)" in warning for warning in warnings)


def test_a_stop_while_training_ends_within_five_seconds_and_leaves_no_process(
    manager: "ManagerProcess", make_repository: Callable[..., Path]
) -> None:
    run = Run(manager, make_repository(pause_s=30.0), rounds=100)
    run.until("round.started", round=1)
    begun = time.monotonic()
    run.client.post(f"/v1/projects/{run.id}/stop").raise_for_status()
    run.until("project.state", state="stopped")
    assert time.monotonic() - begun < 5
    assert run.processes() == []


def test_user_code_that_exits_everywhere_fails_the_project_and_nothing_else(
    manager: "ManagerProcess", make_repository: Callable[..., Path]
) -> None:
    run = Run(manager, make_repository(body="sys.exit(3)"), rounds=3)
    event = run.until("project.state", state="failed")
    assert "sys.exit(3)" in event["data"]["reason"]
    deadline = time.monotonic() + 10
    while not run.settled():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run.processes() == []
    run.client.get("/v1/health").raise_for_status()


def test_a_project_that_was_stopped_trains_on_where_it_was_when_it_is_attempted_again(
    manager: "ManagerProcess", make_repository: Callable[..., Path]
) -> None:
    run = Run(manager, make_repository(pause_s=0.3), rounds=6)
    run.until("round.finished", round=2)
    run.client.post(f"/v1/projects/{run.id}/stop").raise_for_status()
    run.until("project.state", state="stopped")
    answer = run.client.post(f"/v1/projects/{run.id}/retry")
    assert answer.status_code == 200, answer.text
    assert run.rounds() == list(range(1, 7))
    project = run.shown()
    assert (project["state"], project["metrics"]["loss"]) == ("finished", 76.0)
    steps = [event["data"]["step"] for event in run.events() if event["kind"] == "step.started"]
    assert steps.count("fetch") == steps.count("environment") == 1
    assert run.processes() == []


def test_a_project_whose_code_failed_is_attempted_again_once_its_cause_is_mended(
    manager: "ManagerProcess", make_repository: Callable[..., Path], tmp_path: Path
) -> None:
    mended = tmp_path / "mended"
    run = Run(manager, make_repository(body=f"open({str(mended)!r})"), rounds=2)
    event = run.until("project.state", state="failed")
    mended.touch()
    answer = run.client.post(f"/v1/projects/{run.id}/retry")
    assert answer.status_code == 200, (answer.text, event)
    assert run.rounds() == [1, 2]
    assert run.shown()["state"] == "finished", run.shown()["reason"]
    assert run.client.post(f"/v1/projects/{run.id}/retry").status_code == 409
