"""The same requests to MLflow's own server and to ours: the same answers, and refusals of the same status."""

import json
from typing import Any

import pytest

from tests.serving.conftest import Serve, Server, images, person

Pair = tuple[Server, Server]
JSON = {"content-type": "application/json"}
CSV = {"content-type": "text/csv"}


@pytest.fixture(scope="module")
def digits(serve: Serve, serve_mlflow: Serve) -> Pair:
    return serve("digits"), serve_mlflow("digits")


@pytest.fixture(scope="module")
def income(serve: Serve, serve_mlflow: Serve) -> Pair:
    return serve("income"), serve_mlflow("income")


@pytest.fixture(scope="module")
def scaled(serve: Serve, serve_mlflow: Serve) -> Pair:
    return serve("scaled"), serve_mlflow("scaled")


def both(pair: Pair, body: Any, headers: dict[str, str] = JSON) -> str:
    """The answer of both; in the same bytes but for spaces, so order of names and digits of numbers agree."""
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    ours, theirs = (one.client.post("/invocations", content=content, headers=headers) for one in pair)
    assert theirs.status_code == 200, theirs.text
    assert ours.status_code == 200, ours.text
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    said = json.dumps(json.loads(ours.text))
    assert said == json.dumps(json.loads(theirs.text))
    return said


def both_refuse(pair: Pair, body: Any, headers: dict[str, str] = JSON) -> str:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    ours, theirs = (one.client.post("/invocations", content=content, headers=headers) for one in pair)
    assert theirs.status_code >= 400, theirs.text
    assert ours.status_code == theirs.status_code, (ours.text, theirs.text)
    said = ours.json()
    assert set(said) == {"error_code", "message"}
    message: str = said["message"]
    return message


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def split(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}


PEOPLE = [dict(person()), dict(person(age=20, city="Zurich")), dict(person(children=0, married=False))]


def test_a_tensor_gets_mlflows_answer(digits: Pair) -> None:
    for body in ({"inputs": images(5)}, {"instances": images(1)}, {"inputs": images(2), "params": None}):
        both(digits, body)
    assert len(json.loads(both(digits, {"inputs": images(40)}))["predictions"]) == 40


def test_whole_numbers_are_taken_for_fractions(digits: Pair) -> None:
    both(digits, {"inputs": [[1] * 64, [0.5] * 64]})


def test_a_data_frame_is_a_tensor_by_rows(digits: Pair) -> None:
    names = [f"p{at}" for at in range(64)]
    rows = images(3)
    both(digits, {"dataframe_split": {"columns": names, "data": rows}})
    both(digits, {"dataframe_split": {"data": rows, "index": [5, 6, 7]}})
    both(digits, {"dataframe_records": [dict(zip(names, row, strict=True)) for row in rows]})


def test_csv_is_taken_for_a_tensor_though_mlflow_fails_on_it(digits: Pair) -> None:
    ours, rows = digits[0], images(3)
    body = "\n".join(",".join(map(str, row)) for row in [range(64), *rows])
    answer = ours.client.post("/invocations", content=body, headers=CSV)
    assert answer.json() == ours.ask({"inputs": rows}).json()


def test_fractions_agree_to_the_last_digit(serve: Serve, serve_mlflow: Serve) -> None:
    pair = serve("probabilities"), serve_mlflow("probabilities")
    for row in images(20):
        both(pair, {"inputs": [row]})


def test_columns_get_mlflows_answer_in_every_format(income: Pair) -> None:
    lines = [",".join(map(str, row)) for row in ([*PEOPLE[0]], *(one.values() for one in PEOPLE))]
    answers = {
        both(income, {"dataframe_split": split(PEOPLE)}),
        both(income, {"dataframe_records": PEOPLE}),
        both(income, {"instances": PEOPLE}),
        both(income, {"inputs": columns(PEOPLE)}),
        both(income, "\n".join(lines), CSV),
    }
    assert len(answers) == 1


def test_columns_come_in_any_order(income: Pair) -> None:
    mixed = [dict(reversed(row.items())) for row in PEOPLE]
    assert both(income, {"dataframe_records": mixed}) == both(income, {"dataframe_records": PEOPLE})


def test_labels_that_are_text_and_models_without_a_signature(serve: Serve, serve_mlflow: Serve) -> None:
    town = serve("town"), serve_mlflow("town")
    rows = [{name: row[name] for name in ("age", "children", "married")} for row in PEOPLE]
    assert "Munich" in both(town, {"dataframe_records": rows}) or "Vienna" in both(town, {"inputs": rows})
    unsigned = serve("unsigned"), serve_mlflow("unsigned")
    both(unsigned, {"inputs": images(3)})
    both(unsigned, {"dataframe_split": {"data": images(3)}})
    both_refuse(unsigned, {"inputs": [[1, 2, 3]]})
    both_refuse(unsigned, {"dataframe_split": 7})


