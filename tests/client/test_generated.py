"""The client is made from the OpenAPI document, and the document from the API."""

import inspect
import json
import typing
from typing import Any

import pytest

from flops.api.document import as_text, document
from flops.client import AsyncClient, Client, generate, shapes
from flops.client.generate import DOCUMENT, HERE

KEPT: dict[str, Any] = json.loads(DOCUMENT.read_text())
OPERATIONS = {
    operation["operationId"]: operation for item in KEPT["paths"].values() for operation in item.values()
}


def test_the_document_in_the_repository_is_the_apis() -> None:
    assert as_text(document()) == DOCUMENT.read_text(), "run 'make client'"


def test_the_generated_modules_are_what_the_generator_makes() -> None:
    assert generate.types(KEPT) == (HERE / "shapes.py").read_text(), "run 'make client'"
    assert generate.operations(KEPT) == (HERE / "operations.py").read_text(), "run 'make client'"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_a_method_and_every_parameter_a_type(name: str, kind: type) -> None:
    method = getattr(kind, name)
    hints = typing.get_type_hints(method)
    parameters = set(inspect.signature(method).parameters) - {"self"}
    assert parameters | {"return"} == hints.keys()
    assert method.__doc__
    wanted = {one["name"] for one in OPERATIONS[name].get("parameters", ()) if one["in"] != "header"}
    wanted -= {"follow"}  # `follow_events`
    assert {one.removesuffix("_") for one in parameters} >= wanted


@pytest.mark.parametrize("name", KEPT["components"]["schemas"])
def test_every_field_has_a_type(name: str) -> None:
    schema = KEPT["components"]["schemas"][name]
    shape = getattr(shapes, name)
    if "properties" in schema:
        assert typing.get_type_hints(shape).keys() == schema["properties"].keys()
        required = set(schema.get("required", ()))
        hints = typing.get_type_hints(shape, include_extras=True)
        assert {key for key, hint in hints.items() if typing.get_origin(hint) is not typing.NotRequired} == (
            required
        )
