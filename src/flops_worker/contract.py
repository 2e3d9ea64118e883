"""The contract of a FLOps repository: where its ModelManager is, and what its methods must return."""

from __future__ import annotations

import importlib
import numbers
import operator
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from flops_worker.failures import ContractError

METHODS = (
    "set_model_data",
    "get_model",
    "get_model_parameters",
    "set_model_parameters",
    "fit_model",
    "evaluate_model",
)
Metrics = Dict[str, float]


def import_manager(code: str) -> Any:
    """Import ``model_manager`` from the checkout and return its class ModelManager.

    Raises:
        ContractError: file or class are missing. Anything that the user's module raises passes.
    """
    if not Path(code, "model_manager.py").is_file() and not Path(code, "model_manager").is_dir():
        raise ContractError(
            "model_manager.py is missing at the root of the repository - add it, with a class ModelManager"
        )
    module = importlib.import_module("model_manager")
    manager = getattr(module, "ModelManager", None)
    if not isinstance(manager, type):
        raise ContractError(
            "model_manager.py has no class ModelManager - define it there, a child of"
            " flops_utils.ml_repo_templates.ModelManagerTemplate"
        )
    missing = [name for name in METHODS if not callable(getattr(manager, name, None))]
    if missing:
        raise ContractError(f"ModelManager lacks {', '.join(missing)} - add what is missing")
    return manager


def fit_result(value: Any) -> Tuple[int, Metrics]:
    """What fit_model returned: training examples, or a pair of them and named metrics."""
    count, metrics = value if _is_pair(value) else (value, {})
    return (
        _count(count, "fit_model returned {} instead of the number of training examples (an int above 0)"),
        _metrics(metrics, "fit_model"),
    )


def evaluation(value: Any) -> Tuple[float, float, int, Metrics]:
    """What evaluate_model returned: (loss, accuracy, examples), or these and named metrics."""
    if not isinstance(value, (tuple, list)) or len(value) not in (3, 4):
        raise ContractError(
            f"evaluate_model returned {_describe(value)} - return (loss, accuracy, number of examples)"
        )
    examples = "evaluate_model returned {} as its third value - return the number of examples, an int above 0"
    return (
        _real(value[0], "loss"),
        _real(value[1], "accuracy"),
        _count(value[2], examples),
        _metrics(value[3] if len(value) == 4 else {}, "evaluate_model"),
    )


def parameters(value: Any) -> List[np.ndarray[Any, Any]]:
    """What get_model_parameters returned, as numpy arrays.

    Raises:
        ContractError: not a list of arrays, or arrays without a place in a model file.
    """
    if not isinstance(value, (list, tuple)):
        hint = ", such as [array]" if isinstance(value, np.ndarray) else ""
        raise ContractError(
            f"get_model_parameters returned {_describe(value)} - return a list of numpy arrays{hint}"
        )
    if not value:
        raise ContractError("get_model_parameters returned an empty list - return at least one numpy array")
    return [_array(position, item) for position, item in enumerate(value)]


def _array(position: int, item: Any) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = item
    if not isinstance(item, np.ndarray):
        if not hasattr(item, "__array__"):
            raise ContractError(
                f"get_model_parameters returned {_describe(item)} at position {position} - "
                "make it a numpy array, such as numpy.asarray(it)"
            )
        try:
            # A tensor of PyTorch gives its values away only detached, and from the processor's memory.
            array = np.asarray(item.detach().cpu() if hasattr(item, "detach") else item)
        except Exception as error:
            raise ContractError(
                f"get_model_parameters returned {_describe(item)} at position {position}, which cannot become"
                f" a numpy array ({error}) - return plain arrays, such as tensor.detach().cpu().numpy()"
            ) from error
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise ContractError(
            f"get_model_parameters returned an array of dtype {array.dtype} at position {position} - "
            "parameters must be numbers of at most 64 bits"
        )
    return array


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict)


def _count(value: Any, text: str) -> int:
    try:
        count = -1 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        count = -1
    if not 0 < count < 1 << 62:
        raise ContractError(text.format(_describe(value)))
    return count


def _real(value: Any, name: str) -> float:
    real = isinstance(value, numbers.Real) or (
        hasattr(value, "__array__") and not isinstance(value, np.bool_)
    )
    if real and not isinstance(value, (bool, np.bool_)):
        try:
            # Arrays of one number, 0-d or not, count; PyTorch's tensors convert themselves.
            return float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
    raise ContractError(f"evaluate_model returned {_describe(value)} as {name} - return a number")


def _metrics(value: Any, where: str) -> Metrics:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ContractError(
            f"{where} returned {_describe(value)} as metrics - return a dict of names and numbers"
        )
    metrics = {}
    for name, number in value.items():
        try:
            metrics[name] = float(number)
        except (TypeError, ValueError) as error:
            raise ContractError(
                f"{where} returned {_describe(number)} as metric '{name[:40]}' - return a number"
            ) from error
    return metrics


def _describe(value: Any) -> str:
    """A value in an error: short, and never a wall of numbers (they may be data)."""
    if value is None or isinstance(value, (bool, int, float, np.bool_)):
        return repr(value)
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    if isinstance(shape, tuple) and shape != ():
        return f"{kind} of shape {tuple(shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {kind} of {len(value)}"
    return f"a value of type {kind}"
