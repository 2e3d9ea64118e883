"""The GUI beside a real API: which of them answers, and what is kept for both."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import ManagerProcess

FLOPS = str(Path(sys.executable).with_name("flops"))


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagerProcess]:
    manager = ManagerProcess(tmp_path_factory.mktemp("web") / "home").start()
    yield manager
    manager.end()


def signed_in(manager: ManagerProcess) -> httpx.Client:
    client = manager.client(token="")
    assert client.post("/login", data={"token": manager.token}).status_code == 303
    return client


def test_paths_of_the_api_stay_the_apis(manager: ManagerProcess) -> None:
    with manager.client() as client:
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("PATCH", "/v1/projects", 405),
            ("GET", "/api/flops/nothing", 404),
        ):
            answer = client.request(method, path)
            assert answer.status_code == status
            assert answer.headers["content-type"] == "application/problem+json"


def test_the_cookie_is_no_key_to_the_api(manager: ManagerProcess) -> None:
    client = signed_in(manager)
    assert client.get("/models").status_code == 200
    assert client.get("/v1/models").status_code == 401


def test_pages_answer_to_the_managers_names_only(manager: ManagerProcess) -> None:
    with manager.client(token="") as client:
        answer = client.get("/login", headers={"Host": "evil.example"})
        assert answer.status_code == 421
        assert "evil" not in answer.text


def test_a_form_that_is_too_large_is_refused(manager: ManagerProcess) -> None:
    with manager.client(token="") as client:
        assert client.post("/login", data={"token": "x" * (2 << 20)}).status_code == 413


def test_what_is_done_on_a_page_is_in_the_audit_log_once(manager: ManagerProcess) -> None:
    client, api = signed_in(manager), manager.client()
    csrf = client.get("/users").text.partition('data-csrf="')[2][:64]
    answer = client.post("/users", data={"csrf": csrf, "name": "ada", "role": "engineer"})
    assert answer.status_code == 303, answer.text
    entries = api.get("/v1/audit").json()["entries"]
    told = [(one["action"], one["object"], one["user"]) for one in entries if "users" in one["action"]]
    assert told == [("POST /v1/users", "user ada", "admin")]
    assert entries[-1]["address"] == "127.0.0.1"


def test_a_data_owner_sees_what_a_data_owner_may(manager: ManagerProcess) -> None:
    with manager.client() as api:
        api.post("/v1/users", json={"name": "eve", "role": "data-owner"})
        token = api.post("/v1/tokens", json={"name": "t", "user": "eve"}).json()["token"]
    with manager.client(token="") as client:
        client.post("/login", data={"token": token})
        assert client.get("/").headers["location"] == "/data"
        assert client.get("/data").status_code == 200
        assert client.get("/projects").status_code == 403
        assert "Ask an admin" in client.get("/audit").text


def test_flops_web_prints_an_address_that_signs_in_once(manager: ManagerProcess) -> None:
    told = subprocess.run(
        [FLOPS, "web", "--json"],
        env={**os.environ, "FLOPS_HOME": str(manager.home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    url = json.loads(told.stdout)["url"]
    assert manager.token not in told.stdout
    with manager.client(token="") as client:
        code = url.partition("#")[2]
        assert client.post("/login", data={"code": code}).status_code == 303
        assert client.post("/login", data={"code": code}).status_code == 401


def test_open_pages_do_not_hold_up_the_managers_end(tmp_path: Path) -> None:
    manager = ManagerProcess(tmp_path / "home").start()
    client = signed_in(manager)
    ended = threading.Event()

    def watch() -> None:
        with client.stream("GET", "/stream") as answer:
            for _ in answer.iter_bytes():
                pass
        ended.set()

    watching = threading.Thread(target=watch)
    watching.start()
    time.sleep(0.5)
    begun = time.monotonic()
    with manager.client() as api:
        api.post("/v1/shutdown", json={}).raise_for_status()
    manager.reap()
    watching.join(10)
    client.close()
    assert ended.is_set()
    assert time.monotonic() - begun < 3.0
