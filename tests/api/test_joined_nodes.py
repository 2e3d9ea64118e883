"""Machines that join a real manager over its API: what lets them in, what they are told, what is refused."""

import json
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess

MACHINE = {"platform": "linux/amd64", "cpus": 4, "memory_mb": 8000, "version": "0.1.0"}
HOLDING = {"site": "clinic", "tags": ["xray"], "num_examples": 10, "size_bytes": 100}


@pytest.fixture
def join(manager: "ManagerProcess", client: httpx.Client) -> Callable[..., httpx.Client]:
    """A machine that has joined, as a client with its credential."""

    def joined(name: str, owner: str = "admin") -> httpx.Client:
        made = client.post("/v1/nodes/tokens", json={"node": name, "owner": owner}).raise_for_status().json()
        said = client.post("/v1/node/join", json={"token": made["token"], **MACHINE}, headers={})
        assert said.raise_for_status().json()["owner"] == owner
        return manager.client(said.json()["credential"])

    return joined


@pytest.fixture
def sign_in(manager: "ManagerProcess", client: httpx.Client) -> Callable[[str], httpx.Client]:
    def make(role: str) -> httpx.Client:
        name = f"{role}-{time.monotonic_ns()}"
        client.post("/v1/users", json={"name": name, "role": role}).raise_for_status()
        made = client.post("/v1/tokens", json={"user": name, "name": "test"}).raise_for_status()
        return manager.client(made.json()["token"])

    return make


def node_of(client: httpx.Client, name: str) -> dict[str, Any] | None:
    found: list[dict[str, Any]] = client.get("/v1/nodes").json()["nodes"]
    return next((one for one in found if one["name"] == name), None)


def test_a_machine_joins_and_is_seen_with_what_it_holds_and_allows(
    client: httpx.Client, join: Callable[..., httpx.Client]
) -> None:
    node = join("clinic-a")
    said = {"holdings": [HOLDING], "policy": {"tags": ["xray"], "owners": ["ann"]}}
    orders = node.post("/v1/node/sync", json=said).raise_for_status().json()
    assert (orders["wanted"], orders["logs"]) == ([], [])
    seen = node_of(client, "clinic-a")
    assert seen is not None
    assert (seen["kind"], seen["owner"], seen["ready"], seen["tags"]) == ("joined", "admin", True, ["xray"])
    assert seen["policy"] == {"tags": ["xray"], "owners": ["ann"], "teams": [], "repositories": []}


def test_a_join_token_is_good_once(client: httpx.Client) -> None:
    made = client.post("/v1/nodes/tokens", json={"node": "once"}).raise_for_status().json()
    body = {"token": made["token"], **MACHINE}
    answers = [client.post("/v1/node/join", json=body) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 401]
    assert "wrong, used or expired" in answers[1].json()["detail"]


def test_a_join_token_used_by_many_at_once_makes_one_node(client: httpx.Client) -> None:
    made = client.post("/v1/nodes/tokens", json={"node": "race"}).raise_for_status().json()
    statuses: list[int] = []

    def attempt() -> None:
        answer = client.post("/v1/node/join", json={"token": made["token"], **MACHINE})
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [201] + [401] * 5


def test_an_expired_or_wrong_join_token_lets_nobody_in(client: httpx.Client) -> None:
    made = client.post("/v1/nodes/tokens", json={"node": "late", "lasts_s": 0.001}).raise_for_status().json()
    time.sleep(0.01)
    wrong = made["token"][:-4] + "AAAA"
    for text in (made["token"], wrong):
        answer = client.post("/v1/node/join", json={"token": text, **MACHINE})
        assert answer.status_code == 401
    assert node_of(client, "late") is None


def test_guessing_join_tokens_is_locked_out(manager: "ManagerProcess", client: httpx.Client) -> None:
    made = client.post("/v1/nodes/tokens", json={"node": "guessed"}).raise_for_status().json()
    wrong = made["token"][:-43] + "A" * 43
    body = {"token": wrong, **MACHINE}
    statuses = [client.post("/v1/node/join", json=body).status_code]
    while statuses[-1] == 401 and len(statuses) < 60:  # each wait is longer than the one before
        statuses.append(client.post("/v1/node/join", json=body).status_code)
    assert statuses[0] == 401
    assert statuses[-1] == 429
    assert client.get("/v1/me").status_code == 200


def test_a_credential_of_a_node_opens_no_route_of_users(
    client: httpx.Client, join: Callable[..., httpx.Client]
) -> None:
    node = join("clinic-b")
    for method, path in (
        ("GET", "/v1/projects"),
        ("GET", "/v1/me"),
        ("GET", "/v1/nodes"),
        ("GET", "/v1/data/fragments"),
        ("POST", "/v1/nodes/tokens"),
        ("POST", "/v1/shutdown"),
    ):
        assert node.request(method, path).status_code == 401, f"{method} {path}"


