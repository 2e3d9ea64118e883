"""``python -m flops_worker.predictor --fd N --code FOLDER``: load one model and answer batches.

Runs in the model's own environment (with mlflow-skinny, or onnxruntime), started by `flops.serving`. Requests
come over an inherited Unix socket, one at a time; arrays come through one file of anonymous memory and go
back through another, both given with the first request. Each batch is read into memory of its own, so a model
may keep and change what it was given.

``{"op": "load", "kind"}`` with both files; ``{"op": "predict", "form", "inputs", "params"}`` with checked
arrays; ``{"op": "invoke", "content_type", "nbytes"}`` with a body that MLflow's own code reads. An answer is
``{"ok": true, "form", "parts", "predict_s"}`` or ``{"ok": false, "caller": whose fault, "type", "message"}``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import io
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from flops_worker import CUT_OFF, channel

Answer = Dict[str, Any]
MAX_MESSAGE = 500
CONTENT_TYPES = ("application/json", "text/csv")


class CallerError(Exception):
    """The input is not one that the model takes; the text says why."""


class Slate:
    """A file of anonymous memory that arrays are written to one after the other."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = 0

    def clear(self) -> None:
        self._end = 0

    def array(self, name: str, array: np.ndarray[Any, Any]) -> Answer:
        """Write an array of numbers; returns where it lies."""
        array = np.ascontiguousarray(array)
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        at = self._write(array.reshape(-1).view(np.uint8).data if array.size else memoryview(b""))
        return {"name": name, "dtype": array.dtype.str, "shape": list(array.shape), "at": at}

    def text(self, name: str, text: str) -> Answer:
        """Write JSON text; returns where it lies."""
        data = text.encode()
        return {"name": name, "json": [self._write(memoryview(data)), len(data)]}

    def _write(self, data: memoryview) -> int:
        at = self._end
        while data:
            written = os.pwrite(self._fd, data, self._end)
            data, self._end = data[written:], self._end + written
        return at


def read(fd: int, described: Answer) -> np.ndarray[Any, Any]:
    """A copy of an array that lies in an open file."""
    array: np.ndarray[Any, Any] = np.empty(described["shape"], np.dtype(described["dtype"]))
    if array.nbytes:
        flat = array.reshape(-1).view(np.uint8).data
        if os.preadv(fd, [flat], described["at"]) != array.nbytes:
            raise ValueError("the request is shorter than its header says")
    return array


def allow_pickles() -> None:
    """Let MLflow load pickles: models come from a checked repository's code, some in this form only."""
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")


