"""``python -m flops_worker.onnx_conversion --fd N --code FOLDER``: write a scikit-learn model as ONNX.

Runs in an environment that has the model's requirements and skl2onnx, started by `flops.serving.onnx`, and
answers one request: ``{"op": "convert", "target", "inputs": [{"name", "dtype", "shape"}], "column",
"row_shape", "dtype"}``; ``dtype`` of an input is numpy's name or ``string``, ``shape`` that of one row. It
writes ``model.onnx`` and ``onnx.json`` (which `flops_worker.predictor` reads) into the target folder. An
answer is ``{"ok": true, "about": versions}`` or ``{"ok": false, "message": why not}``.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from flops_worker import CUT_OFF, channel
from flops_worker.predictor import allow_pickles

_TYPES = {
    "float64": "DoubleTensorType",
    "float32": "FloatTensorType",
    "int64": "Int64TensorType",
    "int32": "Int32TensorType",
    "bool": "BooleanTensorType",
    "string": "StringTensorType",
}
_OUTPUTS = {"predict": 0, "predict_proba": 1}
_MAX_MESSAGE = 500


class NotConvertibleError(Exception):
    """The model has no ONNX form; the text says why."""


def convert(folder: str, request: Dict[str, Any]) -> Dict[str, Any]:
    """Write the model; returns the versions that did it.

    Raises:
        NotConvertibleError: see there. skl2onnx has errors of its own.
    """
    allow_pickles()
    models = importlib.import_module("mlflow.models")
    flavors = models.Model.load(folder).flavors
    if "sklearn" not in flavors:
        others = ", ".join(sorted(set(flavors) - {"python_function"})) or "Python functions"
        raise NotConvertibleError(f"only models of scikit-learn are converted, this is one of {others}")
    function = flavors["python_function"].get("predict_fn", "predict")
    if function not in _OUTPUTS:
        raise NotConvertibleError(f"it answers by {function}, which has no ONNX form")
    try:
        skl2onnx = importlib.import_module("skl2onnx")
    except ImportError as error:
        raise NotConvertibleError(f"skl2onnx cannot be imported ({error})") from error
    model = importlib.import_module("mlflow.sklearn").load_model(folder)
    classifies = importlib.import_module("sklearn.base").is_classifier(model)
    converted = skl2onnx.to_onnx(
        model,
        initial_types=[_type(one) for one in request["inputs"]],
        options={id(model): {"zipmap": False}} if classifies else None,
    )
    outputs = [output.name for output in converted.graph.output]
    if len(outputs) <= _OUTPUTS[function]:
        raise NotConvertibleError(f"its ONNX form has no output for {function}")
    how = {
        "inputs": [
            {"name": one["name"], "node": node.name, "dtype": one["dtype"], "column": request["column"]}
            for one, node in zip(request["inputs"], converted.graph.input)
        ],
        "output": outputs[_OUTPUTS[function]],
        "row_shape": request["row_shape"],
        "dtype": request["dtype"],
    }
    target = Path(request["target"])
    (target / "model.onnx").write_bytes(converted.SerializeToString())
    (target / "onnx.json").write_text(json.dumps(how))
    return {"skl2onnx": skl2onnx.__version__, "opset": max(one.version for one in converted.opset_import)}


def _type(one: Dict[str, Any]) -> Tuple[str, Any]:
    types = importlib.import_module("skl2onnx.common.data_types")
    if one["dtype"] not in _TYPES:
        raise NotConvertibleError(f"input '{one['name']}' is of type {one['dtype']}, which has no ONNX form")
    shape: List[Optional[int]] = [None if size < 0 else size for size in one["shape"]]
    return one["name"], getattr(types, _TYPES[one["dtype"]])([None, *shape])


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="flops_worker.onnx_conversion")
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the channel")
    parser.add_argument("--code", required=True, help="the model's folder")
    options = parser.parse_args(arguments)
    faulthandler.enable()
    os.set_inheritable(options.fd, False)
    sock = socket.socket(fileno=options.fd)
    folder = str(Path(options.code).absolute())
    try:
        request, files = channel.receive(sock)
        channel.close_all(files)
        try:
            answer: Dict[str, Any] = {"ok": True, "about": convert(folder, request)}
        except BaseException as error:
            traceback.print_exc()
            said = (
                str(error) if isinstance(error, NotConvertibleError) else f"{type(error).__name__}: {error}"
            )
            answer = {"ok": False, "message": " ".join(said.split())[:_MAX_MESSAGE]}
        channel.send(sock, answer)
    except channel.ChannelClosed:
        return CUT_OFF
    return 0


if __name__ == "__main__":
    sys.exit(main())
