import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess


def submit(client: httpx.Client, **spec: Any) -> dict[str, Any]:
    answer = client.post("/v1/projects", json={"spec": spec})
    assert answer.status_code == 201, answer.text
    project: dict[str, Any] = answer.json()
    return project


def stream(client: httpx.Client, project: str, **headers: str) -> list[dict[str, Any]]:
    """All events until the stream ends by itself."""
    events = []
    with client.stream(
        "GET", f"/v1/projects/{project}/events", params={"follow": "true"}, headers=headers
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
    return events


def state(client: httpx.Client, project: str) -> str:
    return str(client.get(f"/v1/projects/{project}").json()["state"])


def test_a_wrong_spec_is_refused_with_all_its_problems(client: httpx.Client) -> None:
    spec = {"repo": "/r", "trainin": {}, "training": {"rounds": 0}}
    answer = client.post("/v1/projects", json={"spec": spec})
    assert answer.status_code == 422
    assert "training.rounds" in answer.json()["detail"]
    assert "trainin" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("spec", "detail"),
    [
        (
            {"training": {"strategy": "FedAgv"}},
            "strategy 'FedAgv' is unknown - did you mean FedAvg?",
        ),
    ],
)
def test_what_this_version_cannot_do_is_refused_at_once(
    client: httpx.Client, spec: dict[str, Any], detail: str
) -> None:
    before = client.get("/v1/projects").json()
    answer = client.post("/v1/projects", json={"spec": {"repo": "/r", **spec}})
    assert (answer.status_code, answer.json()["detail"]) == (422, detail)
    assert client.get("/v1/projects").json() == before


def test_an_unknown_project_is_not_found(client: httpx.Client) -> None:
    for call in ("", "/events", "/events?follow=true", "/logs"):
        answer = client.get(f"/v1/projects/p-222222{call}")
        assert answer.status_code == 404
        assert answer.json()["detail"] == "there is no project p-222222 - see 'flops ls'"
    assert client.get("/v1/projects/..%2Fx").status_code in (404, 422)
    assert client.get("/v1/projects/nonsense").json()["code"] == "invalid-input"


def test_a_project_that_cannot_be_fetched_fails_with_its_reason(client: httpx.Client, tmp_path: Path) -> None:
    project = submit(client, repo=str(tmp_path / "nothing"))
    assert project["state"] in ("submitted", "preparing")
    events = stream(client, project["id"])
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["kind"] == "project.state"
    assert events[-1]["data"]["state"] == "failed"
    after = client.get(f"/v1/projects/{project['id']}").json()
    assert str(tmp_path / "nothing") in after["reason"]
    assert client.post(f"/v1/projects/{project['id']}/stop").status_code == 409


def test_a_stream_is_taken_up_where_it_was_left(client: httpx.Client, tmp_path: Path) -> None:
    project = submit(client, repo=str(tmp_path / "nothing"))["id"]
    events = stream(client, project)
    assert stream(client, project, **{"Last-Event-ID": "2"}) == events[2:]
    assert stream(client, project, **{"Last-Event-ID": str(len(events))}) == []
    listed = client.get(f"/v1/projects/{project}/events", params={"after": 1}).json()["events"]
    assert listed == events[1:]
    answer = client.get(f"/v1/projects/{project}/events?follow=true", headers={"Last-Event-ID": "x"})
    assert answer.json()["detail"] == "Last-Event-ID 'x' is not an event's number"


def test_a_stop_while_preparing_ends_within_five_seconds_and_leaves_nothing(
    manager: "ManagerProcess", client: httpx.Client, silent_server: str
) -> None:
    project = submit(client, repo=silent_server)["id"]
    children = psutil.Process(manager.process.pid)
    with client.stream("GET", f"/v1/projects/{project}/events?follow=true") as answer:
        for line in answer.iter_lines():
            if '"step":"fetch"' in line:
                break
    begun = time.monotonic()
    assert client.post(f"/v1/projects/{project}/stop").json()["state"] in ("stopping", "stopped")
    events = stream(client, project)
    assert events[-1]["data"].items() >= {"state": "stopped", "reason": "stopped on request"}.items()
    assert time.monotonic() - begun < 5
    steps = [
        child
        for child in children.children(recursive=True)
        if "step_process" in " ".join(child.cmdline()) or "git" in child.name()
    ]
    assert steps == []