class MlflowModel:
    """A model loaded by MLflow, in whatever flavor it was saved."""

    def __init__(self, folder: str) -> None:
        allow_pickles()
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # What `mlflow models serve` sets: some flavors behave otherwise in a server.
        os.environ.setdefault("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
        self._mlflow = importlib.import_module("mlflow")
        self._refusal = importlib.import_module("mlflow.exceptions").MlflowException
        self._model = importlib.import_module("mlflow.pyfunc").load_model(folder)
        self._encoder = importlib.import_module("mlflow.utils.proto_json_utils").NumpyEncoder

    def about(self) -> Answer:
        return {"mlflow": str(self._mlflow.__version__)}

    def predict(self, form: str, named: List[Tuple[str, Any]], params: Optional[Answer]) -> Any:
        if form == "tensor":
            data = named[0][1]
        elif form == "tensors":
            data = dict(named)
        else:
            data = importlib.import_module("pandas").DataFrame(dict(named))
        return self._ask(data, params)

    def invoke(self, content_type: str, body: bytes) -> Any:
        """What MLflow's own server makes of a body."""
        server = importlib.import_module("mlflow.pyfunc.scoring_server")
        schema = self._model.metadata.get_input_schema()
        with self._callers_fault():
            if content_type == "text/csv":
                return self._ask(server.parse_csv_input(io.StringIO(body.decode()), schema=schema), None)
            parsed = getattr(server, "_parse_json_data", None)
            if parsed is not None:
                result = parsed(body, self._model.metadata, schema)
                data, params = result.data, result.params
            else:  # MLflow before 2.11
                document = json.loads(body)
                params = document.pop("params", None)
                data = server.infer_and_parse_data(document, schema)
        return self._ask(data, params)

    def jsonable(self, value: Any) -> str:
        return json.dumps(value, cls=self._encoder)

    def _ask(self, data: Any, params: Optional[Answer]) -> Any:
        with self._callers_fault():
            return self._model.predict(data) if params is None else self._model.predict(data, params=params)

    @contextlib.contextmanager
    def _callers_fault(self) -> Any:
        """MLflow's own refusals (schema, parameters) are the caller's fault; all else is the model's."""
        try:
            yield
        except self._refusal as error:
            if error.get_http_status_code() >= 500:
                raise
            raise CallerError(_short(str(error.message))) from error
        except UnicodeDecodeError as error:
            raise CallerError(f"the body is not UTF-8: {error}") from error


class OnnxModel:
    """A converted model, answered by onnxruntime; `onnx_conversion` wrote the folder, and how it is asked."""

    def __init__(self, folder: str) -> None:
        self._runtime = importlib.import_module("onnxruntime")
        how = json.loads((Path(folder) / "onnx.json").read_text())
        self._inputs: List[Answer] = how["inputs"]
        self._output: str = how["output"]
        self._shape: Optional[List[int]] = how["row_shape"]
        self._dtype: Optional[str] = how["dtype"]
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
        options.inter_op_num_threads = 1
        self._session = self._runtime.InferenceSession(
            str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def about(self) -> Answer:
        return {"onnxruntime": str(self._runtime.__version__)}

    def predict(self, form: str, named: List[Tuple[str, Any]], params: Optional[Answer]) -> Any:
        if params:
            raise CallerError("this model takes no params - leave them out")
        given = dict(named)
        feed = {}
        for one in self._inputs:
            array = np.asarray(named[0][1] if form == "tensor" else given[one["name"]])
            array = array.astype(object if one["dtype"] == "string" else one["dtype"], copy=False)
            feed[one["node"]] = array.reshape(-1, 1) if one["column"] else array
        answer = np.asarray(self._session.run([self._output], feed)[0])
        if self._dtype is not None:
            answer = answer.astype(self._dtype, copy=False)
        return answer if self._shape is None else answer.reshape([len(answer), *self._shape])

    def invoke(self, content_type: str, body: bytes) -> Any:
        raise CallerError("a converted model takes arrays only - send JSON that fits the signature")

    def jsonable(self, value: Any) -> str:
        return json.dumps(value)


MODELS: Dict[str, Callable[[str], Any]] = {"mlflow": MlflowModel, "onnx": OnnxModel}


class Predictions:
    """Writes what a model returned: numbers as arrays, the rest as JSON, as MLflow's server would say it."""

    def __init__(self, model: Any, slate: Slate) -> None:
        self._model = model
        self._slate = slate

    def write(self, result: Any) -> Answer:
        self._slate.clear()
        if isinstance(result, np.ndarray) or (np.isscalar(result) and not isinstance(result, (str, bytes))):
            array = np.asarray(result)
            if array.dtype.kind in "fiub" and array.dtype.itemsize <= 8:
                return {"form": "array", "parts": [self._slate.array("", array)]}
            return self._rows(array.tolist())
        pandas = sys.modules.get("pandas")
        if pandas is not None and isinstance(result, pandas.Series):
            result = pandas.DataFrame(result)
        if pandas is not None and isinstance(result, pandas.DataFrame):
            columns = [self._column(str(name), result.iloc[:, at]) for at, name in enumerate(result.columns)]
            return {"form": "records", "parts": columns}
        if (
            isinstance(result, dict)
            and result
            and all(isinstance(one, np.ndarray) for one in result.values())
        ):
            parts = [self._column(str(name), value) for name, value in result.items()]
            return {"form": "dict", "parts": parts}
        return self._rows(result)

    def _column(self, name: str, column: Any) -> Answer:
        dtype = getattr(column, "dtype", None)
        if isinstance(dtype, np.dtype) and dtype.kind in "fiub" and dtype.itemsize <= 8:
            return self._slate.array(name, np.asarray(column))
        return self._slate.text(name, self._model.jsonable(column.tolist()))

    def _rows(self, value: Any) -> Answer:
        form = "rows" if isinstance(value, list) else "value"
        return {"form": form, "parts": [self._slate.text("", self._model.jsonable(value))]}


class Predictor:
    """Serves one model over `sock` until the other side closes it."""

    def __init__(self, sock: socket.socket, folder: str) -> None:
        self._sock = sock
        self._folder = folder
        self._model: Any = None
        self._input = -1
        self._predictions: Any = None

    def serve(self) -> None:
        while True:
            try:
                request, files = channel.receive(self._sock)
                channel.send(self._sock, self._answer(request, files))
            except channel.ChannelClosed:
                return

    def _answer(self, request: Answer, files: List[int]) -> Answer:
        try:
            if request["op"] == "load":
                self._input, output = files
                self._model = MODELS[request["kind"]](self._folder)
                self._predictions = Predictions(self._model, Slate(output))
                return {"ok": True, "about": self._model.about()}
            started = time.perf_counter()
            if request["op"] == "invoke":
                body = os.pread(self._input, request["nbytes"], 0)
                result = self._model.invoke(request["content_type"], body)
            else:
                named = [(one["name"], self._read(one)) for one in request["inputs"]]
                result = self._model.predict(request["form"], named, request["params"])
            predict_s = time.perf_counter() - started
            return {"ok": True, "predict_s": predict_s, **self._predictions.write(result)}
        except BaseException as error:
            caller = isinstance(error, CallerError)
            if not caller:
                with contextlib.suppress(BaseException):
                    traceback.print_exc()
            return {
                "ok": False,
                "caller": caller,
                "type": type(error).__name__,
                "message": _short(str(error)),
            }

    def _read(self, one: Answer) -> Any:
        if "json" in one:
            at, nbytes = one["json"]
            return json.loads(os.pread(self._input, nbytes, at))
        return read(self._input, one)


def _short(text: str) -> str:
    """The part of a long message that says something: MLflow quotes the whole input before it."""
    _, found, reason = text.rpartition("Error: ")
    return (reason if found else text)[:MAX_MESSAGE]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="flops_worker.predictor")
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the channel")
    parser.add_argument("--code", required=True, help="the model's folder")
    options = parser.parse_args(arguments)
    faulthandler.enable()
    os.set_inheritable(options.fd, False)
    Predictor(socket.socket(fileno=options.fd), str(Path(options.code).absolute())).serve()
    return CUT_OFF


if __name__ == "__main__":
    sys.exit(main())
