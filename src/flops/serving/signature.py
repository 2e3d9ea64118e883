"""A model's signature, read from its MLmodel file: what goes in, what comes out, which parameters it has."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flops.core.errors import InvalidInputError

COLUMN_DTYPES: Mapping[str, np.dtype[Any] | None] = {
    "boolean": np.dtype(np.bool_),
    "integer": np.dtype(np.int32),
    "long": np.dtype(np.int64),
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "string": None,
}
"""MLflow's column types that are checked here; None: text."""


@dataclass(frozen=True)
class Field:
    """One tensor or column."""

    name: str
    kind: str
    """Its type in the signature's own words, for errors."""
    dtype: np.dtype[Any] | None
    """None: text, in columns only."""
    shape: tuple[int, ...]
    """-1: any size. Of a column ``(-1,)``."""
    required: bool = True


@dataclass(frozen=True)
class Signature:
    """What the model takes.

    Attributes:
        form: how the model wants it: ``tensor`` one array, ``tensors`` arrays by name, ``frame`` a data
            frame, ``open`` anything: there is no signature, or one with types that are MLflow's to check.
        batches: rows of several requests may be put together: every input has a first axis of any size.
    """

    form: str
    inputs: tuple[Field, ...] = ()
    outputs: tuple[Field, ...] = ()
    params: tuple[str, ...] = ()
    batches: bool = False


@dataclass(frozen=True)
class ModelCard:
    """What the server has to know of a model's folder."""

    signature: Signature
    platform: str
    mlflow_version: str
    example: Mapping[str, Any] | None
    """The body of a request that MLflow made of the model's input example."""


def read_model(folder: Path) -> ModelCard:
    """Read MLmodel and the example beside it.

    Raises:
        InvalidInputError: the folder holds no model in MLflow's format.
    """
    try:
        described = yaml.safe_load((folder / "MLmodel").read_text())
        flavors = described["flavors"]
        signature = described.get("signature") or {}
        parsed = {key: json.loads(value) for key, value in signature.items() if isinstance(value, str)}
        card = ModelCard(
            signature=signature_of(parsed),
            platform=next(
                (f"mlflow_{name}" for name in sorted(flavors) if name != "python_function"), "mlflow"
            ),
            mlflow_version=str(described.get("mlflow_version") or ""),
            example=_example(folder),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InvalidInputError(
            f"the folder '{folder}' holds no model in MLflow's format ({error}) - export the model again"
        ) from error
    return card


def signature_of(parsed: Mapping[str, Any]) -> Signature:
    """The signature of MLflow's three lists: inputs, outputs, params."""
    params = tuple(str(entry["name"]) for entry in parsed.get("params") or ())
    inputs = _fields(parsed.get("inputs") or (), "input")
    outputs = _fields(parsed.get("outputs") or (), "output") or ()
    if not inputs:
        return Signature("open", params=params)
    tensors = "tensor-spec" in parsed["inputs"][0]
    named = all("name" in entry for entry in parsed["inputs"])
    if not tensors and not named:
        return Signature("open", params=params)  # columns by position: MLflow's to check
    if tensors:
        batches = all(field.shape[:1] == (-1,) for field in inputs)
        batches = batches and all(field.shape[:1] == (-1,) for field in outputs)
        return Signature("tensors" if named else "tensor", inputs, outputs, params, batches)
    return Signature("frame", inputs, outputs, params, batches=True)


def _fields(entries: Sequence[Mapping[str, Any]], what: str) -> tuple[Field, ...] | None:
    """The fields of one list; None where a type is not checked here. Those without a name are numbered."""
    fields = []
    for at, entry in enumerate(entries):
        spec = entry.get("tensor-spec")
        name = str(entry.get("name", f"{what}-{at}"))
        if spec is None:
            kind = entry.get("type")
            if not isinstance(kind, str) or kind not in COLUMN_DTYPES:
                return None
            required = bool(entry.get("required", True))
            fields.append(Field(name, kind, COLUMN_DTYPES[kind], (-1,), required))
            continue
        dtype = np.dtype(spec["dtype"])
        if dtype.kind not in "fiub" or dtype.itemsize > np.dtype(np.float64).itemsize:
            return None
        fields.append(Field(name, dtype.name, dtype, tuple(int(size) for size in spec["shape"])))
    return tuple(fields)


def _example(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "serving_input_example.json"
    if not path.is_file():
        return None
    parsed = json.loads(path.read_text())
    return parsed if isinstance(parsed, dict) else None
