"""MLflow's scoring protocol: the body of ``/invocations`` made a question, an answer made its body.

What MLflow's own server takes is taken, but for three things that it lets pass and that are refused here:
columns that the signature lacks (unless told to ignore them), numbers that do not fit a column of whole
numbers, and text where numbers belong.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from flops.serving import values
from flops.serving.errors import RefusedError
from flops.serving.question import Answer, Array, Part, Question
from flops.serving.signature import Field, Signature

FORMATS = ("dataframe_split", "dataframe_records", "instances", "inputs")
JSON, CSV = "application/json", "text/csv"
_NOTHING = frozenset(("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", "n/a", "<NA>", "#N/A", "-nan"))
_TRUTH = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}
_NAMED = 3

Columns = Mapping[str, Sequence[Any]]


class Scoring:
    """Reads the requests of one model."""

    def __init__(self, signature: Signature, *, max_rows: int, ignore_extra_columns: bool) -> None:
        self._signature = signature
        self._fields = {field.name: field for field in signature.inputs}
        self._max_rows = max_rows
        self._ignore_extra = ignore_extra_columns

    def question(self, body: bytes, content_type: str) -> Question:
        """What a body asks.

        Raises:
            RefusedError: it does not fit the protocol or the model.
        """
        kind = _media_type(content_type)
        if self._signature.form == "open":
            return self._as_it_is(body, kind)
        if kind == CSV:
            return self._of_csv(body)
        document = document_of(body)
        given = _format_of(document)
        params = document.get("params")
        if params is not None and not isinstance(params, dict):
            raise RefusedError("'params' is not an object - send names and values")
        data = document[given]
        if given == "dataframe_split":
            return self._of_frame(*_split(data), params=params)
        if given == "dataframe_records":
            return self._of_frame(*_records(data, given), params=params)
        if isinstance(data, list) and data and isinstance(data[0], dict):
            names, columns = _records(data, given)
            return self.of_columns(dict(zip(names, columns, strict=True)), params)
        if isinstance(data, dict):
            return self.of_columns(_columns(data), params)
        if len(self._fields) > 1:
            raise RefusedError(
                f"the model takes {_list(list(self._fields))} by name - send '{given}' by name"
            )
        return self.of_columns({next(iter(self._fields)): data}, params)

    def of_columns(self, given: Mapping[str, Any], params: Mapping[str, Any] | None) -> Question:
        """The question of inputs or columns by name, as lists or as arrays of numbers."""
        frame = self._signature.form == "frame"
        what = "column" if frame else "input"
        extra = [name for name in given if name not in self._fields]
        if extra and not self._ignore_extra:
            raise RefusedError(f"the model has no {what} {_list(extra)} - leave it out")
        missing = [name for name, field in self._fields.items() if field.required and name not in given]
        if missing:
            raise RefusedError(f"{what} {_list(missing)} is missing")
        parts: list[Part] = []
        for name, field in self._fields.items():
            if name in given:
                parts.append((name, _part(given[name], field, frame=frame)))
        return self._question(tuple(parts), params)

    def _of_frame(
        self, names: list[str] | None, columns: Sequence[Sequence[Any]], params: Mapping[str, Any] | None
    ) -> Question:
        """The question of a data frame; its columns are the model's, or those of its only tensor."""
        if self._signature.form == "tensor":
            field = self._signature.inputs[0]
            return self._question(((field.name, values.tensor(_rows(columns), field)),), params)
        if names is None:
            raise RefusedError("the data frame has no column names - the model takes columns by name")
        return self.of_columns(dict(zip(names, columns, strict=True)), params)

    def _of_csv(self, body: bytes) -> Question:
        names, columns = _csv(body)
        only = self._signature.inputs[0] if self._signature.form == "tensor" else None
        fields = [only or self._fields.get(name) for name in names]
        read = [
            texts if field is None else _read(texts, field)
            for texts, field in zip(columns, fields, strict=True)
        ]
        return self._of_frame(names, read, None)

    def _question(self, parts: tuple[Part, ...], params: Mapping[str, Any] | None) -> Question:
        signature = self._signature
        lengths = {len(given) if isinstance(given, list) or given.ndim else 1 for _, given in parts}
        rows = max(lengths, default=0)
        if len(lengths) > 1 and (signature.form == "frame" or signature.batches):
            described = ", ".join(f"'{name}' {len(given)}" for name, given in parts[:_NAMED])
            raise RefusedError(f"the inputs have different numbers of rows: {described}")
        if not rows:
            raise RefusedError("the request has no rows - send at least one")
        self._check_rows(rows)
        key = None
        if signature.batches:
            shapes = (
                (name, given.shape[1:] if isinstance(given, np.ndarray) else ()) for name, given in parts
            )
            said = None if params is None else json.dumps(params, sort_keys=True)
            key = (said, *shapes)
        return Question(signature.form, parts, rows, params, key)

    def _as_it_is(self, body: bytes, kind: str) -> Question:
        """A body that the model's own MLflow reads: the signature says nothing that could be checked here."""
        if kind == CSV:
            rows = body.count(b"\n")
        else:
            document = document_of(body)
            data = document[_format_of(document)]
            if isinstance(data, dict) and isinstance(data.get("data"), list):
                data = data["data"]
            rows = len(data) if isinstance(data, list) else 1
        self._check_rows(rows)
        return Question("body", rows=rows, body=body, content_type=kind)

    def _check_rows(self, rows: int) -> None:
        if rows > self._max_rows:
            raise RefusedError(
                f"the request has {rows} rows, {self._max_rows} are taken at a time - split it", status=413
            )


