"""Whole projects in containers on a Docker engine of our own: from a repository to a model that is asked."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engines import PrivateEngine, can_run_engines, private_engine

pytestmark = [pytest.mark.docker, pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(900)]

User = Any
EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist-sklearn"
MOCK = ("--mock", "digits", "--learners", "2")


@pytest.fixture(scope="module")
def engine(require: Any) -> Iterator[PrivateEngine]:
    require(can_run_engines(), "a Docker engine that we may start (root, docker.io, Debian's python3)")
    with private_engine(bridge=True) as running:
        yield running


@pytest.fixture(scope="module")
def user(engine: PrivateEngine, make_user: Any) -> Iterator[User]:
    """A user whose manager works with that engine."""
    person = make_user(FLOPS_ORCHESTRATOR="docker", DOCKER_HOST=engine.url)
    yield person
    ended = person.flops("down", "--force")
    assert ended.code == 0, ended.stderr
    running = engine.client().containers()
    assert not running, "flops down left containers running"


@pytest.fixture(scope="module")
def served(user: User) -> dict[str, Any]:
    project: dict[str, Any] = user.project(str(EXAMPLE), *MOCK, "--rounds", "3", "--deploy", timeout_s=600)
    assert project["state"] == "finished", project["reason"]
    assert project["deployment"], user.events(project["id"], "warning")
    return project


def containers(engine: PrivateEngine, project: str) -> dict[str, dict[str, Any]]:
    """What the engine says of the containers of a project, by the service's role and number."""
    client = engine.client()
    try:
        found = client.containers(all=True, filters={"label": f"flops.project={project}"})
        return {
            one["Labels"]["flops.service"].removeprefix(f"{project}-"): client.inspect_container(one["Id"])
            for one in found
        }
    finally:
        client.close()


def eventually(what: Any, timeout_s: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (result := what()):
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.2)
    return result


def test_every_service_of_a_project_is_a_confined_container(
    user: User, engine: PrivateEngine, served: dict[str, Any]
) -> None:
    found = containers(engine, served["id"])
    assert set(found) == {"aggregator", "agent-1", "agent-2", "worker-1", "worker-2", "model"}
    for name, one in found.items():
        assert one["Config"]["User"] == "10001:10001", name
        assert one["HostConfig"]["ReadonlyRootfs"], name
        assert one["HostConfig"]["CapDrop"] == ["ALL"], name
    for name in ("worker-1", "worker-2"):  # the user's code
        assert found[name]["HostConfig"]["NetworkMode"] == "none"
    secrets = json.loads((user.home / "projects" / served["id"] / "config" / "tokens.json").read_text())
    said = json.dumps(found)
    for token in [secrets["project"], *secrets["learners"].values()]:
        assert token not in said


def test_a_model_in_a_container_answers_as_the_same_model_here(
    user: User, served: dict[str, Any], tmp_path: Path
) -> None:
    name, version = served["model"]["name"], served["model"]["version"]
    assert user.flops("model", "get", f"{name}:{version}", "--out", str(tmp_path / "model")).code == 0
    request = tmp_path / "model" / "serving_input_example.json"
    asked = user.flops("predict", served["id"], "--data", str(request), "--json")
    assert asked.code == 0, asked.stderr
    assert asked.document["predictions"]
    assert "@sha256:" in served["deployment"]["image"]


