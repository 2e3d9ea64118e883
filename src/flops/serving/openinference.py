"""The Open Inference Protocol, version 2, over REST: its tensors made a question, an answer made tensors.

Tensors travel as JSON, or as raw bytes behind it (the protocol's binary data extension).

Source:
    https://github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md;
    Triton's "Binary data extension".
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from flops.serving import scoring, values
from flops.serving.errors import ModelFailedError, RefusedError
from flops.serving.question import Answer, Array, Question
from flops.serving.scoring import Scoring
from flops.serving.signature import Field, ModelCard

BINARY_HEADER = b"inference-header-content-length"
_DATATYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"INT{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"UINT{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
_NAMES = {dtype: name for name, dtype in _DATATYPES.items()}
_TEXT = "BYTES"
_LENGTH = 4
_MAX_DIMENSIONS = 32


class OpenInference:
    """Reads the requests of one model, and writes its answers."""

    def __init__(self, card: ModelCard, scoring: Scoring, *, name: str, version: str) -> None:
        self._card = card
        self._scoring = scoring
        self._name = name
        self._version = version

    def metadata(self) -> dict[str, Any]:
        """The model as the protocol describes it; nothing where it has no signature."""
        signature = self._card.signature
        return {
            "name": self._name,
            "versions": [self._version],
            "platform": self._card.platform,
            "inputs": [_described(field) for field in signature.inputs],
            "outputs": [_described(field) for field in signature.outputs],
        }

    def question(self, body: bytes, header_bytes: int | None) -> "tuple[Question, Wanted]":
        """What a body asks, and how its answer is wanted.

        Args:
            header_bytes: of the JSON in front; None: all of it.
        Raises:
            RefusedError: it does not fit the protocol or the model.
        """
        if header_bytes is not None and not 0 <= header_bytes <= len(body):
            raise RefusedError(
                f"Inference-Header-Content-Length is {header_bytes}, the body has {len(body)} bytes"
            )
        document = _document(body if header_bytes is None else body[:header_bytes])
        binary = _Binary(b"" if header_bytes is None else body[header_bytes:])
        inputs = document.get("inputs")
        if not isinstance(inputs, list) or not inputs or not all(isinstance(one, dict) for one in inputs):
            raise RefusedError("'inputs' is no list of tensors - send name, shape, datatype and data of each")
        tensors: dict[str, Any] = {}
        for one in inputs:
            name = one.get("name")
            if not isinstance(name, str):
                raise RefusedError("an input has no name")
            if name in tensors:
                raise RefusedError(f"input '{name[:70]}' is there twice")
            tensors[name] = _tensor(name, one, binary)
        binary.check_end()
        wanted = Wanted(document)
        return self._asked(tensors), wanted

    def _asked(self, tensors: Mapping[str, Any]) -> Question:
        signature = self._card.signature
        if signature.form == "open":
            # The model's own MLflow reads it: a lone tensor as it is, several by name.
            lists = {name: _nested(given) for name, given in tensors.items()}
            data = next(iter(lists.values())) if len(lists) == 1 else lists
            return self._scoring.question(json.dumps({"inputs": data}).encode(), scoring.JSON)
        if signature.form == "frame":
            return self._scoring.of_columns({name: _flat(name, one) for name, one in tensors.items()}, None)
        return self._scoring.of_columns(
            {name: one if isinstance(one, np.ndarray) else _nested(one) for name, one in tensors.items()},
            None,
        )

    def body(self, answer: Answer, wanted: "Wanted") -> tuple[bytes, int | None]:
        """The body of a response, and of how many bytes its JSON is where bytes follow it."""
        outputs, parts, unsaid = [], [], False
        for name, array in self._outputs(answer):
            if wanted.names is not None and name not in wanted.names:
                continue
            described: dict[str, Any] = {
                "name": name,
                "datatype": _NAMES.get(array.dtype, _TEXT),
                "shape": list(array.shape),
            }
            if wanted.is_binary(name):
                data = _bytes(array)
                described["parameters"] = {"binary_data_size": len(data)}
                parts.append(data)
            else:
                unsaid = unsaid or not scoring.finite(array)
                described["data"] = array.reshape(-1).tolist()
            outputs.append(described)
        if wanted.names is not None and len(outputs) != len(wanted.names):
            raise RefusedError(
                f"the model has not all of the outputs {', '.join(sorted(wanted.names))[:200]}"
            )
        document = {"model_name": self._name, "model_version": self._version, "outputs": outputs}
        if wanted.id is not None:
            document["id"] = wanted.id
        said = json.dumps(document).encode() if unsaid else orjson.dumps(document)
        return b"".join((said, *parts)), len(said) if parts else None

    def _outputs(self, answer: Answer) -> list[tuple[str, Array]]:
        """The tensors of an answer, under the names of the signature where it has as many."""
        known = [field.name for field in self._card.signature.outputs]
        found = []
        for at, (name, given) in enumerate(answer.parts):
            called = known[at] if len(known) == len(answer.parts) else name or f"output-{at}"
            found.append((called, given if isinstance(given, np.ndarray) else _texts(called, given)))
        return found


class Wanted:
    """How the answer to one request is wanted."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.id = document.get("id")
        if self.id is not None and not isinstance(self.id, str):
            raise RefusedError("'id' is no text")
        outputs = document.get("outputs")
        if outputs is not None and not (
            isinstance(outputs, list)
            and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in outputs)
        ):
            raise RefusedError("'outputs' is no list of objects with a name")
        self.names = {one["name"] for one in outputs} if outputs else None
        self._all = _parameters(document).get("binary_data_output") is True
        self._each = {one["name"]: _parameters(one).get("binary_data") for one in outputs or ()}

    def is_binary(self, name: str) -> bool:
        said = self._each.get(name)
        return said if isinstance(said, bool) else self._all


