"""The ONNX path: a model converted, and compared with the original before it may serve.

The conversion runs the model's own code, so it runs in the model's environment (with
`CONVERSION_REQUIREMENTS` added), in a process without network; then original and converted model answer the
same questions in the same kind of predictor that serves, and only what agrees is kept.
"""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from flops.core.errors import FailedError, FlopsError, InvalidInputError
from flops.guest.process import Process
from flops.guest.room import Room
from flops.serving import scoring
from flops.serving.predictor import (
    Predictor,
    PredictorDiedError,
    PredictorHangsError,
    PredictorSettings,
)
from flops.serving.question import Answer, Array, Question
from flops.serving.scoring import Scoring
from flops.serving.signature import ModelCard, read_model
from flops_worker import channel

MODULE = "flops_worker.onnx_conversion"
CONVERSION_REQUIREMENTS = ("skl2onnx>=1.17", "onnxruntime>=1.17")
"""What the environment of a conversion needs beside the model's own requirements."""
SERVING_REQUIREMENTS = ("numpy", "onnxruntime>=1.17")
"""All that the environment of a converted model's predictor needs."""
_MADE_UP = 64
_MAX_ROWS = 10_000
_SEED = 1


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A converted model that may serve: `ServingConfig` with kind ``onnx`` and this folder."""

    folder: Path
    rows: int
    """Rows on which both models agreed."""
    largest_difference: float
    """Between their answers; 0 where they are labels."""
    skl2onnx: str
    opset: int


class NotConvertedError(FailedError):
    """The model has no ONNX form, or its ONNX form answers otherwise; the original can be served."""

    code = "not-converted"


def convert(
    model: Path,
    target: Path,
    *,
    python: Path,
    serving_python: Path | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    timeout_s: float = 300.0,
    isolate: bool = True,
) -> Conversion:
    """Convert a model, and compare it with the original.

    Compared are the answers to the model's own input example, and to made-up rows like it where its inputs
    are fractions: labels must be equal, numbers within ``atol + rtol * |original|``.

    Args:
        model: folder in MLflow's format, with a signature and an input example.
        target: the folder to make; must not exist.
        python: interpreter that has the model's requirements and `CONVERSION_REQUIREMENTS`.
        serving_python: the one that will serve it (`SERVING_REQUIREMENTS`); None: the same.
        timeout_s: for each of converting, loading and answering.
        isolate: cut the network of all three processes where the platform allows it.
    Raises:
        InvalidInputError: the folder holds no model, or one without signature or example.
        NotConvertedError: see there; nothing is left behind.
        NotFoundError: an interpreter is missing.
    """
    card = read_model(model)
    questions = _questions(model, card)
    with _folder_for(target) as folder:
        about = _write(model, folder, card, python, timeout_s, isolate)
        for name in ("MLmodel", "serving_input_example.json"):
            shutil.copyfile(model / name, folder / name)
        original, converted = (
            asyncio.run(_answers(one, kind, interpreter, questions, timeout_s, isolate))
            for one, kind, interpreter in (
                (model, "mlflow", python),
                (folder, "onnx", serving_python or python),
            )
        )
        rows, difference = _agreement(questions, original, converted, rtol, atol)
        folder.rename(target)
    return Conversion(
        folder=target,
        rows=rows,
        largest_difference=difference,
        skl2onnx=str(about.get("skl2onnx")),
        opset=int(about.get("opset") or 0),
    )


def _questions(model: Path, card: ModelCard) -> list[Question]:
    """The example, and rows like it."""
    signature = card.signature
    if signature.form == "open" or card.example is None:
        missing = "input example" if signature.form != "open" else "signature that names all types"
        raise InvalidInputError(
            f"the model in '{model}' has no {missing}, its ONNX form cannot be checked - export it with one"
        )
    reader = Scoring(signature, max_rows=_MAX_ROWS, ignore_extra_columns=False)
    example = reader.question(orjson.dumps(card.example), scoring.JSON)
    random = np.random.default_rng(_SEED)
    made_up = {
        name: _like(given, random) if isinstance(given, np.ndarray) else (given * _MADE_UP)[:_MADE_UP]
        for name, given in example.parts
    }
    if all(given is None for given in made_up.values()) or not signature.batches:
        return [example]
    repeated = {
        name: np.resize(given, (_MADE_UP, *given.shape[1:])) if made_up[name] is None else made_up[name]
        for name, given in example.parts
        if isinstance(given, np.ndarray)
    }
    return [example, reader.of_columns({**made_up, **repeated}, None)]


def _like(given: Array, random: np.random.Generator) -> Array | None:
    """Rows of the same scale as those given; None where they are no fractions."""
    if given.dtype.kind != "f" or not given.size:
        return None
    scale = max(1.0, float(np.nanmax(np.abs(given))))
    return (random.random((_MADE_UP, *given.shape[1:])) * scale).astype(given.dtype)


@contextlib.contextmanager
def _folder_for(target: Path) -> Iterator[Path]:
    """A folder beside the target, gone unless it was renamed."""
    if target.exists():
        raise InvalidInputError(f"'{target}' exists already - choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    model: Path, folder: Path, card: ModelCard, python: Path, timeout_s: float, isolate: bool
) -> dict[str, Any]:
    """Let the model's environment write the ONNX file."""
    signature = card.signature
    output = signature.outputs[0] if len(signature.outputs) == 1 else None
    frame = signature.form == "frame"
    request = {
        "op": "convert",
        "target": str(folder.absolute()),
        "inputs": [
            {
                "name": field.name,
                "dtype": "string" if field.dtype is None else field.dtype.name,
                "shape": [1] if frame else list(field.shape[1:]),
            }
            for field in signature.inputs
        ],
        "column": frame,
        "row_shape": list(output.shape[1:]) if output is not None and -1 not in output.shape[1:] else None,
        "dtype": output.dtype.name if output is not None and output.dtype is not None else None,
    }
    process = Process(
        Room(python, model), log=None, isolate=isolate, threads=1, memory_mb=None, module=MODULE
    )
    try:
        process.channel.settimeout(timeout_s)
        channel.send(process.channel, request)
        answer, files = channel.receive(process.channel)
        channel.close_all(files)
    except TimeoutError as error:
        raise NotConvertedError(
            f"the model in '{model}' was not converted within {timeout_s:g} s - serve the original"
        ) from error
    except channel.ChannelClosed as error:
        process.wait(1.0)
        process.end()
        last = " ".join(process.last_lines()[-1:])[:500]
        raise NotConvertedError(
            f"the process that converts the model in '{model}' ended: {last} - serve the original"
        ) from error
    finally:
        process.end()
        process.channel.close()
    if answer.get("ok") is not True:
        why = str(answer.get("message"))[:500]
        raise NotConvertedError(f"the model in '{model}' has no ONNX form: {why} - serve the original")
    about = answer.get("about")
    return about if isinstance(about, dict) else {}


