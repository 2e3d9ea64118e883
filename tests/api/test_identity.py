"""Who comes in and who may do what, on a real manager: what is forbidden is tried, and refused."""

import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from flops.api.policy import permission_of
from flops.identity import PERMISSIONS, Caller, Role
from tests.api.conftest import OPEN

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess

SPEC = {"repo": "/nowhere/at/all", "data": {"tags": ["x"]}}
SignIn = Callable[..., httpx.Client]


@pytest.fixture
def sign_in(manager: "ManagerProcess", client: httpx.Client) -> SignIn:
    """A client of a new user."""

    def make(role: str, *teams: str, **token: Any) -> httpx.Client:
        name = f"{role}-{time.monotonic_ns()}"
        wanted = {"name": name, "role": role, "teams": list(teams)}
        client.post("/v1/users", json=wanted).raise_for_status()
        made = client.post("/v1/tokens", json={"user": name, "name": "test", **token}).raise_for_status()
        return manager.client(made.json()["token"])

    return make


@pytest.fixture
def project_of() -> Iterator[Callable[[httpx.Client], str]]:
    """Submits a project that fails at once, for its repository is not there."""
    submitted: list[tuple[httpx.Client, str]] = []

    def submit(client: httpx.Client) -> str:
        made = client.post("/v1/projects", json={"spec": SPEC}).raise_for_status().json()
        submitted.append((client, made["id"]))
        return str(made["id"])

    yield submit
    for client, project in submitted:
        client.delete(f"/v1/projects/{project}", params={"force": True})


def test_me_says_who_one_is(client: httpx.Client, sign_in: SignIn) -> None:
    assert client.get("/v1/me").json()["role"] == "admin"
    engineer = sign_in("engineer", "blue", scopes=["projects:read", "audit"], expires_s=60)
    said = engineer.get("/v1/me").json()
    assert (said["role"], said["teams"], said["scopes"]) == ("engineer", ["blue"], ["projects:read"])
    assert said["expires"] == pytest.approx(time.time() + 60, abs=10)