class _Binary:
    """The raw bytes behind the JSON, taken one tensor after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, name: str, size: Any) -> bytes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(self._data) - self._at:
            raise RefusedError(f"input '{name[:70]}' has binary_data_size {size!r:.40}, the body has not")
        self._at += size
        return self._data[self._at - size : self._at]

    def check_end(self) -> None:
        if self._at != len(self._data):
            raise RefusedError(f"{len(self._data) - self._at} bytes of the body belong to no input")


class _Texts:
    """A tensor of texts, flat, with its shape."""

    def __init__(self, flat: list[str], shape: Sequence[int]) -> None:
        self.flat = flat
        self.shape = tuple(shape)


def _document(body: bytes) -> dict[str, Any]:
    try:
        return scoring.document_of(body)
    except RefusedError as error:
        raise RefusedError("the body is no JSON object with 'inputs'") from error


def _parameters(one: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = one.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise RefusedError("'parameters' is no object")
    return parameters or {}


def _tensor(name: str, one: Mapping[str, Any], binary: _Binary) -> "Array | _Texts":
    what = f"input '{name[:70]}'"
    shape, datatype = one.get("shape"), one.get("datatype")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape)
    ):
        raise RefusedError(f"{what} has shape {shape!r:.70} - send a list of sizes")
    if not isinstance(datatype, str) or (datatype != _TEXT and datatype not in _DATATYPES):
        raise RefusedError(f"{what} has datatype {datatype!r:.40} - use {', '.join(_DATATYPES)} or {_TEXT}")
    size = _parameters(one).get("binary_data_size")
    if datatype == _TEXT:
        flat = _raw_texts(what, binary.take(name, size)) if size is not None else _flattened(one.get("data"))
        if not all(isinstance(text, str) for text in flat):
            raise RefusedError(f"{what} has datatype {_TEXT} and holds what is no text")
        _check_count(what, len(flat), shape)
        return _Texts(flat, shape)
    dtype = _DATATYPES[datatype]
    if size is not None:
        data = binary.take(name, size)
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise RefusedError(f"{what} has {len(data)} bytes, its shape and datatype need another number")
        return np.frombuffer(data, dtype).reshape(shape)
    if not isinstance(one.get("data"), list):
        raise RefusedError(f"{what} has no list 'data'")
    array = values.numbers("input", one["data"], Field(name, datatype, dtype, ()))
    _check_count(what, array.size, shape)
    return array.reshape(shape)


def _check_count(what: str, count: int, shape: Sequence[int]) -> None:
    if count != math.prod(shape):
        raise RefusedError(f"{what} has {count} values, its shape {list(shape)} needs {math.prod(shape)}")


def _flattened(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise RefusedError("'data' of an input is no list")
    flat: list[Any] = data
    while any(isinstance(one, list) for one in flat):
        flat = [one for part in flat for one in (part if isinstance(part, list) else [part])]
    return flat


def _raw_texts(what: str, data: bytes) -> list[str]:
    texts, at = [], 0
    while at < len(data):
        end = at + _LENGTH + int.from_bytes(data[at : at + _LENGTH], "little")
        if end > len(data):
            raise RefusedError(f"{what}: its bytes end within a text")
        try:
            texts.append(data[at + _LENGTH : end].decode())
        except UnicodeDecodeError as error:
            raise RefusedError(f"{what} holds a text that is not UTF-8") from error
        at = end
    return texts


def _flat(name: str, given: "Array | _Texts") -> "Array | list[Any]":
    """A column: a tensor of one value for each row."""
    if math.prod(given.shape[1:]) != 1 or not given.shape:
        raise RefusedError(
            f"column '{name[:70]}' has shape {list(given.shape)} - send one value for each row"
        )
    return given.reshape(-1) if isinstance(given, np.ndarray) else given.flat


def _nested(given: "Array | _Texts") -> Any:
    if isinstance(given, np.ndarray):
        return given.tolist()
    return np.array(given.flat, dtype=object).reshape(given.shape).tolist()


def _texts(name: str, given: Sequence[Any]) -> Array:
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ModelFailedError(f"output '{name}' of the model is no tensor - ask at /invocations")
    return np.array(given, dtype=object)


def _bytes(array: Array) -> bytes:
    if array.dtype != object:
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    encoded = [text.encode() for text in array.reshape(-1)]
    return b"".join(len(one).to_bytes(_LENGTH, "little") + one for one in encoded)


def _described(field: Field) -> dict[str, Any]:
    datatype = _TEXT if field.dtype is None else _NAMES[field.dtype]
    return {"name": field.name, "datatype": datatype, "shape": list(field.shape)}
