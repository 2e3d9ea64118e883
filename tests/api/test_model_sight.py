"""Registered models are their owners' and their teams', as projects are."""

from collections.abc import Iterator

import pytest

from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.manager.rows import Model
from flops.manager.states import Observation
from flops.manager.store import Store
from flops.persistence import open_database
from tests.api.conftest import ManagerProcess

PROJECT = ProjectId("p-alice1")
PATHS = (
    "/v1/models/digits",
    "/v1/models/digits/versions/1",
    "/v1/models/digits/versions/1/archive",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ManagerProcess, dict[str, str]]]:
    """A manager with a model of alice's team, and everybody's token."""
    home = tmp_path_factory.mktemp("sight") / "home"
    home.mkdir(mode=0o700)
    folder = home / "kept"
    (folder / "model").mkdir(parents=True)
    (folder / "parameters.safetensors").write_bytes(b"x")
    store = Store(open_database(Settings(home).database))
    store.create_project(
        PROJECT, name="digits", spec={}, source="/x", rounds_total=1, owner="alice", team="vision"
    )
    store.add_model(Model("digits", 1, PROJECT, 1, {}, 1.0, "models:/digits/1", str(folder)))
    store.observe(PROJECT, Observation(failed=True), "no more")
    store.set_cleaned(PROJECT)
    store.delete_project(PROJECT)
    store.close()
    manager = ManagerProcess(home).start()
    admin = manager.client()
    tokens = {"admin": manager.token}
    for name, role, teams in (
        ("alice", "engineer", []),
        ("carla", "engineer", ["vision"]),
        ("bob", "engineer", ["sound"]),
        ("audrey", "auditor", []),
    ):
        admin.post("/v1/users", json={"name": name, "role": role, "teams": teams}).raise_for_status()
        made = admin.post("/v1/tokens", json={"name": "test", "user": name})
        tokens[name] = made.raise_for_status().json()["token"]
    yield manager, tokens
    manager.end()


@pytest.mark.parametrize("user", ["alice", "carla", "audrey", "admin"])
def test_a_model_is_seen_by_whom_it_belongs_to_even_when_its_project_is_forgotten(
    shared: tuple[ManagerProcess, dict[str, str]], user: str
) -> None:
    client = shared[0].client(shared[1][user])
    assert [model["name"] for model in client.get("/v1/models").json()["models"]] == ["digits"]
    assert [client.get(path).status_code for path in PATHS] == [200, 200, 200]


def test_a_model_of_others_is_not_there(shared: tuple[ManagerProcess, dict[str, str]]) -> None:
    client = shared[0].client(shared[1]["bob"])
    assert client.get("/v1/models").json() == {"models": [], "next": None}
    assert [client.get(path).status_code for path in PATHS] == [404, 404, 404]
    other = client.get("/v1/models/digit/versions/1").json()["detail"]
    assert client.get(PATHS[1]).json()["detail"] == other.replace("'digit'", "'digits'")


def test_nobody_starts_from_a_model_of_others(shared: tuple[ManagerProcess, dict[str, str]]) -> None:
    spec = {"repo": "/nowhere", "model": {"initial": "digits/1"}, "data": {"tags": ["x"]}}
    refused = shared[0].client(shared[1]["bob"]).post("/v1/projects", json={"spec": spec})
    assert refused.status_code == 422
    assert "there is no version 1 of a model 'digits'" in refused.json()["detail"]
    taken = shared[0].client(shared[1]["carla"]).post("/v1/projects", json={"spec": spec})
    assert taken.status_code == 201


def test_a_project_may_be_given_to_a_team_of_ones_own(shared: tuple[ManagerProcess, dict[str, str]]) -> None:
    manager, tokens = shared
    carla, bob = manager.client(tokens["carla"]), manager.client(tokens["bob"])
    wanted = {"spec": {"repo": "/nowhere", "name": "shared", "data": {"tags": ["x"]}}, "team": "vision"}
    refused = bob.post("/v1/projects", json=wanted)
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    made = carla.post("/v1/projects", json=wanted).raise_for_status().json()
    assert (made["owner"], made["team"]) == ("carla", "vision")
    assert bob.get(f"/v1/projects/{made['id']}").status_code == 404
    manager.client().patch("/v1/users/bob", json={"teams": ["vision"]}).raise_for_status()
    assert bob.get(f"/v1/projects/{made['id']}").status_code == 200
    manager.client().patch("/v1/users/bob", json={"teams": ["sound"]}).raise_for_status()
    odd = manager.client().post("/v1/projects", json={**wanted, "team": "Vision'"})
    assert (odd.status_code, odd.json()["code"]) == (422, "invalid-input")
    given = manager.client().post("/v1/projects", json={**wanted, "team": "sound"})
    assert given.status_code == 201
