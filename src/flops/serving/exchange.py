"""The two files of anonymous memory between the server and one predictor: questions in, answers out.

The predictor may do anything to both, so they are read and written by system calls, never mapped: what it
cuts off is an error here, not a signal. What it says about them is checked.
"""

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from flops.serving.question import Answer, Array, Part, Question

FORMS = frozenset(("array", "records", "dict", "rows", "value"))
MAX_ANSWER_BYTES = 256 << 20
KEPT_BYTES = 64 << 20
"""Of a large request, as much memory is kept for the next one."""
_MAX_BUFFERS = 512
_MAX_DIMENSIONS = 32


class BrokenAnswerError(Exception):
    """What the predictor said makes no sense."""


class Exchange:
    """Owns both files."""

    def __init__(self) -> None:
        self.questions = os.memfd_create("flops-questions")
        try:
            self.answers = os.memfd_create("flops-answers")
        except BaseException:
            os.close(self.questions)
            raise

    def close(self) -> None:
        os.close(self.questions)
        os.close(self.answers)

    def write(self, batch: Sequence[Question]) -> dict[str, Any]:
        """Lay down questions of one key as one; returns the message that says where they lie.

        Raises:
            OSError: there is no memory for them.
        """
        first = batch[0]
        if first.form == "body":
            self._write([memoryview(first.body)])
            return {"op": "invoke", "content_type": first.content_type, "nbytes": len(first.body)}
        buffers: list[memoryview] = []
        inputs: list[dict[str, Any]] = []
        end = 0
        for at, (name, given) in enumerate(first.parts):
            parts = [question.parts[at][1] for question in batch]
            if isinstance(given, np.ndarray):
                arrays = [np.ascontiguousarray(part) for part in parts]
                buffers.extend(array.reshape(-1).view(np.uint8).data for array in arrays if array.size)
                rows = sum(len(array) for array in arrays) if given.ndim else 0
                shape = [rows, *given.shape[1:]] if given.ndim else []
                inputs.append({"name": name, "dtype": given.dtype.str, "shape": shape, "at": end})
                end += sum(array.nbytes for array in arrays)
            else:
                texts = json.dumps([text for part in parts for text in part]).encode()
                buffers.append(memoryview(texts))
                inputs.append({"name": name, "json": [end, len(texts)]})
                end += len(texts)
        self._write(buffers)
        return {"op": "predict", "form": first.form, "inputs": inputs, "params": first.params}

    def read(self, message: dict[str, Any]) -> Answer:
        """The answer that a message describes.

        Raises:
            BrokenAnswerError: it is not there, or no answer.
        """
        try:
            form, described = message["form"], message["parts"]
            if form not in FORMS or not isinstance(described, list):
                raise BrokenAnswerError("its form is unknown")
            if form not in ("records", "dict") and len(described) != 1:
                raise BrokenAnswerError("its parts do not fit its form")
            room = MAX_ANSWER_BYTES
            parts: list[Part] = []
            for one in described:
                values, nbytes = self._part(one, room)
                parts.append((str(one["name"]), values))
                room -= nbytes
        except (KeyError, TypeError, ValueError, OverflowError, OSError, RecursionError) as error:
            raise BrokenAnswerError(f"{type(error).__name__}: {error}") from error
        if form in ("records", "dict", "rows") and not all(map(_has_rows, parts)):
            raise BrokenAnswerError("its parts have no rows")
        if form == "records" and len({len(values) for _, values in parts}) > 1:
            raise BrokenAnswerError("its columns have different lengths")
        return Answer(form, tuple(parts))

    def trim(self) -> None:
        """Give back the memory of an unusually large batch."""
        for fd in (self.questions, self.answers):
            if os.fstat(fd).st_size > KEPT_BYTES:
                os.ftruncate(fd, KEPT_BYTES)

    def _part(self, one: dict[str, Any], room: int) -> tuple[Array | Any, int]:
        if "json" in one:
            at, nbytes = one["json"]
            text = bytearray(_within(nbytes, room))
            self._read(text, at)
            return json.loads(text), nbytes
        shape = one["shape"]
        dtype = np.dtype(str(one["dtype"]))
        if dtype.kind not in "fiub" or dtype.itemsize > np.dtype(np.float64).itemsize:
            raise BrokenAnswerError(f"it holds values of type {dtype}")
        if len(shape) > _MAX_DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
            raise BrokenAnswerError("a shape is none")
        nbytes = _within(math.prod(shape) * dtype.itemsize, room)
        array: Array = np.empty(shape, dtype)
        if nbytes:
            self._read(array.reshape(-1).view(np.uint8).data, one["at"])
        return array, nbytes

    def _read(self, target: Any, at: int) -> None:
        if os.preadv(self.answers, [target], at) != len(target):
            raise BrokenAnswerError("it is shorter than it says")

    def _write(self, buffers: list[memoryview]) -> None:
        end = 0
        for start in range(0, len(buffers), _MAX_BUFFERS):
            part = buffers[start : start + _MAX_BUFFERS]
            written = os.pwritev(self.questions, part, end)
            if written != sum(map(len, part)):
                raise OSError("the request does not fit into memory")
            end += written


def _has_rows(part: Part) -> bool:
    values = part[1]
    return values.ndim > 0 if isinstance(values, np.ndarray) else isinstance(values, list)


def _within(nbytes: Any, room: int) -> int:
    if type(nbytes) is not int or not 0 <= nbytes <= room:
        raise BrokenAnswerError(f"it is larger than {MAX_ANSWER_BYTES} bytes")
    return nbytes
