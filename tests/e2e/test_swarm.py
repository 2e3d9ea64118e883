"""A whole project on a real Docker Swarm of three nodes: data where they lie, learners beside them."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.swarms import PrivateSwarm, can_run_swarms, private_swarm

pytestmark = [pytest.mark.swarm, pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(900)]

User = Any
EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist-sklearn"


@pytest.fixture(scope="module")
def swarm(require: Any) -> Iterator[PrivateSwarm]:
    require(can_run_swarms(), "a Docker Swarm that we may start (root, docker.io, docker-registry, iproute2)")
    with private_swarm() as running:
        yield running


@pytest.fixture(scope="module")
def user(swarm: PrivateSwarm, make_user: Any) -> Iterator[User]:
    person = make_user(
        FLOPS_ORCHESTRATOR="swarm",
        DOCKER_HOST=swarm.manager.url,
        FLOPS_REGISTRY=f"http://{swarm.registry}",
        FLOPS_ADVERTISE=swarm.host,
    )
    yield person
    ended = person.flops("down", "--force")
    assert ended.code == 0, ended.stderr


def nodes_of(swarm: PrivateSwarm, project: str, role: str) -> list[str]:
    """The nodes with containers of a role, running or ended."""
    return [
        node.name
        for node in swarm.nodes
        for _ in node.containers({"flops.project": project, "flops.role": role}, ended=True)
    ]


def test_learners_run_where_their_data_lie_and_outlive_a_lost_node(user: User, swarm: PrivateSwarm) -> None:
    project = user.flops(
        "run", str(EXAMPLE), "--mock", "digits", "--learners", "3", "--rounds", "40", "--min-learners", "2",
        "--deadline", "20", "--deploy", "--detach", "--json",
        timeout_s=300,
    ).document["id"]  # fmt: skip
    deadline = time.monotonic() + 500
    while len(user.events(project, "round.finished")) < 2:
        shown = user.flops("show", project, "--json").document
        assert shown["state"] not in ("failed", "stopped"), shown["reason"]
        assert time.monotonic() < deadline, user.flops("events", project).stdout
        time.sleep(0.5)
    fragments = user.flops("data", "ls", "--json").document
    assert {one["node"] for one in fragments} == {node.name for node in swarm.nodes}
    assert sorted(nodes_of(swarm, project, "worker")) == sorted(node.name for node in swarm.nodes)
    assert nodes_of(swarm, project, "aggregator") == ["manager"]

    swarm.workers[0].kill()

    ended = user.flops("attach", project, "--json", timeout_s=600).lines[-1]
    assert ended["state"] == "finished", ended["reason"]
    assert ended["rounds_done"] == 40
    assert ended["deployment"], user.events(project, "warning")
    url = ended["deployment"]["url"]
    assert url.startswith("https://")
    stranger = httpx.post(f"{url}/invocations", json={"inputs": []}, verify=False, trust_env=False)
    assert stranger.status_code == 401
    name, version = ended["model"]["name"], ended["model"]["version"]
    folder = user.home / "taken"
    assert user.flops("model", "get", f"{name}:{version}", "--out", str(folder)).code == 0
    asked = user.flops("predict", project, "--data", str(folder / "serving_input_example.json"), "--json")
    assert asked.code == 0, asked.stderr
    assert asked.document["predictions"]
    assert user.flops("rm", project).code == 0
    with swarm.manager.client() as client:
        services = client.services()  # type: ignore[no-untyped-call]
    assert [one for one in services if project in one["Spec"]["Name"]] == []