def test_a_data_frame_comes_back_as_records(scaled: Pair) -> None:
    rows = [{"x": 3.5, "note": "a"}, {"x": 12, "note": "b"}]
    said = both(scaled, {"dataframe_records": rows})
    assert json.loads(said)["predictions"][1] == {"y": 12.0, "note": "b", "big": True}
    both(scaled, {"dataframe_records": rows, "params": {"factor": 2.5}})
    both(scaled, {"dataframe_records": [{"x": 1.0}]})
    both(scaled, {"inputs": {"x": [1.0, 2.0]}})
    both(scaled, '{"dataframe_records": [{"x": NaN}, {"x": null}]}')


def test_wrong_params_are_refused(scaled: Pair) -> None:
    assert "factor" in both_refuse(scaled, {"inputs": {"x": [1.0]}, "params": {"factor": "much"}})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "no JSON object"),
        ("{}", "exactly one"),
        ({"inputs": [[1.0]], "instances": [[1.0]]}, "exactly one"),
        ({"inputs": [[1.0] * 63]}, "shape (1, 63), the model takes (any, 64)"),
        ({"inputs": [1.0] * 64}, "shape (64)"),
        ({"inputs": [["a"] * 64]}, "takes float64, row 0[0] holds 'a'"),
        ({"inputs": [[0.0] * 64, [0.0] * 3]}, "different lengths"),
        ({"dataframe_records": {"a": 1}}, "no list of objects"),
        ({"dataframe_split": [1]}, "no list 'data'"),
        ({"dataframe_split": {"data": [[1.0]], "rows": 1}}, "no field 'rows'"),
        (b"\xff\xfe{}", "not valid JSON"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_as_mlflow_does(digits: Pair, body: Any, says: str) -> None:
    assert says in both_refuse(digits, body)


def test_a_missing_column_is_named(income: Pair) -> None:
    rows = [{name: value for name, value in row.items() if name != "city"} for row in PEOPLE]
    assert both_refuse(income, {"dataframe_records": rows}) == "column 'city' is missing"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"age": "old"}, "column 'age' takes double, row 1 holds 'old'"),
        ({"city": 7}, "column 'city' takes string, row 1 holds 7"),
        ({"children": 1.5}, "column 'children' takes long, row 1 holds 1.5"),
        ({"children": None}, "column 'children' takes long, row 1 holds null"),
        ({"married": "perhaps"}, "column 'married' takes boolean, row 1 holds 'perhaps'"),
        ({"age": [1.0]}, "column 'age'"),
        ({"height": 1.8}, "the model has no column 'height' - leave it out"),
    ],
)
def test_a_wrong_value_is_refused_with_its_column_and_row(
    income: Pair, changes: dict[str, Any], says: str
) -> None:
    answer = income[0].ask({"dataframe_records": [person(), person(**changes)]})
    assert answer.status_code == 400
    assert says in answer.json()["message"]


def test_wrong_values_in_csv_are_named_too(income: Pair) -> None:
    head = "age,children,city,married\n"
    for line, says in (
        ("x,1,Munich,True", "column 'age' takes double, row 0 holds 'x'"),
        ("1,1.5,Munich,True", "column 'children' takes long"),
        ("1,1,Munich", "row 0 has 3 values for 4 columns"),
    ):
        answer = income[0].client.post("/invocations", content=head + line, headers=CSV)
        assert answer.status_code == 400
        assert says in answer.json()["message"]


def test_extra_columns_are_left_out_when_told_to(serve: Serve, serve_mlflow: Serve) -> None:
    server = serve("town", ignore_extra_columns=True)
    row = {"age": 20.0, "children": 1, "married": True}
    assert server.ask({"inputs": [{**row, "more": 1}]}).json() == server.ask({"inputs": [row]}).json()


def test_other_content_types_are_refused_with_415(digits: Pair) -> None:
    for kind in ("text/plain", "application/json; charset=latin-1", "application/json; odd=1"):
        for server in digits:
            answer = server.client.post("/invocations", content="{}", headers={"content-type": kind})
            assert answer.status_code == 415


def test_health_and_version_are_mlflows(digits: Pair) -> None:
    ours, theirs = digits
    for path in ("/ping", "/health", "/version"):
        mine, other = ours.client.get(path), theirs.client.get(path)
        assert (mine.status_code, mine.text) == (other.status_code, other.text) == (200, other.text)
    assert ours.client.get("/nowhere").status_code == 404
    assert ours.client.get("/invocations").status_code == 405
