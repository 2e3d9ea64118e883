"""What tools of Oakestra's FLOps addon send, and what they are told."""

from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess


def test_an_sla_of_the_thesis_starts_a_project(client: httpx.Client, tmp_path: Path) -> None:
    sla = {
        "customerID": "Admin",
        "verbose": True,
        "ml_repo_url": str(tmp_path / "nothing"),
        "ml_model_flavor": "sklearn",
        "training_configuration": {"data_tags": ["my_tag"], "training_rounds": 2},
        "resource_constraints": {"memory": 100, "vcpus": 1, "storage": 0},
    }
    answer = client.post("/api/flops/projects", json=sla, headers={"Idempotency-Key": "sla"})
    assert (answer.status_code, answer.json()["message"]) == (200, "New FLOps project started successfully")
    spec = client.get(f"/v1/projects/{answer.json()['project']}").json()["spec"]
    assert spec["training"]["rounds"] == 2
    assert spec["data"]["tags"] == ["my_tag"]
    again = client.post(
        "/api/flops/projects/", json=sla, headers={"Idempotency-Key": "sla"}, follow_redirects=True
    )
    assert again.json() == answer.json()
    wrong = client.post("/api/flops/projects", json=sla | {"training_configuration": {"mode": "none"}})
    assert (wrong.status_code, "training_configuration.mode" in wrong.json()["detail"]) == (422, True)


def test_mock_data_are_spread_over_as_many_sites_as_partitions(client: httpx.Client) -> None:
    wanted = {"dataset_name": "digits", "number_of_partitions": 3, "data_tag": "my_tag"}
    answer = client.post("/api/flops/mocks", json={"customerID": "Admin", "mock_data_configuration": wanted})
    assert answer.json()["message"] == "New Mock-Data-Provider started successfully"
    assert len(answer.json()["fragments"]) == 3
    (tag,) = client.get("/v1/data/tags").json()["tags"]
    assert (tag["tag"], tag["sites"]) == ("my_tag", ["site-1", "site-2", "site-3"])
    other = {"mock_data_configuration": wanted | {"dataset_name": "cifar10"}}
    refused = client.post("/api/flops/mocks", json=other)
    assert (refused.status_code, refused.json()["detail"]) == (
        422,
        "data set 'cifar10' is not known here - use mnist or digits, or bring your own with 'flops data put'",
    )


@pytest.mark.slow
def test_tracking_has_an_address(client: httpx.Client) -> None:
    answer = client.request("GET", "/api/flops/tracking", json={"customerID": "Admin"})
    assert answer.json()["tracking_server_url"].startswith("http://127.0.0.1:")


def test_only_admins_reset_the_database(own_manager: "ManagerProcess", silent_server: str) -> None:
    client = own_manager.client()
    client.post("/v1/projects", json={"spec": {"repo": silent_server}}).raise_for_status()
    client.post("/v1/projects", json={"spec": {"repo": str(own_manager.home)}}).raise_for_status()
    refused = client.request("DELETE", "/api/flops/database", json={"customerID": "somebody"})
    assert (refused.status_code, refused.json()["detail"]) == (
        403,
        "Only Admins are allowed to reset the database!",
    )
    answer = client.request("DELETE", "/api/flops/database", json={"customerID": "Admin"})
    assert (answer.status_code, answer.json()) == (200, {"message": "Successfully reset the database."})
    assert client.get("/v1/projects").json()["projects"] == []
    assert list((own_manager.home / "projects").iterdir()) == []
