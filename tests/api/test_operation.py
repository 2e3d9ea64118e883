"""What operators and their tools ask: health, readiness, nodes, figures, what data and models there are."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet

from flops.core.ids import ProjectId
from flops.tracking import RunStarted, Spool
from tests.api.conftest import wait_for

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess


def test_a_manager_is_ready_before_there_is_anything_to_record(client: httpx.Client) -> None:
    wait_for(lambda: client.get("/v1/ready").status_code == 200, "readiness")
    there = {"ok": True, "reason": None}
    checks = {"database": there, "orchestrator": there, "recorder": there}
    assert client.get("/v1/ready").json() == {"ready": True, "checks": checks}


def test_a_recorder_runs_only_where_there_is_something_to_record(
    client: httpx.Client, manager: "ManagerProcess"
) -> None:
    client.get("/v1/data/tags").raise_for_status()  # the data server runs
    assert recorders(manager.home) == []


def test_a_manager_without_its_recorder_lives_and_is_not_ready(own_manager: "ManagerProcess") -> None:
    own_manager.end()
    begun = RunStarted(time=1.0, experiment="digits", name="p-222222")
    Spool(own_manager.home / "spool").append(ProjectId("p-222222"), begun)
    client = own_manager.start().client()
    wait_for(lambda: client.get("/v1/ready").status_code == 200, "readiness")
    running = recorders(own_manager.home)
    assert running
    for process in running:
        process.suspend()  # its keeper must not start it again while we look
        process.kill()
    deadline = time.monotonic() + 10
    seen: dict[str, Any] = {}
    while not seen and time.monotonic() < deadline:
        answer = client.get("/v1/ready")
        if answer.status_code == 503:
            seen = answer.json()
    assert seen["ready"] is False
    assert "the recorder does not run" in seen["checks"]["recorder"]["reason"]
    assert seen["checks"]["database"]["ok"] is True
    assert client.get("/v1/health").json()["status"] == "ok"
    wait_for(lambda: client.get("/v1/ready").status_code == 200, "readiness again")


def recorders(home: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(home) in (line := " ".join(process.info["cmdline"] or [])) and "flops.tracking" in line
    ]


def test_this_machine_is_the_node_of_processes(client: httpx.Client) -> None:
    (node,) = client.get("/v1/nodes").json()["nodes"]
    assert node["platform"].startswith("linux/")
    assert node["cpus"] >= 1
    assert node["memory_mb"] > 100
    assert node["ready"] is True


def test_figures_tell_of_projects_requests_and_memory(client: httpx.Client) -> None:
    client.get("/v1/projects/p-222222")
    client.get("/v1/projects/p-333333")
    client.get("/nowhere")
    text = client.get("/v1/metrics").text
    assert 'flops_projects{state="training"} 0.0' in text
    route = 'route="/v1/projects/{project}",status="404"'
    assert f'flops_http_requests_total{{method="GET",{route}}} 2.0' in text
    assert 'flops_http_requests_total{method="GET",route="unknown",status="404"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert client.get("/v1/metrics", headers={"Authorization": "Bearer x"}).status_code == 401


def test_data_tags_tell_what_is_held_under_them(client: httpx.Client, tmp_path: Path) -> None:
    assert client.get("/v1/data/tags").json() == {"tags": []}
    size = 0
    for site, tags, rows in (("a", ["x", "y"], 3), ("b", ["x"], 4)):
        pa.parquet.write_table(pa.table({"n": list(range(rows))}), tmp_path / "table.parquet")
        answer = client.post(
            "/v1/data/fragments",
            params={"tag": tags, "site": site},
            content=(tmp_path / "table.parquet").read_bytes(),
        )
        size += answer.raise_for_status().json()["size_bytes"]
    x, y = client.get("/v1/data/tags").json()["tags"]
    assert x == {"tag": "x", "sites": ["a", "b"], "fragments": 2, "num_examples": 7, "size_bytes": size}
    assert (y["tag"], y["sites"], y["num_examples"]) == ("y", ["a"], 3)


def test_a_model_that_is_not_there_is_not_found(client: httpx.Client) -> None:
    for path in ("nothing", "nothing/versions/1", "nothing/versions/1/archive"):
        answer = client.get(f"/v1/models/{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found")
    assert client.get(f"/v1/models/nothing/versions/{2**40}").status_code == 422
