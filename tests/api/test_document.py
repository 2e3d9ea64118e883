"""What the OpenAPI document promises is kept, whatever is sent: schemathesis against a real manager.

No 5xx, no status or content type that is not documented, answers of the documented shape, wrong requests
refused.
"""

import json
from itertools import cycle
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.core import NOT_SET

from flops.client.generate import DOCUMENT

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Not sent as they should be: they end the manager, forget everything, or fetch, build and start things for
# minutes. Their wrong forms are.
NOT_FOR_PLAY = [
    "shut_down",
    "reset_database",
    "start_ui",
    "get_tracking",
    "make_base_image",
    "mock_data",
    "mock_sla",
]

REMOVES = ["remove_project", "drop_fragment", "revoke_token", "eject_node"]
"""What other calls ask for."""

KEPT: dict[str, Any] = json.loads(DOCUMENT.read_text())


def config(**generation: Any) -> schemathesis.Config:
    return schemathesis.Config.from_dict(
        {
            "generation": {"deterministic": True, "with-security-parameters": False, **generation},
            "phases": {"stateful": {"enabled": False}},
            "checks": {
                # What a spec, an id or a cursor has to be is more than a JSON schema can say.
                "positive_data_acceptance": {"enabled": False},
                # Who tries wrong tokens a hundred times is told to wait; see test_access.py.
                "ignored_auth": {"enabled": False},
            },
        }
    )


schema = schemathesis.openapi.from_dict(KEPT, config=config())
with_ids = schemathesis.openapi.from_dict(KEPT, config=config(mode="positive"))


@schema.hook
def filter_query(context: schemathesis.HookContext, query: dict[str, Any] | None) -> bool:
    """Whether the wrong types of a query are still wrong on the wire, where one value is a list of one, and
    of several the last one counts.
    """
    assert context.operation is not None
    kinds = {one["name"]: one["schema"] for one in context.operation.definition.raw.get("parameters", ())}
    return not any(
        isinstance(value, list | dict) != (kinds[name].get("type") == "array")
        for name, value in (query or {}).items()
        if name in kinds
    )


relaxed = settings(
    deadline=None, suppress_health_check=list(HealthCheck), max_examples=6, derandomize=True, database=None
)


@schemathesis.serializer("application/vnd.apache.parquet")
def as_it_is(ctx: object, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


class Play:
    """A manager with a few things in it; its callers are many, as each may ask so often only.

    Args:
        names: of what is there, by the parameters of paths.
    """

    def __init__(self, manager: "ManagerProcess", tokens: list[str], names: dict[str, str]) -> None:
        self._url = manager.url
        self._tokens = cycle(tokens)
        self.names = names

    def send(self, case: schemathesis.Case[Any]) -> None:
        """The case's request, and all checks of its answer."""
        headers = {"Authorization": f"Bearer {next(self._tokens)}"}
        answer = case.call(base_url=self._url, headers=headers, timeout=30)
        case.validate_response(answer, headers=headers)


@pytest.fixture(scope="module")
def play(manager: "ManagerProcess", tmp_path_factory: pytest.TempPathFactory) -> Play:
    client = manager.client()

    def made(path: str, **body: Any) -> dict[str, Any]:
        answer = client.post(path, json=body).raise_for_status().json()
        assert isinstance(answer, dict)
        return answer

    file = tmp_path_factory.mktemp("play") / "table.parquet"
    pa.parquet.write_table(pa.table({"n": [1, 2]}), file)
    fragment = client.post("/v1/data/fragments?tag=t", content=file.read_bytes()).raise_for_status().json()
    project = made("/v1/projects", spec={"repo": str(file)})["id"]
    made("/v1/users", name="root", role="admin")
    made("/v1/users", name="ann")
    tokens = [made("/v1/tokens", name=f"{number}", user="root")["token"] for number in range(20)]
    number = made("/v1/tokens", name="laptop", user="ann")["id"]
    with client.stream("GET", f"/v1/projects/{project}/events?follow=true") as answer:
        answer.read()
    names = {"project": project, "fragment": fragment["id"], "name": "ann", "id": number, "version": "1"}
    return Play(manager, tokens, names)


@schema.exclude(operation_id=NOT_FOR_PLAY).parametrize()
@relaxed
def test_the_document_is_kept(case: schemathesis.Case[Any], play: Play) -> None:
    play.send(case)


@with_ids.include(path_regex="{").exclude(operation_id=REMOVES).parametrize()
@relaxed
def test_the_document_is_kept_for_what_is_there(case: schemathesis.Case[Any], play: Play) -> None:
    case.path_parameters = {name: play.names[name] for name in case.path_parameters}
    play.send(case)


@with_ids.include(operation_id=NOT_FOR_PLAY).parametrize()
@relaxed
def test_wrong_requests_are_refused_where_right_ones_are_not_for_play(
    case: schemathesis.Case[Any], play: Play
) -> None:
    if case.body not in (NOT_SET, None):
        case.body = {"nonsense": 1}
        play.send(case)