def test_a_users_token_opens_no_route_of_nodes(
    client: httpx.Client, sign_in: Callable[[str], httpx.Client]
) -> None:
    for person in (client, sign_in("data-owner"), sign_in("engineer")):
        for method, path in (
            ("POST", "/v1/node/sync"),
            ("POST", "/v1/node/leave"),
            ("GET", "/v1/node/projects/p-222222/code"),
            ("GET", "/v1/node/projects/p-222222/lock"),
        ):
            answer = person.request(method, path, json={} if method == "POST" else None)
            assert answer.status_code == 403, f"{method} {path}"


def test_a_node_that_left_or_was_ejected_is_not_let_in_again(
    client: httpx.Client, join: Callable[..., httpx.Client]
) -> None:
    left, ejected = join("leaver"), join("thrown-out")
    assert left.post("/v1/node/leave").json() == {"node": "leaver"}
    assert client.delete("/v1/nodes/thrown-out").status_code == 204
    for node in (left, ejected):
        assert node.post("/v1/node/sync", json={}).status_code == 401
        assert node.post("/v1/node/leave").status_code == 401
    assert node_of(client, "leaver") is None
    assert node_of(client, "thrown-out") is None


def test_a_node_that_waits_is_told_that_it_was_ejected(
    client: httpx.Client, join: Callable[..., httpx.Client]
) -> None:
    node = join("waiter")
    known = node.post("/v1/node/sync", json={}).json()["number"]
    answers: list[httpx.Response] = []

    def wait() -> None:
        answers.append(node.post("/v1/node/sync", json={"known": known, "wait_s": 20.0}))

    waiting = threading.Thread(target=wait)
    waiting.start()
    client.delete("/v1/nodes/waiter").raise_for_status()
    waiting.join()
    assert answers[0].status_code == 401


def test_data_owners_see_and_eject_only_their_own_nodes(
    client: httpx.Client, sign_in: Callable[[str], httpx.Client], join: Callable[..., httpx.Client]
) -> None:
    ann, bob = sign_in("data-owner"), sign_in("data-owner")
    name = ann.get("/v1/me").json()["user"]
    join("of-ann", owner=name)
    assert node_of(ann, "of-ann") is not None
    assert node_of(bob, "of-ann") is None
    assert bob.delete("/v1/nodes/of-ann").status_code == 404
    assert bob.post("/v1/nodes/tokens", json={"node": "x", "owner": name}).status_code == 403
    assert ann.delete("/v1/nodes/of-ann").status_code == 204


def test_names_of_nodes_are_not_taken_over(
    client: httpx.Client, sign_in: Callable[[str], httpx.Client], join: Callable[..., httpx.Client]
) -> None:
    ann, bob = sign_in("data-owner"), sign_in("data-owner")
    join("taken", owner=ann.get("/v1/me").json()["user"])
    assert bob.post("/v1/nodes/tokens", json={"node": "taken"}).status_code == 409
    ann.delete("/v1/nodes/taken").raise_for_status()
    assert bob.post("/v1/nodes/tokens", json={"node": "taken"}).status_code == 409
    assert ann.post("/v1/nodes/tokens", json={"node": "taken"}).status_code == 201
    (this,) = (
        one["name"] for one in client.get("/v1/nodes").json()["nodes"] if one["kind"] == "orchestrator"
    )
    if this == this.lower() and "." not in this:
        assert client.post("/v1/nodes/tokens", json={"node": this}).status_code == 409


def test_nodes_belong_to_data_owners(client: httpx.Client, sign_in: Callable[[str], httpx.Client]) -> None:
    engineer = sign_in("engineer")
    assert engineer.post("/v1/nodes/tokens", json={"node": "x"}).status_code == 403
    name = engineer.get("/v1/me").json()["user"]
    answer = client.post("/v1/nodes/tokens", json={"node": "x", "owner": name})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-input")
    assert client.post("/v1/nodes/tokens", json={"node": "x", "owner": "nobody"}).status_code == 404


def test_a_node_of_an_owner_who_is_shut_out_is_out_too(
    client: httpx.Client, sign_in: Callable[[str], httpx.Client], join: Callable[..., httpx.Client]
) -> None:
    name = sign_in("data-owner").get("/v1/me").json()["user"]
    node = join("orphan", owner=name)
    client.patch(f"/v1/users/{name}", json={"disabled": True}).raise_for_status()
    assert node.post("/v1/node/sync", json={}).status_code == 401


def test_a_node_gets_no_code_of_projects_that_it_is_not_wanted_for(
    client: httpx.Client, join: Callable[..., httpx.Client]
) -> None:
    node = join("curious")
    project = client.post("/v1/projects", json={"spec": {"repo": "/nowhere"}}).json()["id"]
    for path in (f"{project}/code", f"{project}/lock", "p-222222/code"):
        answer = node.get(f"/v1/node/projects/{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found"), path
    assert node.get("/v1/node/projects/..%2F..%2Fetc/code").status_code in (404, 422)