async def _answers(
    folder: Path, kind: str, python: Path, questions: list[Question], timeout_s: float, isolate: bool
) -> list[Answer | None]:
    """A model's answers, in order; None where it fails on a question that was made up."""
    settings = PredictorSettings(
        model=folder,
        python=python,
        kind=kind,
        threads=1,
        memory_mb=None,
        isolate=isolate,
        log=None,
        load_timeout_s=timeout_s,
    )
    answers: list[Answer | None] = []
    try:
        predictor = await Predictor.start(settings)
        try:
            for question in questions:
                try:
                    answers.append((await predictor.ask([question], timeout_s))[0])
                except FlopsError:
                    if not answers:
                        raise
                    answers.append(None)
        finally:
            await predictor.close()
    except (FlopsError, PredictorDiedError, PredictorHangsError) as error:
        what = "the model" if kind == "mlflow" else "the ONNX form of the model"
        raise NotConvertedError(
            f"{what} in '{folder}' did not answer the input example: {error} - serve the original"
        ) from error
    return answers


def _agreement(
    questions: list[Question],
    original: list[Answer | None],
    converted: list[Answer | None],
    rtol: float,
    atol: float,
) -> tuple[int, float]:
    """Rows and largest difference; NotConvertedError where the answers differ."""
    rows, largest = 0, 0.0
    for question, one, other in zip(questions, original, converted, strict=True):
        if one is None:
            continue
        mine, theirs = _array(one), _array(other)
        why = ""
        if mine is None or theirs is None:
            why = "one of them is no array"
        elif mine.shape != theirs.shape or mine.dtype.kind != theirs.dtype.kind:
            why = f"{mine.dtype} of shape {mine.shape}, and {theirs.dtype} of shape {theirs.shape}"
        elif mine.dtype.kind != "f":
            wrong = int((mine != theirs).sum())
            why = f"{wrong} of {mine.size} values differ" if wrong else ""
        else:
            difference = float(np.nanmax(np.abs(mine - theirs), initial=0.0))
            if not np.allclose(theirs, mine, rtol=rtol, atol=atol, equal_nan=True):
                why = f"numbers differ by up to {difference:g}"
            largest = max(largest, difference)
        if why:
            raise NotConvertedError(
                f"the ONNX form of the model answers otherwise than the original ({why}) - serve the original"
            )
        rows += question.rows
    return rows, largest


def _array(answer: Answer | None) -> Array | None:
    if answer is None or answer.form not in ("array", "rows"):
        return None
    given = answer.parts[0][1]
    if isinstance(given, np.ndarray):
        return given
    return np.array(given) if isinstance(given, list) and all(isinstance(one, str) for one in given) else None
