"""The Open Inference Protocol, version 2, as its clients speak it."""

import json
import struct
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving.conftest import Serve, Server, images, person

INFER = "/v2/models/digits/infer"


@pytest.fixture(scope="module")
def digits(serve: Serve) -> Server:
    return serve("digits")


@pytest.fixture(scope="module")
def income(serve: Serve) -> Server:
    return serve("income")


def tensor(rows: list[list[float]], **changes: Any) -> dict[str, Any]:
    flat = [value for row in rows for value in row]
    return {"name": "input-0", "shape": [len(rows), 64], "datatype": "FP64", "data": flat, **changes}


def refused(answer: httpx.Response, says: str) -> None:
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"}
    assert says in answer.json()["error"]


def test_the_server_and_its_model_describe_themselves(digits: Server) -> None:
    get = digits.client.get
    assert get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/digits", "/v2/models/digits/versions/3"):
        assert get(f"{path}/ready").json() == {"name": "digits", "ready": True}
        assert get(path).json() == {
            "name": "digits",
            "versions": ["3"],
            "platform": "mlflow_sklearn",
            "inputs": [{"name": "input-0", "datatype": "FP64", "shape": [-1, 64]}],
            "outputs": [{"name": "output-0", "datatype": "INT64", "shape": [-1]}],
        }
    assert get("/v2/models/other").status_code == 404
    assert get("/v2/models/digits/versions/2").status_code == 404


def test_tensors_get_the_answer_of_the_scoring_protocol(digits: Server) -> None:
    rows = images(3)
    wanted = digits.ask({"inputs": rows}).json()["predictions"]
    for path in (INFER, "/v2/models/digits/versions/3/infer"):
        answer = digits.ask({"id": "a7", "inputs": [tensor(rows)]}, path)
        assert answer.json() == {
            "model_name": "digits",
            "model_version": "3",
            "id": "a7",
            "outputs": [{"name": "output-0", "datatype": "INT64", "shape": [3], "data": wanted}],
        }
    nested = digits.ask({"inputs": [tensor(rows, data=rows)]}, INFER)
    single = digits.ask({"inputs": [tensor(rows, datatype="FP32")]}, INFER)
    assert nested.json()["outputs"][0]["data"] == single.json()["outputs"][0]["data"] == wanted


def test_tensors_travel_as_bytes_behind_the_json(digits: Server) -> None:
    rows = images(4)
    raw = np.array(rows).tobytes()
    document = {
        "inputs": [
            {
                "name": "input-0",
                "shape": [4, 64],
                "datatype": "FP64",
                "parameters": {"binary_data_size": len(raw)},
            }
        ],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(document).encode()
    answer = digits.client.post(
        INFER, content=head + raw, headers={"inference-header-content-length": str(len(head))}
    )
    size = int(answer.headers["inference-header-content-length"])
    output = json.loads(answer.content[:size])["outputs"][0]
    assert output["parameters"] == {"binary_data_size": 32}
    found = list(struct.unpack("<4q", answer.content[size:]))
    assert found == digits.ask({"inputs": rows}).json()["predictions"]
    cut = digits.client.post(
        INFER, content=head + raw[:-8], headers={"inference-header-content-length": str(len(head))}
    )
    refused(cut, "binary_data_size")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "x"}, "the model has no input 'x'"),
        ({"shape": [1, 63]}, "128 values"),
        ({"shape": [4, 32]}, "has shape (4, 32), the model takes (any, 64)"),
        ({"shape": [-1, 64]}, "shape"),
        ({"datatype": "FP128"}, "datatype"),
        ({"datatype": "BOOL"}, "takes BOOL"),
        ({"datatype": "BYTES"}, "no text"),
        ({"datatype": "BYTES", "data": ["1"] * 128}, "takes float64, row 0[0] holds '1'"),
        ({"data": ["a"] * 128}, "row 0 holds 'a'"),
        ({"data": None}, "no list 'data'"),
    ],
)
def test_a_wrong_tensor_is_refused_with_its_name(digits: Server, changes: dict[str, Any], says: str) -> None:
    refused(digits.ask({"inputs": [tensor(images(2), **changes)]}, INFER), says)


def test_other_wrong_requests_are_refused(digits: Server) -> None:
    refused(digits.ask({"inputs": []}, INFER), "no list of tensors")
    refused(digits.ask([], INFER), "no JSON object with 'inputs'")
    refused(digits.ask({"inputs": [tensor(images(1))] * 2}, INFER), "twice")
    refused(digits.ask({"inputs": [tensor(images(1))], "id": 4}, INFER), "'id'")
    refused(digits.ask({"inputs": [tensor(images(1))], "outputs": [{"name": "z"}]}, INFER), "z")


def test_columns_are_tensors_of_one_value_a_row(income: Server) -> None:
    people = [person(), person(age=20, city="Zurich")]
    types = {"age": "FP64", "children": "INT64", "city": "BYTES", "married": "BOOL"}
    inputs = [
        {"name": name, "shape": [2, 1], "datatype": kind, "data": [row[name] for row in people]}
        for name, kind in types.items()
    ]
    wanted = income.ask({"dataframe_records": people}).json()["predictions"]
    path = "/v2/models/income/infer"
    answer = income.ask({"inputs": inputs}, path).json()
    assert answer["outputs"] == [{"name": "output-0", "datatype": "FP64", "shape": [2], "data": wanted}]
    refused(income.ask({"inputs": inputs[1:]}, path), "column 'age' is missing")
    refused(income.ask({"inputs": [{**inputs[0], "shape": [1, 2]}, *inputs[1:]]}, path), "column 'age'")


def test_texts_come_back_as_bytes_tensors_and_unsigned_models_answer_too(serve: Serve) -> None:
    town = serve("town")
    row = {"age": 20.0, "children": 1, "married": True}
    kinds = {"age": "FP64", "children": "INT64", "married": "BOOL"}
    inputs = [
        {"name": name, "shape": [1], "datatype": kind, "data": [row[name]]} for name, kind in kinds.items()
    ]
    output = town.ask({"inputs": inputs}, "/v2/models/town/infer").json()["outputs"][0]
    assert output["datatype"] == "BYTES"
    assert output["data"] == town.ask({"inputs": [row]}).json()["predictions"]
    unsigned = serve("unsigned")
    answer = unsigned.ask({"inputs": [tensor(images(2))]}, "/v2/models/unsigned/infer").json()
    assert answer["outputs"][0]["data"] == unsigned.ask({"inputs": images(2)}).json()["predictions"]
