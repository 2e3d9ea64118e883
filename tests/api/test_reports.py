"""The route where services report, over a real Unix socket."""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess

REPORT = {"seq": 1, "time": 5.0, "kind": "learner.connected", "data": {"learner": "learner-1"}}


@pytest.fixture
def socket_client(manager: "ManagerProcess") -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(manager.home / "run" / "manager.sock"))
    with httpx.Client(transport=transport, base_url="http://manager") as client:
        yield client


@pytest.fixture
def project(manager: "ManagerProcess", client: httpx.Client, silent_server: str) -> str:
    """A project whose services have a token."""
    answer = client.post("/v1/projects", json={"spec": {"repo": silent_server}})
    project: str = answer.json()["id"]
    file = manager.home / "projects" / project / "config" / "tokens.json"
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as tokens:
        json.dump({"project": "right", "learners": {}}, tokens)
    return project


def post(client: httpx.Client, project: str, token: str, *reports: dict[str, Any]) -> httpx.Response:
    return client.post(
        f"/internal/v1/projects/{project}/reports",
        json={"source": "aggregator", "reports": list(reports)},
        headers={"Authorization": f"Bearer {token}"} if token else {},
    )


def test_reports_are_taken_once_and_from_the_project_only(
    socket_client: httpx.Client, client: httpx.Client, project: str
) -> None:
    for token in ("", "wrong", "ünicode"[1:]):
        assert post(socket_client, project, token, REPORT).status_code == 401
    for _ in range(2):
        answer = post(socket_client, project, "right", REPORT)
        assert (answer.status_code, answer.json()) == (200, {"accepted": 1})
    events = client.get(f"/v1/projects/{project}/events").json()["events"]
    assert [event["kind"] for event in events].count("learner.connected") <= 1


def test_a_report_that_is_none_is_refused(socket_client: httpx.Client, project: str) -> None:
    answer = post(socket_client, project, "right", {**REPORT, "kind": "project.state"})
    assert answer.status_code == 422
    answer = post(socket_client, project, "right", {**REPORT, "seq": 0})
    assert answer.status_code == 422


def test_reports_are_not_served_to_the_network(client: httpx.Client, project: str) -> None:
    assert post(client, project, "right", REPORT).status_code == 404


def put_model(client: httpx.Client, project: str, token: str, content: bytes, sha256: str) -> httpx.Response:
    return client.put(
        f"/internal/v1/projects/{project}/model",
        content=content,
        headers={"Authorization": f"Bearer {token}", "X-FLOps-SHA256": sha256},
    )


def test_a_trained_model_arrives_whole_from_its_own_project_or_not_at_all(
    socket_client: httpx.Client, manager: "ManagerProcess", project: str
) -> None:
    model = os.urandom(3 << 20)
    sha256 = hashlib.sha256(model).hexdigest()
    folder = manager.home / "projects" / project / "uploads"
    assert put_model(socket_client, project, "wrong", model, sha256).status_code == 401
    for false in ("0" * 64, "../../x", ""):
        assert put_model(socket_client, project, "right", model, false).status_code == 422
    assert not folder.exists() or not list(folder.iterdir())
    for _ in range(2):
        answer = put_model(socket_client, project, "right", model, sha256)
        assert (answer.status_code, answer.json()) == (201, {"sha256": sha256})
    (arrived,) = folder.iterdir()
    assert arrived.read_bytes() == model
    better = model[::-1]
    put_model(socket_client, project, "right", better, hashlib.sha256(better).hexdigest())
    (arrived,) = folder.iterdir()
    assert arrived.read_bytes() == better


def test_a_model_is_not_taken_from_the_network(client: httpx.Client, project: str) -> None:
    assert put_model(client, project, "right", b"x", "0" * 64).status_code in (404, 405)