def test_data_lie_on_nodes(user: User, engine: PrivateEngine, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("x,y\n1,0\n2,1\n")
    put = user.flops("data", "put", str(table), "--tag", "nodes", "--site", "clinic", "--json")
    assert put.code == 0, put.stderr
    (fragment,) = put.document
    client = engine.client()
    assert fragment["node"] == client.info()["Name"]
    client.close()
    wrong = user.flops("data", "put", str(table), "--tag", "nodes", "--node", "mars")
    assert wrong.code == 1
    assert f"no node 'mars' holds data - use one of: {fragment['node']}" in wrong.stderr
    assert user.flops("data", "rm", fragment["id"]).code == 0
    assert user.flops("data", "ls", "--tag", "nodes", "--json").document == []


def test_what_is_killed_is_started_again_and_a_killed_manager_loses_nothing(
    user: User, engine: PrivateEngine
) -> None:
    options = (*MOCK, "--rounds", "60", "--seed", "3")
    project = user.flops("run", str(EXAMPLE), *options, "--detach", "--json").document["id"]
    eventually(lambda: len(user.events(project, "round.finished")) >= 2)
    client = engine.client()
    for victim in ("worker-1", "agent-2", "aggregator"):
        client.kill(containers(engine, project)[victim]["Id"], "SIGKILL")
    client.close()
    psutil.Process(json.loads((user.home / "manager.json").read_text())["pid"]).kill()
    ended = user.flops("attach", project, "--json", timeout_s=400)
    assert ended.lines[-1]["state"] == "finished", ended.lines[-1]["reason"]
    assert ended.lines[-1]["rounds_done"] == 60
    assert user.flops("rm", project).code == 0
    assert not containers(engine, project)


def test_an_engine_that_dies_and_comes_back_costs_no_project(user: User, engine: PrivateEngine) -> None:
    project = user.flops("run", str(EXAMPLE), *MOCK, "--rounds", "60", "--detach", "--json").document["id"]
    eventually(lambda: len(user.events(project, "round.finished")) >= 2)
    engine.kill()
    time.sleep(15)
    assert user.flops("show", project, "--json").document["state"] == "training"
    engine.start()
    ended = user.flops("attach", project, "--json", timeout_s=400)
    assert ended.lines[-1]["state"] == "finished", ended.lines[-1]["reason"]
    assert ended.lines[-1]["rounds_done"] == 60
    assert user.flops("rm", project).code == 0


def test_a_hierarchy_is_paused_goes_on_and_is_extended(user: User, engine: PrivateEngine) -> None:
    options = ("--mock", "digits", "--learners", "3", "--clusters", "2", "--cycles", "100", "--rounds", "1")
    project = user.flops("run", str(EXAMPLE), *options, "--detach", "--json").document["id"]
    eventually(lambda: len(user.events(project, "round.finished")) >= 2)
    assert {"aggregator", "aggregator-1", "aggregator-2"} <= set(containers(engine, project))
    assert user.flops("pause", project).code == 0
    running = [one for one in containers(engine, project).values() if one["State"]["Running"]]
    assert not running
    done = user.flops("show", project, "--json").document["rounds_done"]
    assert 2 <= done < 100
    assert user.flops("resume", project).code == 0
    ended = user.flops("attach", project, "--json", timeout_s=400).lines[-1]
    assert (ended["state"], ended["rounds_done"]) == ("finished", 100), ended["reason"]
    assert user.flops("extend", project, "--rounds", "2").code == 0
    ended = user.flops("attach", project, "--json", timeout_s=400).lines[-1]
    assert (ended["state"], ended["rounds_done"]) == ("finished", 102), ended["reason"]
    assert ended["metrics"]["accuracy"] > 0.8
    assert user.flops("rm", project).code == 0
    assert not containers(engine, project)


def test_a_worker_over_its_memory_limit_fails_its_project_in_words(user: User, engine: PrivateEngine) -> None:
    spec = json.dumps(
        {
            "repo": str(EXAMPLE),
            "data": {"mock": "digits"},
            "training": {"learners": 1, "rounds": 2},
            "resources": {"memory_mb": 30},
        }
    )
    path = user.home / "small.json"
    path.write_text(spec)
    project = user.project("--spec", str(path), timeout_s=400)
    assert project["state"] == "failed"
    warnings = json.dumps(user.events(project["id"], "warning"))
    assert "memory limit (30 MB)" in project["reason"] + warnings
    assert user.flops("rm", project["id"]).code == 0


def test_virtual_learners_are_refused_in_words(user: User) -> None:
    ended = user.flops("run", str(EXAMPLE), "--mock", "digits", "--virtual", "3")
    assert ended.code == 1
    assert "training.virtual shares processes between learners, which containers do not" in ended.stderr


def test_another_orchestrator_is_refused_while_projects_run(user: User, served: dict[str, Any]) -> None:
    assert user.flops("down").code == 0
    back = user.flops("up")
    assert back.code == 0, back.stderr
    # Nobody has to say it again: a FLOPS_HOME remembers its orchestrator.
    forgotten = ("FLOPS_ORCHESTRATOR", "DOCKER_HOST")
    environment = {key: value for key, value in user.environment.items() if key not in forgotten}
    assert user.flops("down").code == 0
    before, user.environment = user.environment, {**environment, "FLOPS_HOME": os.fspath(user.home)}
    try:
        shown = user.flops("show", served["id"], "--json").document
    finally:
        user.environment = before
    assert shown["deployment"]["image"] == served["deployment"]["image"]


def test_a_removed_project_leaves_nothing_on_the_engine(
    user: User, engine: PrivateEngine, served: dict[str, Any]
) -> None:
    assert user.flops("rm", served["id"]).code == 0
    assert not containers(engine, served["id"])
    client = engine.client()
    left = [one["Name"] for one in client.volumes()["Volumes"] or [] if served["id"] in one["Name"]]
    left += [one["Name"] for one in client.networks() if served["id"] in one["Name"]]
    client.close()
    assert not left
