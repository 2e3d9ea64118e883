"""Listing projects page by page, attempting them again, and keys that make a request safe to send again."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess


def wait_until_ended(client: httpx.Client, project: str) -> None:
    with client.stream("GET", f"/v1/projects/{project}/events?follow=true") as answer:
        answer.read()


@pytest.fixture(scope="module")
def names(manager: "ManagerProcess", tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five projects whose repositories are not there, the newest first."""
    client = manager.client()
    folder = tmp_path_factory.mktemp("nothing")
    made: list[str] = []
    for number in range(5):
        spec = {"repo": str(folder / "repository"), "name": f"number-{number % 2}"}
        made.insert(0, client.post("/v1/projects", json={"spec": spec}).raise_for_status().json()["id"])
    for project in made:
        wait_until_ended(client, project)
    return made


def listed(client: httpx.Client, **params: Any) -> list[str]:
    answer = client.get("/v1/projects", params=params).raise_for_status().json()
    return [project["id"] for project in answer["projects"]]


def test_pages_hold_every_project_once_the_newest_first(client: httpx.Client, names: list[str]) -> None:
    first = client.get("/v1/projects?limit=2").json()
    second = client.get("/v1/projects", params={"limit": 2, "after": first["next"]}).json()
    last = client.get("/v1/projects", params={"limit": 2, "after": second["next"]}).json()
    pages = [[project["id"] for project in page["projects"]] for page in (first, second, last)]
    assert pages == [names[:2], names[2:4], names[4:]]
    assert last["next"] is None
    assert client.get("/v1/projects?after=rubbish").json()["detail"].startswith("after: 'rubbish' is no")


def test_filters(client: httpx.Client, names: list[str]) -> None:
    assert listed(client, name="number-1") == [names[1], names[3]]
    assert listed(client, state=["failed", "training"]) == names
    assert listed(client, state="training") == []
    assert listed(client, text="REPOSITORY", limit=1) == names[:1]
    answer = client.get("/v1/projects?state=nonsense")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-input")


def test_a_failed_project_is_attempted_again(client: httpx.Client, names: list[str]) -> None:
    answer = client.post(f"/v1/projects/{names[0]}/retry")
    assert (answer.status_code, answer.json()["finished"]) == (200, None)
    wait_until_ended(client, names[0])
    events = client.get(f"/v1/projects/{names[0]}/events").json()["events"]
    states = [event["data"]["state"] for event in events if event["kind"] == "project.state"]
    assert states == ["submitted", "preparing", "failed", "submitted", "preparing", "failed"]


def test_only_an_ended_project_is_attempted_again(client: httpx.Client, silent_server: str) -> None:
    project = client.post("/v1/projects", json={"spec": {"repo": silent_server}}).json()["id"]
    answer = client.post(f"/v1/projects/{project}/retry")
    assert answer.status_code == 409
    assert "only a failed or stopped project can be attempted again" in answer.json()["detail"]
    client.post(f"/v1/projects/{project}/stop").raise_for_status()
    wait_until_ended(client, project)
    assert client.post(f"/v1/projects/{project}/retry").json()["state"] in ("submitted", "preparing")
    assert client.delete(f"/v1/projects/{project}?force=true").status_code == 204


def test_a_submission_that_is_sent_again_makes_no_second_project(
    client: httpx.Client, tmp_path: Path
) -> None:
    body = {"spec": {"repo": str(tmp_path / "nothing")}}
    headers = {"Idempotency-Key": "one-of-a-kind"}
    first = client.post("/v1/projects", json=body, headers=headers)
    again = client.post("/v1/projects", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    other = client.post("/v1/projects", json={"spec": {"repo": "/other"}}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "conflict")
    wrong = client.post("/v1/projects", json=body, headers={"Idempotency-Key": "x" * 201})
    assert wrong.status_code == 422
