"""Whatever comes from a caller or from the model's process is a question, an answer or a clear refusal."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flops.serving.errors import RefusedError
from flops.serving.exchange import BrokenAnswerError, Exchange
from flops.serving.openinference import OpenInference
from flops.serving.question import Answer, Question
from flops.serving.scoring import FORMATS, Scoring, body_of
from flops.serving.signature import ModelCard, Signature, signature_of

Result = TypeVar("Result")
COLUMNS = [
    {"name": "a", "type": "double"},
    {"name": "b", "type": "long"},
    {"name": "c", "type": "string", "required": False},
    {"name": "d", "type": "boolean", "required": False},
]
FRAME = signature_of({"inputs": COLUMNS})
TENSOR = signature_of({"inputs": [{"tensor-spec": {"dtype": "float32", "shape": [-1, 2]}}]})
TENSORS = signature_of(
    {
        "inputs": [
            {"name": "x", "tensor-spec": {"dtype": "int32", "shape": [-1]}},
            {"name": "y", "tensor-spec": {"dtype": "bool", "shape": [-1, 2, 2]}},
        ]
    }
)
OPEN = signature_of({})
SIGNATURES = (FRAME, TENSOR, TENSORS, OPEN)

names = st.sampled_from(["a", "b", "c", "d", "x", "y", "input-0", "data", "columns", "index", "other"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=20,
)
documents = st.dictionaries(st.sampled_from([*FORMATS, "params"]), values, min_size=1, max_size=2) | values


def scoring(signature: Signature) -> Scoring:
    return Scoring(signature, max_rows=100, ignore_extra_columns=False)


@pytest.fixture(scope="module")
def exchange() -> Iterator[Exchange]:
    made = Exchange()
    yield made
    made.close()


@given(documents, st.sampled_from(SIGNATURES))
@example({"instances": [None, 3.5e38]}, TENSOR)  # null, and too large for its type
def test_any_json_is_a_question_or_a_refusal(document: Any, signature: Signature) -> None:
    body = json.dumps(document).encode()
    question = answered_or_refused(lambda: scoring(signature).question(body, "application/json"))
    if question is None:
        return
    if signature is OPEN:
        assert question.form == "body"
        return
    assert question.rows > 0
    for field in signature.inputs:
        for name, part in question.parts:
            if name == field.name and isinstance(part, np.ndarray):
                assert part.dtype == field.dtype
                assert len(part.shape) == len(field.shape)


@given(
    st.binary(max_size=200), st.sampled_from(SIGNATURES), st.sampled_from(["application/json", "text/csv"])
)
def test_any_bytes_are_a_question_or_a_refusal(body: bytes, signature: Signature, kind: str) -> None:
    answered_or_refused(lambda: scoring(signature).question(body, kind))


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "name": names | values,
                "shape": st.lists(st.integers(-1, 4), max_size=3) | values,
                "datatype": st.sampled_from(["FP32", "INT32", "BOOL", "BYTES"]) | values,
                "data": values,
                "parameters": st.dictionaries(st.just("binary_data_size"), st.integers(-3, 9)) | values,
            },
        ),
        max_size=2,
    )
    | values,
    st.binary(max_size=8),
    st.sampled_from(SIGNATURES),
)
def test_any_tensors_are_a_question_or_a_refusal(inputs: Any, behind: bytes, signature: Signature) -> None:
    card = ModelCard(signature, "mlflow", "", None)
    protocol = OpenInference(card, scoring(signature), name="m", version="1")
    head = json.dumps({"inputs": inputs}).encode()
    answered_or_refused(lambda: protocol.question(head + behind, len(head) if behind else None))


def answered_or_refused(action: Callable[[], Result]) -> Result | None:
    """What the action returns; None: it was refused."""
    refusal = None
    try:
        return action()
    except RefusedError as error:
        refusal = error
    assert 400 <= refusal.status < 500
    assert len(str(refusal)) < 700
    return None


def test_json_that_is_nested_too_deep_is_refused() -> None:
    for signature in SIGNATURES:
        with pytest.raises(RefusedError):
            scoring(signature).question(b"[" * 100_000, "application/json")
        deep = b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}"
        ask = functools.partial(scoring(signature).question, deep, "application/json")
        answered_or_refused(ask)


def test_whole_numbers_beyond_a_column_are_refused() -> None:
    for number in ("9223372036854775808", "1e300", "1.5", "-9.3e18"):
        with pytest.raises(RefusedError, match="column 'b' takes long, row 0 holds"):
            scoring(FRAME).question(f'{{"inputs": [{{"a": 1, "b": {number}}}]}}'.encode(), "application/json")
    whole = scoring(FRAME).question(b'{"inputs": [{"a": 1, "b": 3.0}]}', "application/json")
    assert whole.parts[1][1].tolist() == [3]  # type: ignore[union-attr]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_questions_asked_together_are_those_asked_alone(sizes: list[int]) -> None:
    exchange = Exchange()
    try:
        questions, rows = [], []
        for at, size in enumerate(sizes):
            part = [{"a": at + row / 8, "b": row, "c": f"{at}-{row}"} for row in range(size)]
            rows += part
            body = json.dumps({"dataframe_records": part}).encode()
            questions.append(scoring(FRAME).question(body, "application/json"))
        assert len({question.key for question in questions}) == 1
        message = exchange.write(questions)
        for one in message["inputs"]:
            if "json" in one:
                found = json.loads(os.pread(exchange.questions, one["json"][1], one["json"][0]))
            else:
                raw = os.pread(exchange.questions, 8 * len(rows), one["at"])
                found = np.frombuffer(raw, one["dtype"]).tolist()
            assert found == [row[one["name"]] for row in rows]
    finally:
        exchange.close()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_answers_are_divided_as_their_questions_were_joined(sizes: list[int]) -> None:
    total = sum(sizes)
    whole = Answer("records", (("y", np.arange(total)), ("z", [str(at) for at in range(total)])))
    parts = whole.split(sizes)
    assert parts is not None
    rows = [row for part in parts for row in json.loads(body_of(part))["predictions"]]
    assert rows == json.loads(body_of(whole))["predictions"]
    assert whole.split([*sizes, 1]) is None
    assert Answer("value", (("", 3),)).split(sizes) is None  # type: ignore[arg-type]


ARRAY = {"name": "", "dtype": "<f8", "shape": [2], "at": 0}


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"form": "array"},
        {"form": "array", "parts": []},
        {"form": "array", "parts": [ARRAY, ARRAY]},
        {"form": "unheard of", "parts": [ARRAY]},
        {"form": "array", "parts": [{**ARRAY, "shape": [10**12]}]},
        {"form": "array", "parts": [{**ARRAY, "shape": [-1]}]},
        {"form": "array", "parts": [{**ARRAY, "shape": [2.0]}]},
        {"form": "array", "parts": [{**ARRAY, "shape": [1] * 65}]},
        {"form": "array", "parts": [{**ARRAY, "dtype": "O"}]},
        {"form": "array", "parts": [{**ARRAY, "dtype": "<U9"}]},
        {"form": "array", "parts": [{**ARRAY, "dtype": "f8,f8"}]},
        {"form": "array", "parts": [{**ARRAY, "at": 4096}]},
        {"form": "array", "parts": [{**ARRAY, "at": -8}]},
        {"form": "array", "parts": [{**ARRAY, "at": "0"}]},
        {"form": "array", "parts": ["text"]},
        {"form": "value", "parts": [{"name": "", "json": [0, 5000]}]},
        {"form": "value", "parts": [{"name": "", "json": [0, 4]}]},
        {"form": "value", "parts": [{"name": "", "json": 4}]},
        {"form": "records", "parts": [ARRAY, {**ARRAY, "shape": [1]}]},
        {"form": "records", "parts": [{**ARRAY, "shape": []}]},
    ],
)
def test_an_answer_that_makes_no_sense_is_told_apart(exchange: Exchange, message: dict[str, Any]) -> None:
    os.pwrite(exchange.answers, b"\xff" * 64, 0)
    with pytest.raises(BrokenAnswerError):
        exchange.read(message)


def test_answers_cut_off_by_the_predictor_are_an_error_not_a_signal(exchange: Exchange) -> None:
    exchange.write([Question("tensor", (("x", np.ones((4, 2))),), 4)])
    os.ftruncate(exchange.questions, 0)
    os.ftruncate(exchange.answers, 0)
    exchange.write([Question("tensor", (("x", np.ones((4, 2))),), 4)])
    with pytest.raises(BrokenAnswerError):
        exchange.read({"form": "array", "parts": [ARRAY]})
