"""A trained model is served, asked, replaced and taken away, on this machine."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.network, pytest.mark.slow]

User = Any
EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist-sklearn"
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def served(user: User) -> dict[str, Any]:
    """A finished project whose model is served."""
    project: dict[str, Any] = user.project(
        str(EXAMPLE), "--mock", "digits", "--learners", "2", "--rounds", "2", "--deploy"
    )
    assert project["state"] == "finished", project["reason"]
    assert project["deployment"], user.events(project["id"], "warning")
    return project


@pytest.fixture(scope="module")
def request_file(served: dict[str, Any], user: User, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The input example that was exported with the model, as a request."""
    name, version = served["model"]["name"], served["model"]["version"]
    folder = tmp_path_factory.mktemp("model") / "model"
    got = user.flops("model", "get", f"{name}:{version}", "--out", str(folder))
    assert got.code == 0, got.stderr
    return folder / "serving_input_example.json"


def eventually(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        result = what()
        if result or time.monotonic() > deadline:
            return result
        time.sleep(0.1)


def ask(url: str, request: Path) -> Any:
    try:
        answer = httpx.post(
            f"{url}/invocations",
            content=request.read_bytes(),
            headers={"Content-Type": "application/json"},
            trust_env=False,
        )
    except httpx.TransportError:
        return None
    return answer.json() if answer.status_code == 200 else None


def test_a_served_model_answers_the_command_line_and_programs_alike(
    user: User, served: dict[str, Any], request_file: Path
) -> None:
    project, url = served["id"], served["deployment"]["url"]
    asked = user.flops("predict", project, "--data", str(request_file), "--json")
    assert asked.code == 0, asked.stderr
    direct = ask(url, request_file)
    assert direct is not None
    assert asked.document["predictions"] == direct["predictions"]
    assert asked.document["predictions"]
    shown = user.flops("show", project)
    assert url in shown.stdout
    (event,) = user.events(project, "model.deployed")
    assert (event["url"], event["version"]) == (url, served["model"]["version"])


def test_a_wrong_input_is_refused_in_words(user: User, served: dict[str, Any], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    asked = user.flops("predict", served["id"], "--data", str(wrong))
    assert asked.code == 1
    assert asked.stderr.strip()
    assert "Traceback" not in asked.stderr


def test_a_server_that_is_killed_comes_back(user: User, served: dict[str, Any], request_file: Path) -> None:
    url = served["deployment"]["url"]
    before = _server_of(served["id"])
    psutil.Process(before).kill()
    assert eventually(lambda: ask(url, request_file))
    assert _server_of(served["id"]) != before


def test_what_is_served_outlives_a_manager_that_is_killed_and_one_that_is_stopped(
    user: User, served: dict[str, Any], request_file: Path
) -> None:
    url, server = served["deployment"]["url"], _server_of(served["id"])
    psutil.Process(json.loads((user.home / "manager.json").read_text())["pid"]).kill()
    assert ask(url, request_file)
    assert user.flops("ls").code == 0
    assert _server_of(served["id"]) == server
    assert user.flops("down").code == 0
    assert ask(url, request_file) is None
    assert not _processes_of(served["id"])
    assert user.flops("up").code == 0
    assert eventually(lambda: ask(url, request_file))


def test_an_undeployed_model_is_gone_and_can_be_deployed_again(
    user: User, served: dict[str, Any], request_file: Path
) -> None:
    project = served["id"]
    gone = user.flops("undeploy", project, "--json")
    assert gone.code == 0, gone.stderr
    assert gone.document["deployment"] is None
    assert not _processes_of(project)
    asked = user.flops("predict", project, "--data", str(request_file))
    assert asked.code == 1
    assert f"deploy it with 'flops deploy {project}'" in asked.stderr
    again = user.flops("deploy", project, "--json")
    assert again.code == 0, again.stderr
    assert ask(again.document["deployment"]["url"], request_file)


def test_a_model_is_served_in_onnx_when_it_answers_alike(
    user: User, served: dict[str, Any], request_file: Path
) -> None:
    project = served["id"]
    before = user.flops("predict", project, "--data", str(request_file), "--json").document
    converted = user.flops("deploy", project, "--onnx", "--json")
    assert converted.code == 0, converted.stderr
    assert converted.document["deployment"]["kind"] == "onnx"
    after = user.flops("predict", project, "--data", str(request_file), "--json").document
    assert after["predictions"] == before["predictions"]


def test_an_extension_replaces_the_served_model(
    user: User, served: dict[str, Any], request_file: Path
) -> None:
    project = served["id"]
    extended = user.flops("extend", project, "--rounds", "1")
    assert extended.code == 0, extended.stderr
    ended = user.flops("attach", project, "--json").lines[-1]
    assert ended["state"] == "finished", ended["reason"]
    assert ended["deployment"]["version"] == ended["model"]["version"] > served["model"]["version"]
    assert ask(ended["deployment"]["url"], request_file)


def test_a_removed_project_leaves_no_server(user: User, served: dict[str, Any]) -> None:
    assert _processes_of(served["id"])
    assert user.flops("rm", served["id"]).code == 0
    assert not _processes_of(served["id"])


def _server_of(project: str) -> int:
    """The process of the server itself: the oldest of its service."""
    found = eventually(lambda: _processes_of(project))
    oldest: psutil.Process = min(found, key=lambda process: process.create_time())
    return oldest.pid


def _processes_of(project: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLOPS_SERVICE", "").startswith(f"{project}-model@"):
                found.append(process)
        except psutil.Error:
            continue
    return found
