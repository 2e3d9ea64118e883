from typing import TYPE_CHECKING

import httpx
import pytest

from tests.api.conftest import OPEN

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess


def test_health_needs_no_token(manager: "ManagerProcess") -> None:
    answer = manager.client("").get("/v1/health")
    assert answer.json() == {"status": "ok", "version": "0.1.0", "pid": manager.process.pid, "active": None}


@pytest.mark.parametrize(
    ("token", "detail"),
    [
        ("", "the request brings no token - send 'Authorization: Bearer TOKEN'"),
        ("wrong", "the token is wrong, revoked or expired - ask an admin for another one"),
    ],
)
def test_nothing_else_is_answered_without_the_token(
    manager: "ManagerProcess", token: str, detail: str
) -> None:
    for path in ("/v1/projects", "/v1/models", "/v1/data/fragments"):
        answer = manager.client(token).get(path)
        assert answer.status_code == 401
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json() == {
            "type": "urn:flops:error:unauthorized",
            "title": "Unauthorized",
            "status": 401,
            "detail": detail,
            "code": "unauthorized",
            "request": answer.headers["x-request-id"],
        }


def test_the_token_is_private(manager: "ManagerProcess") -> None:
    for name in ("token", "manager.json", "manager.db", "data.token"):
        assert (manager.home / name).stat().st_mode & 0o777 == 0o600
    assert (manager.home / "run").stat().st_mode & 0o777 == 0o700


def test_a_foreign_host_name_is_refused(client: httpx.Client) -> None:
    answer = client.get("/v1/projects", headers={"Host": "evil.example:80"})
    assert (answer.status_code, answer.json()["code"]) == (421, "invalid-input")
    port = client.base_url.port
    assert client.get("/v1/projects", headers={"Host": f"localhost:{port}"}).status_code == 200


def test_a_body_over_the_limit_is_refused(client: httpx.Client) -> None:
    answer = client.post("/v1/projects", content=b" " * (2 << 20))
    assert answer.status_code == 413
    chunked = client.post("/v1/projects", content=iter([b" " * (1 << 20)] * 2))
    assert chunked.status_code == 413
    assert "over the limit of 1048576 bytes" in chunked.json()["detail"]


def test_an_unknown_address_is_a_problem_too(client: httpx.Client) -> None:
    answer = client.get("/v1/nothing")
    assert (answer.status_code, answer.json()["code"]) == (404, "not-found")
    assert answer.json()["detail"] == "GET /v1/nothing is not served here - see /v1/openapi.json"


def test_the_openapi_document_tells_of_problems(client: httpx.Client) -> None:
    document = client.get("/v1/openapi.json").json()
    assert "Problem" in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path not in OPEN:
                content = operation["responses"]["401"]["content"]
                assert set(content) == {"application/problem+json"}, path
