"""Saving a model in its MLflow flavor, in the user's environment (with mlflow added) and without any data."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np

from flops_worker.failures import ContractError

_MODULES = {
    "sklearn": ("mlflow.sklearn",),
    "pytorch": ("mlflow.pytorch",),
    "xgboost": ("mlflow.xgboost",),
    # Keras below 3 is saved by mlflow.tensorflow, and so is any in MLflow releases without mlflow.keras.
    "keras": ("mlflow.keras", "mlflow.tensorflow"),
    "tensorflow": ("mlflow.tensorflow",),
}
_PICKLES = {"sklearn": "cloudpickle", "pytorch": "pickle"}


def save(
    model: Any,
    *,
    example: Optional[Callable[[], Any]],
    directory: str,
    flavor: Optional[str],
    name: Optional[str],
    requirements: List[str],
    code: str,
) -> Dict[str, Any]:
    """Save `model` as an MLflow model folder.

    Args:
        example: the ModelManager's own ``get_input_example``, if it has one; else an example is made up.
        directory: the folder to make; must not exist or be empty.
        flavor: ``sklearn | pytorch | keras | tensorflow | xgboost``; anything else saves nothing.
        name: kept in the model's metadata.
        requirements: PEP 508, stored with the model (inferring them costs seconds and a network).
        code: the checkout, stored with models whose classes are defined in it.
    Returns:
        ``flavor`` (None: nothing was saved), ``signature`` (JSON text of inputs and outputs, or None),
        ``input_example`` (whether one is stored), ``mlflow_version``, ``warnings``.
    """
    warnings: List[str] = []
    nothing = {
        "flavor": None,
        "signature": None,
        "input_example": False,
        "mlflow_version": None,
        "warnings": warnings,
    }
    if flavor not in _MODULES:
        warnings.append(
            "the model is of no library that MLflow has a flavor for - only its parameters are kept"
        )
        return nothing
    mlflow = importlib.import_module("mlflow")
    module = _flavor_module(flavor, model)
    if flavor == "pytorch":
        model.eval()  # before tracing: dropout and batch statistics belong to training
    inputs = _example(model, example, flavor, warnings)
    signature = None
    if inputs is not None:
        outputs = _predict(model, inputs, flavor, warnings)
        signature = importlib.import_module("mlflow.models").infer_signature(inputs, outputs)
    arguments: Dict[str, Any] = {
        "signature": signature,
        "input_example": inputs,
        "pip_requirements": requirements,
        "metadata": {"name": name} if name else None,
    }
    with tempfile.TemporaryDirectory() as folder:
        if _defined_in(code, model):
            arguments["code_paths"] = _code_of(code, folder)
        known = inspect.signature(module.save_model).parameters
        # An older MLflow lacks some of these; what it does not know, it does not need.
        arguments = {name: value for name, value in arguments.items() if name in known}
        if "serialization_format" in known and flavor in _PICKLES:
            _save_in_some_format(module, model, directory, _PICKLES[flavor], arguments, warnings)
        else:
            module.save_model(model, directory, **arguments)
    return {
        "flavor": flavor,
        "signature": None if signature is None else _text(signature.to_dict()),
        "input_example": inputs is not None,
        "mlflow_version": mlflow.__version__,
        "warnings": warnings,
    }


def _save_in_some_format(
    module: Any, model: Any, directory: str, other: str, arguments: Dict[str, Any], warnings: List[str]
) -> None:
    """Save in MLflow's choice of format (free of code if possible), else in `other`, which takes any."""
    try:
        module.save_model(model, directory, **arguments)
    except Exception as error:
        warnings.append(f"saved as {other}, because MLflow's default format failed ({error})"[:500])
        shutil.rmtree(directory, ignore_errors=True)
        module.save_model(model, directory, serialization_format=other, **arguments)


def _flavor_module(flavor: str, model: Any) -> Any:
    names = _MODULES[flavor]
    if flavor == "keras":
        keras = sys.modules.get("keras")
        if not str(getattr(keras, "__version__", "0")).startswith("3"):
            names = names[1:]
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ContractError(f"this MLflow cannot save {flavor} models - use a newer one")


def _example(model: Any, own: Optional[Callable[[], Any]], flavor: str, warnings: List[str]) -> Optional[Any]:
    if callable(own):
        return own()
    if flavor in ("sklearn", "xgboost"):
        features = getattr(model, "n_features_in_", None)
        if features is None:
            coefficients = np.shape(getattr(model, "coef_", ()))
            features = coefficients[-1] if coefficients else None
        if features is not None:
            return np.zeros((1, int(features)), dtype=np.float64)
    elif flavor in ("keras", "tensorflow"):
        shape = getattr(model, "input_shape", None)
        if isinstance(shape, tuple) and all(size is None or isinstance(size, int) for size in shape):
            return np.zeros([size or 1 for size in shape], dtype=np.float32)
    elif flavor == "pytorch":
        # A first layer that is linear tells the whole shape; a convolution leaves height and width open.
        layers = [layer for layer in model.modules() if not list(layer.children())]
        features = getattr(layers[0], "in_features", None) if layers else None
        if isinstance(features, int):
            # Two rows: tracing takes a size of one for a constant.
            return np.zeros((2, features), dtype=np.float32)
    warnings.append(
        "no input example can be made up for this model - for a signature define"
        " ModelManager.get_input_example()"
    )
    return None


def _predict(model: Any, inputs: Any, flavor: str, warnings: List[str]) -> Optional[Any]:
    try:
        if flavor == "pytorch":
            torch = importlib.import_module("torch")
            with torch.no_grad():
                outputs = model(torch.as_tensor(np.asarray(inputs)))
            return outputs.detach().cpu().numpy()
        return np.asarray(model.predict(inputs))
    except Exception as error:
        warnings.append(
            f"the model cannot predict from its parameters alone ({type(error).__name__}: {error})"
            " - set everything that predict needs in set_model_parameters(); the signature has inputs only"
        )
        return None


def _defined_in(code: str, model: Any) -> bool:
    """Whether a class of the model, or of a layer in it, comes from the checkout."""
    parts = list(model.modules()) if hasattr(model, "modules") and callable(model.modules) else [model]
    for part in parts:
        for kind in type(part).__mro__:
            place = getattr(sys.modules.get(kind.__module__), "__file__", None)
            if place and Path(code) in Path(place).absolute().parents:
                return True
    return False


def _code_of(code: str, folder: str) -> List[str]:
    """What must travel with the model to load it: the checkout's modules, and what they import of FLOps."""
    paths = [
        str(path)
        for path in sorted(Path(code).iterdir())
        if not path.name.startswith(".")
        and not path.is_symlink()
        and ((path.suffix == ".py" and path.is_file()) or (path / "__init__.py").is_file())
    ]
    # A copy: the original is shared and may hold compiled files of several Pythons.
    utils = shutil.copytree(
        str(Path(__file__).absolute().parent.parent / "flops_utils"),
        str(Path(folder) / "flops_utils"),
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return [*paths, utils]


def _text(value: Any) -> str:

    return json.dumps(value, sort_keys=True, default=str)
