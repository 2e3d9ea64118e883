"""What the worker answered, checked: user code shares its process, so nothing it says is taken on trust."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flops_worker.tensors import Layout


@dataclass(frozen=True)
class Loaded:
    """The repository was imported and its ModelManager constructed."""

    flavor: str | None
    python_version: str
    contract: str = "flops"


@dataclass(frozen=True)
class FitResult:
    """One local training.

    ``update_fd`` is an open model file with the new parameters. It belongs to the seat and is written again
    by its next fit; ``layout`` says what it holds, and may differ from the model that was given.
    """

    num_examples: int
    metrics: Mapping[str, float]
    layout: Layout
    update_fd: int
    fit_s: float


@dataclass(frozen=True)
class EvaluateResult:
    """One local evaluation; the numbers may be infinite or NaN."""

    loss: float
    accuracy: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportResult:
    """An MLflow model folder was made, or (``flavor`` None) could not be, see ``warnings``."""

    flavor: str | None
    signature: str | None
    """Inputs and outputs as MLflow's JSON text."""
    input_example: bool
    mlflow_version: str | None
    warnings: tuple[str, ...]


def number(answer: Mapping[str, Any], key: str) -> float:
    value = answer.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{key} is no number")
    return float(value)


def count(answer: Mapping[str, Any], key: str) -> int:
    value = answer.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key} is no number of examples")
    return value


def duration(answer: Mapping[str, Any], key: str) -> float:
    value = number(answer, key)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{key} is no duration")
    return value


def metrics(answer: Mapping[str, Any]) -> dict[str, float]:
    value = answer.get("metrics")
    if not isinstance(value, dict):
        raise TypeError("metrics are no object")
    return {name: number(value, name) for name in value}


def text(answer: Mapping[str, Any], key: str) -> str:
    value = answer.get(key)
    if not isinstance(value, str):
        raise TypeError(f"{key} is no text")
    return value


def optional_text(answer: Mapping[str, Any], key: str) -> str | None:
    return None if answer.get(key) is None else text(answer, key)


def texts(answer: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = answer.get(key)
    if not isinstance(value, list):
        raise TypeError(f"{key} is no list")
    return tuple(str(item) for item in value)