def test_several_projects_prepare_at_the_same_time_and_others_wait(
    client: httpx.Client, silent_server: str, tmp_path: Path
) -> None:
    names = [submit(client, repo=silent_server)["id"] for _ in range(5)]
    for name in names:
        client.post(f"/v1/projects/{name}/stop").raise_for_status()
    for name in names:
        stream(client, name)
        assert state(client, name) == "stopped"


def test_only_a_project_at_its_end_is_removed_unless_forced(
    manager: "ManagerProcess", client: httpx.Client, silent_server: str
) -> None:
    project = submit(client, repo=silent_server)["id"]
    answer = client.delete(f"/v1/projects/{project}")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert client.delete(f"/v1/projects/{project}?force=true").status_code == 204
    assert client.get(f"/v1/projects/{project}").status_code == 404
    assert not (manager.home / "projects" / project).exists()


def test_credentials_in_the_address_are_neither_shown_nor_stored_in_the_open(
    manager: "ManagerProcess", client: httpx.Client
) -> None:
    project = submit(client, repo="https://me:s3cr3tpassw0rd@127.0.0.1:9/x.git")["id"]
    client.post(f"/v1/projects/{project}/stop").raise_for_status()
    events = stream(client, project)
    shown = json.dumps([client.get(f"/v1/projects/{project}").json(), events])
    assert "s3cr3tpassw0rd" not in shown
    holding = [
        path
        for path in manager.home.rglob("*")
        if path.is_file() and not path.is_fifo() and b"s3cr3tpassw0rd" in path.read_bytes()
    ]
    assert holding == [manager.home / "projects" / project / "config" / "spec.json"]
    assert holding[0].stat().st_mode & 0o777 == 0o600


def test_the_manager_runs_the_step_again_that_its_death_cut_off(
    own_manager: "ManagerProcess", silent_server: str, still_running: Callable[[Path], list[str]]
) -> None:
    client = own_manager.client()
    done = submit(client, repo=str(own_manager.home / "nothing"))["id"]
    before = stream(client, done)
    open_ = submit(client, repo=silent_server)["id"]
    url = own_manager.url
    own_manager.kill()
    own_manager.start()
    client = own_manager.client()
    assert own_manager.url == url
    assert stream(client, done) == before
    assert state(client, open_) in ("submitted", "preparing")
    answer = client.post(f"/v1/projects/{open_}/stop")
    assert answer.is_success, [event["data"] for event in stream(client, open_)]
    events = stream(client, open_)
    assert events[-1]["data"]["state"] == "stopped"
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))


def test_the_manager_does_not_end_while_a_project_is_active(
    own_manager: "ManagerProcess", silent_server: str, still_running: Callable[[Path], list[str]]
) -> None:
    client = own_manager.client()
    project = submit(client, repo=silent_server)["id"]
    answer = client.post("/v1/shutdown")
    assert answer.status_code == 409
    assert answer.json()["detail"].startswith(f"1 project is not at the end ({project}) - pause or")
    assert client.post("/v1/shutdown", json={"force": True}).status_code == 202
    assert own_manager.reap() == 0
    assert still_running(own_manager.home) == []
    assert not (own_manager.home / "manager.json").exists()


def test_a_paused_project_lets_the_manager_end_and_can_be_resumed_by_the_next(
    own_manager: "ManagerProcess", silent_server: str, still_running: Callable[[Path], list[str]]
) -> None:
    client = own_manager.client()
    project = submit(client, repo=silent_server)["id"]
    assert client.post(f"/v1/projects/{project}/pause").json()["state"] in ("pausing", "paused")
    paused = stream(client, project)[-1]["data"]
    assert paused.items() >= {"state": "paused", "reason": "paused on request"}.items()
    assert client.post("/v1/shutdown").status_code == 202
    assert own_manager.reap() == 0
    assert still_running(own_manager.home) == []
    own_manager.start()
    client = own_manager.client()
    assert state(client, project) == "paused"
    # When it is its turn, which is at once.
    assert client.post(f"/v1/projects/{project}/resume").json()["state"] in ("submitted", "preparing")
    again = client.post(f"/v1/projects/{project}/resume")
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    client.post(f"/v1/projects/{project}/pause").raise_for_status()
    assert stream(client, project)[-1]["data"]["state"] == "paused"
    assert client.delete(f"/v1/projects/{project}").status_code == 409
    client.post(f"/v1/projects/{project}/stop").raise_for_status()
    assert stream(client, project)[-1]["data"]["state"] == "stopped"
    assert client.delete(f"/v1/projects/{project}").status_code == 204
    for action in ("pause", "resume"):
        assert client.post(f"/v1/projects/{project}/{action}").status_code == 404