SERVICE = {"name": "p-222222-agent-1", "digest": "0" * 64, "state": "running"}


@pytest.mark.parametrize(
    "body",
    [
        {"services": [{**SERVICE, "state": "dancing"}]},
        {"services": [{**SERVICE, "name": "../../etc/passwd"}]},
        {"services": [{**SERVICE, "exit_code": 10**30}]},
        {"services": [SERVICE] * 1001},
        {"holdings": [{**HOLDING, "num_examples": -1}]},
        {"holdings": [{**HOLDING, "site": "x" * 10_000}]},
        {"holdings": [{**HOLDING, "num_examples": float("inf")}]},
        {"holdings": [HOLDING] * 5001},
        {"logs": {"p-222222-agent-1": "x" * 70_000}},
        {"logs": {f"a-{number}": "x" for number in range(65)}},
        {"logs": {"../log": "x"}},
        {"policy": {"tags": ["x"] * 1001}},
        {"policy": {"anything": []}},
        {"known": "1"},
        {"wait_s": 3600.0},
        [],
    ],
)
def test_hostile_reports_are_refused(node_for_reports: httpx.Client, client: httpx.Client, body: Any) -> None:
    content = json.dumps(body)
    answer = node_for_reports.post(
        "/v1/node/sync", content=content, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-input")
    assert client.get("/v1/health").status_code == 200


@pytest.fixture(scope="module")
def node_for_reports(manager: "ManagerProcess") -> httpx.Client:
    admin = manager.client()
    made = admin.post("/v1/nodes/tokens", json={"node": "hostile"}).raise_for_status().json()
    said = admin.post("/v1/node/join", json={"token": made["token"], **MACHINE}).raise_for_status().json()
    return manager.client(said["credential"])


def test_a_report_over_the_limit_is_refused(node_for_reports: httpx.Client) -> None:
    answer = node_for_reports.post("/v1/node/sync", content=b" " * (9 << 20))
    assert answer.status_code == 413


def test_what_a_node_says_of_strangers_is_not_taken(
    node_for_reports: httpx.Client, client: httpx.Client
) -> None:
    said = {"services": [SERVICE], "logs": {SERVICE["name"]: "pwned"}}
    orders = node_for_reports.post("/v1/node/sync", json=said).raise_for_status().json()
    assert orders["wanted"] == []


def test_joining_leaving_and_refusals_are_in_the_audit_log_and_syncs_are_not(
    client: httpx.Client, join: Callable[..., httpx.Client]
) -> None:
    head = client.get("/v1/audit", params={"newest": True, "limit": 1}).json()["entries"][0]["seq"]
    node = join("noted")
    node.post("/v1/node/sync", json={}).raise_for_status()
    node.post("/v1/node/leave").raise_for_status()
    node.post("/v1/node/sync", json={})
    entries = client.get("/v1/audit", params={"after": head}).json()["entries"]
    assert [(one["action"], one["outcome"]) for one in entries] == [
        ("POST /v1/nodes/tokens", 201),
        ("POST /v1/node/join", 201),
        ("POST /v1/node/leave", 200),
        ("POST /v1/node/sync", 401),
    ]
    assert [one["object"] for one in entries[1:3]] == ["node noted of admin"] * 2
    assert {one["user"] for one in entries[1:3]} == {"admin"}


def test_credentials_are_in_no_log(
    manager: "ManagerProcess", client: httpx.Client, join: Callable[..., httpx.Client]
) -> None:
    text = str(join("secretive").headers["authorization"]).partition(" ")[2]
    assert text.startswith("flopsnode_")
    assert text not in manager.log
    assert text not in json.dumps(client.get("/v1/audit").json())
    assert text.encode() not in (manager.home / "manager.db").read_bytes()


def test_what_joined_nodes_hold_is_listed_beside_other_data_and_owners_see_only_theirs(
    client: httpx.Client, sign_in: Callable[[str], httpx.Client], join: Callable[..., httpx.Client]
) -> None:
    bob = sign_in("data-owner")
    node = join("holder", owner=sign_in("data-owner").get("/v1/me").json()["user"])
    held = {**HOLDING, "site": "ward-9", "tags": ["only-here"], "labels": {"region": "north"}}
    node.post("/v1/node/sync", json={"holdings": [held]}).raise_for_status()

    def listed(person: httpx.Client) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = person.get("/v1/data/fragments?tag=only-here").json()["fragments"]
        return found

    (seen,) = listed(client)
    assert (seen["node"], seen["site"], seen["num_examples"]) == ("holder", "ward-9", 10)
    assert listed(bob) == []
