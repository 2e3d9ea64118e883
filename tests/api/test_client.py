"""The Python clients and a real manager."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet
import pytest

from flops import AsyncClient, Client
from flops.core.errors import ConflictError, NotFoundError, UnauthorizedError

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess


def test_a_project_is_submitted_followed_listed_and_removed(
    manager: "ManagerProcess", tmp_path: Path
) -> None:
    pa.parquet.write_table(pa.table({"n": [1, 2, 3]}), tmp_path / "table.parquet")
    with Client(manager.url, manager.token) as client:
        made = client.submit_project(spec={"repo": str(tmp_path / "nothing"), "name": "by-hand"})
        events = list(client.follow_events(made["id"]))
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert events[-1].state == "failed"
        assert list(client.iterate_events(made["id"], page=2)) == events
        assert [one["id"] for one in client.iterate_projects(name="by-hand", page=1)] == [made["id"]]
        with pytest.raises(ConflictError):
            client.stop_project(made["id"])
        with (tmp_path / "table.parquet").open("rb") as file:
            fragment = client.put_fragment(file, tag=["t"], site="a")
        assert fragment["num_examples"] == 3
        assert client.list_data_tags()["tags"][0]["sites"] == ["a"]
        assert "flops_projects" in client.get_metrics()
        client.drop_fragment(fragment["id"])
        client.remove_project(made["id"])
        with pytest.raises(NotFoundError, match=f"there is no project {made['id']}"):
            client.get_project(made["id"])
    with Client(manager.url, "wrong") as stranger, pytest.raises(UnauthorizedError):
        stranger.me()


def test_the_asynchronous_client_does_the_same(manager: "ManagerProcess", tmp_path: Path) -> None:
    async def scenario() -> None:
        async with AsyncClient(manager.url, manager.token) as client:
            made = await asyncio.gather(
                *(client.submit_project(spec={"repo": str(tmp_path / name)}) for name in "abc")
            )
            for project in made:
                states = [event.state async for event in client.follow_events(project["id"]) if event.state]
                assert states[-1] == "failed"
            found = [one["id"] async for one in client.iterate_projects(state=["failed"], page=2)]
            assert set(found) >= {project["id"] for project in made}

    asyncio.run(scenario())


def test_a_submission_under_one_key_makes_one_project(manager: "ManagerProcess", tmp_path: Path) -> None:
    with Client(manager.url, manager.token) as client:
        spec = {"repo": str(tmp_path)}
        first = client.submit_project(spec=spec, idempotency_key="k")
        assert client.submit_project(spec=spec, idempotency_key="k")["id"] == first["id"]