def document_of(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; NaN and Infinity are read as Python writes them.

    Raises:
        RefusedError: the body is something else.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise RefusedError(f"the body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise RefusedError(f"the body is no JSON object - send one with exactly one of {', '.join(FORMATS)}")
    return document


def body_of(answer: Answer) -> bytes:
    """The body of a response, with the values and the order that MLflow's server gives them."""
    if answer.form == "records":
        names = [name for name, _ in answer.parts]
        columns = [_listed(given) for _, given in answer.parts]
        said: Any = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    elif answer.form == "dict":
        said = {name: _listed(given) for name, given in answer.parts}
    else:
        said = _listed(answer.parts[0][1])
    if all(isinstance(given, np.ndarray) and finite(given) for _, given in answer.parts):
        return orjson.dumps({"predictions": said})
    return json.dumps({"predictions": said}).encode()  # NaN as MLflow says it


def finite(array: Array) -> bool:
    """Whether JSON has words for all values."""
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _listed(given: Array | list[Any]) -> Any:
    return given.tolist() if isinstance(given, np.ndarray) else given


def _part(given: Any, field: Field, *, frame: bool) -> Array | list[Any]:
    if isinstance(given, np.ndarray):
        array = values.converted("column" if frame else "input", given, field)
        return values.shaped(array, field)
    if not isinstance(given, list | tuple):
        given = [given]
    return values.column(given, field) if frame else values.tensor(given, field)


def _media_type(content_type: str) -> str:
    kind, *options = [part.strip() for part in content_type.split(";")]
    for option in options:
        name, _, value = option.partition("=")
        if name.lower() != "charset" or value.lower().strip('"') not in ("utf-8", "utf8"):
            raise RefusedError(f"content type option '{option[:40]}' is not taken - send UTF-8", status=415)
    if kind.lower() not in (JSON, CSV):
        raise RefusedError(f"content type '{kind[:70]}' is not taken - send {JSON} or {CSV}", status=415)
    return kind.lower()


def _format_of(document: Mapping[str, Any]) -> str:
    found = [name for name in FORMATS if name in document]
    if len(found) != 1:
        raise RefusedError(
            f"the body has {_list(found) if found else 'none'} of the fields {', '.join(FORMATS)}"
            " - send exactly one"
        )
    return found[0]


def _split(data: Any) -> tuple[list[str] | None, list[Sequence[Any]]]:
    if not isinstance(data, dict) or not isinstance(data.get("data"), list):
        raise RefusedError("'dataframe_split' has no list 'data' - send {'columns': [...], 'data': [...]}")
    unknown = [name for name in data if name not in ("columns", "data", "index")]
    if unknown:
        raise RefusedError(f"'dataframe_split' has no field {_list(unknown)} - leave it out")
    rows, names = data["data"], data.get("columns")
    if names is not None and not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
        raise RefusedError("'columns' of 'dataframe_split' are no list of names")
    if names is not None and len(set(names)) != len(names):
        raise RefusedError("'columns' of 'dataframe_split' has a name twice")
    if not all(isinstance(row, list) for row in rows):
        raise RefusedError("'data' of 'dataframe_split' is no list of rows - send a list of lists")
    width = len(names) if names is not None else len(rows[0]) if rows else 0
    return names, _transposed(rows, width)


def _transposed(rows: Sequence[Sequence[Any]], width: int) -> list[Sequence[Any]]:
    wrong = next((at for at, row in enumerate(rows) if len(row) != width), None)
    if wrong is not None:
        raise RefusedError(f"row {wrong} has {len(rows[wrong])} values for {width} columns")
    return list(zip(*rows, strict=True)) if rows else [()] * width


def _records(data: Any, given: str) -> tuple[list[str], list[Sequence[Any]]]:
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise RefusedError(f"'{given}' is no list of objects - send one object for each row")
    names = list(dict.fromkeys(name for row in data for name in row))
    if all(len(row) == len(names) for row in data):
        return names, [[row[name] for row in data] for name in names]
    return names, [[row.get(name) for row in data] for name in names]


def _columns(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Columns by name; single values are those of one row."""
    return {name: given if isinstance(given, list) else [given] for name, given in data.items()}


def _rows(columns: Sequence[Sequence[Any]]) -> list[Any]:
    return [list(row) for row in zip(*columns, strict=True)]


def _csv(body: bytes) -> tuple[list[str], list[Sequence[Any]]]:
    try:
        rows = [row for row in csv.reader(io.StringIO(body.decode("utf-8-sig"), newline="")) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise RefusedError(f"the body is not CSV in UTF-8: {error}") from error
    if not rows:
        raise RefusedError("the body has no line of column names - send them first, then the rows")
    names, *lines = rows
    if len(set(names)) != len(names):
        raise RefusedError("the first line has a column's name twice")
    return names, _transposed(lines, len(names))


def _read(texts: Sequence[str], field: Field) -> list[Any]:
    """Texts as values of a field's type; a text that is none stays as it is, and is refused with the rest."""
    dtype = field.dtype
    if dtype is None:
        return [None if text in _NOTHING else text for text in texts]
    if dtype.kind == "b":
        return [_TRUTH.get(text, text) for text in texts]
    return [None if text in _NOTHING else _number(text, dtype.kind) for text in texts]


def _number(text: str, kind: str) -> float | int | str:
    try:
        return text if "_" in text else float(text) if kind == "f" else int(text)
    except ValueError:
        return text


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name[:70]}'" for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