def test_every_route_needs_a_permission(client: httpx.Client) -> None:
    document = client.get("/v1/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            if path not in OPEN:
                assert permission_of(method.upper(), path) is not None, f"{method} {path} is in no policy"


@pytest.mark.parametrize("role", ["engineer", "data-owner", "auditor"])
def test_what_a_role_may_not_do_is_refused_on_every_route(
    client: httpx.Client, sign_in: SignIn, role: str
) -> None:
    """Nothing is sent along and nothing is there: whoever may is told that, whoever may not is not."""
    person = sign_in(role)
    caller = Caller("somebody", Role(role))
    document = client.get("/v1/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            if path in OPEN:
                continue
            permission = permission_of(method.upper(), path)
            address = path.replace("{project}", "p-222222").replace("{", "").replace("}", "")
            if permission and not caller.may(permission):
                answer = person.request(method, address)
                assert answer.status_code == 403, f"{role}: {method} {path}: {answer.status_code}"
                assert answer.json()["code"] == "forbidden"
            elif method == "get" and "{" not in path:
                with person.stream(method, address) as answer:  # some of them have no end
                    assert answer.status_code not in (401, 403), f"{role}: {method} {path}"


def test_engineers_do_not_see_each_others_projects(
    sign_in: SignIn, project_of: Callable[[httpx.Client], str], client: httpx.Client
) -> None:
    ann, bob, eve = sign_in("engineer"), sign_in("engineer"), sign_in("auditor")
    project = project_of(ann)
    assert [one["id"] for one in ann.get("/v1/projects").json()["projects"]] == [project]
    assert bob.get("/v1/projects").json()["projects"] == []
    assert project in [one["id"] for one in eve.get("/v1/projects").json()["projects"]]
    for method, path in (
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/logs"),
        ("POST", "/stop"),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("DELETE", ""),
        ("PUT", "/deployment"),
        ("POST", "/predictions"),
    ):
        answer = bob.request(method, f"/v1/projects/{project}{path}")
        assert answer.status_code == 404, f"{method} {path}"
        other = bob.request(method, f"/v1/projects/p-222222{path}").json()["detail"]
        assert answer.json()["detail"].replace(project, "p-222222") == other
    assert eve.get(f"/v1/projects/{project}").status_code == 200
    assert eve.post(f"/v1/projects/{project}/stop").status_code == 403
    assert client.get(f"/v1/projects/{project}").json()["owner"] == ann.get("/v1/me").json()["user"]


def test_a_token_passes_on_no_more_than_it_is_good_for(sign_in: SignIn) -> None:
    narrow = sign_in("engineer", scopes=["projects:read", "tokens"])
    assert narrow.post("/v1/projects", json={"spec": SPEC}).status_code == 403
    more = narrow.post("/v1/tokens", json={"name": "x", "scopes": ["projects:write"]})
    assert (more.status_code, more.json()["code"]) == (403, "forbidden")
    same = narrow.post("/v1/tokens", json={"name": "x"})
    assert same.json()["scopes"] == ["projects:read", "tokens:read", "tokens:write"]
    for other in ("admin", "nobody"):
        assert narrow.post("/v1/tokens", json={"name": "x", "user": other}).status_code == 403


def test_tokens_are_seen_and_revoked_by_their_users_and_admins(sign_in: SignIn, client: httpx.Client) -> None:
    ann, bob = sign_in("engineer"), sign_in("engineer")
    (mine,) = ann.get("/v1/tokens").json()["tokens"]
    assert "token" not in mine
    assert mine["id"] not in json.dumps(bob.get("/v1/tokens", params={"user": mine["user"]}).json())
    assert bob.delete(f"/v1/tokens/{mine['id']}").status_code == 404
    assert mine["id"] in json.dumps(client.get("/v1/tokens").json())
    assert ann.delete(f"/v1/tokens/{mine['id']}").json()["revoked"]
    assert ann.get("/v1/me").status_code == 401


def test_a_disabled_user_is_out_at_once(sign_in: SignIn, client: httpx.Client) -> None:
    ann = sign_in("engineer")
    name = ann.get("/v1/me").json()["user"]
    assert client.patch(f"/v1/users/{name}", json={"disabled": True}).json()["disabled"]
    assert ann.get("/v1/me").status_code == 401


def test_guessing_locks_out_the_guesser_and_nobody_else(
    manager: "ManagerProcess", client: httpx.Client, sign_in: SignIn
) -> None:
    ann = sign_in("engineer")
    (mine,) = ann.get("/v1/tokens").json()["tokens"]
    guess = manager.client(f"flops_{mine['id']}_" + "A" * 43)
    statuses = [guess.get("/v1/me").status_code for _ in range(12)]
    assert statuses[:10] == [401] * 10
    assert statuses[-1] == 429
    locked = guess.get("/v1/me")
    assert int(locked.headers["retry-after"]) >= 1
    assert "too many wrong tokens" in locked.json()["detail"]
    assert client.get("/v1/me").status_code == 200


def test_what_is_asked_is_in_the_audit_log_before_it_is_answered(
    client: httpx.Client, sign_in: SignIn, project_of: Callable[[httpx.Client], str]
) -> None:
    ann = sign_in("engineer")
    name = ann.get("/v1/me").json()["user"]
    project = project_of(ann)
    ann.get("/v1/users")
    ann.get("/v1/projects")
    entries = client.get("/v1/audit", params={"user": name}).json()["entries"]
    assert [(entry["action"], entry["outcome"]) for entry in entries] == [
        ("POST /v1/projects", 201),
        ("GET /v1/users", 403),
    ]
    assert project in entries[0]["object"]
    assert entries[0]["address"] == "127.0.0.1"
    found = client.post("/v1/audit/verify", json={}).json()
    assert found["ok"]
    again = client.post("/v1/audit/verify", json={"head": found["head"]}).json()
    assert again["ok"]


def test_secrets_are_in_no_log(manager: "ManagerProcess", client: httpx.Client, sign_in: SignIn) -> None:
    ann = sign_in("engineer")
    text = str(ann.headers["authorization"]).partition(" ")[2]
    assert text.startswith("flops_")
    assert text not in json.dumps(client.get("/v1/audit").json())
    assert text not in manager.log


def test_permissions_are_all_used(client: httpx.Client) -> None:
    document = client.get("/v1/openapi.json").json()
    used = {
        permission_of(method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    unused = {"audit:write", "nodes:read", "nodes:write", "models:write", "manager:read"}
    assert used - {None, ""} >= PERMISSIONS - unused
