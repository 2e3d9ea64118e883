"""Converted models: compared with the original before they may serve."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import uv

from flops.core.errors import InvalidInputError
from flops.images import PipConfiguration
from flops.serving.onnx import NotConvertedError, convert
from tests.serving.conftest import Serve, images, person

pytestmark = [pytest.mark.network, pytest.mark.slow]
CONVERTER = ("skl2onnx", "onnxruntime", "onnx", "ml_dtypes", "flatbuffers")
"""skl2onnx, onnxruntime and those of their requirements that this environment lacks."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with what this one has, skl2onnx and onnxruntime."""
    folder = tmp_path_factory.mktemp("converter") / "env"
    configuration = PipConfiguration.from_pip()
    variables = configuration.uv_environment()
    program = uv.find_uv_bin()
    subprocess.run([program, "venv", "-q", "--python", sys.executable, folder], check=True, env=variables)
    interpreter = folder / "bin" / "python"
    arguments = ["pip", "install", "-q", "--no-deps", "--python", str(interpreter)]
    subprocess.run(
        [program, *arguments, *configuration.uv_arguments(), *CONVERTER], check=True, env=variables
    )
    (packages,) = folder.glob("lib/python3.*/site-packages")
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


@pytest.fixture(scope="module")
def digits(models: Path, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("onnx") / "digits"
    conversion = convert(models / "digits", target, python=python)
    assert conversion.folder == target
    assert conversion.rows == 66
    assert conversion.largest_difference == 0
    return target


def test_a_converted_model_serves_what_the_original_does(digits: Path, python: Path, serve: Serve) -> None:
    original, converted = serve("digits"), serve(str(digits), name="digits", kind="onnx", python=str(python))
    rows = images(50)
    wanted = original.ask({"inputs": rows})
    assert converted.ask({"inputs": rows}).content == wanted.content
    tensor = {"name": "input-0", "shape": [50, 64], "datatype": "FP64", "data": rows}
    path = "/v2/models/digits/infer"
    assert converted.ask({"inputs": [tensor]}, path).json() == original.ask({"inputs": [tensor]}, path).json()
    assert converted.ask({"inputs": [[1.0]]}).json() == original.ask({"inputs": [[1.0]]}).json()
    assert converted.ask({"inputs": rows, "params": {"a": 1}}).status_code == 400


def test_columns_of_numbers_and_texts_are_converted(
    models: Path, python: Path, tmp_path: Path, serve: Serve
) -> None:
    conversion = convert(models / "income", tmp_path / "income", python=python)
    assert conversion.largest_difference < 1e-9
    original = serve("income")
    converted = serve(str(tmp_path / "income"), name="income", kind="onnx", python=str(python))
    rows = [person(), person(age=20, city="Zurich"), person(married=False)]
    answers = [server.ask({"dataframe_records": rows}).json() for server in (original, converted)]
    assert np.allclose(answers[0]["predictions"], answers[1]["predictions"])


def test_a_model_that_answers_otherwise_is_refused(models: Path, python: Path, tmp_path: Path) -> None:
    """Rounding alone is a difference where none is allowed."""
    with pytest.raises(NotConvertedError, match="numbers differ by up to") as refused:
        convert(models / "probabilities", tmp_path / "p", python=python, rtol=0, atol=0)
    assert "serve the original" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_models_without_an_onnx_form_are_refused_with_the_reason(
    models: Path, python: Path, tmp_path: Path
) -> None:
    with pytest.raises(NotConvertedError, match="has no ONNX form"):
        convert(models / "town", tmp_path / "town", python=python)
    with pytest.raises(InvalidInputError, match="no input example"):
        convert(models / "moody", tmp_path / "moody", python=python)
    with pytest.raises(InvalidInputError, match="no signature"):
        convert(models / "unsigned", tmp_path / "unsigned", python=python)
    assert not list(tmp_path.iterdir())


def test_an_environment_without_the_converter_is_a_clear_refusal(models: Path, tmp_path: Path) -> None:
    with pytest.raises(NotConvertedError, match="skl2onnx cannot be imported"):
        convert(models / "digits", tmp_path / "digits", python=Path(sys.executable))


def test_a_tampered_conversion_does_not_load(
    digits: Path, python: Path, serve: Serve, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in digits.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.onnx").write_bytes(b"no model")
    server = serve(str(broken), name="digits", kind="onnx", python=str(python), wait=False)
    assert server.process.wait(60) == 1
    assert "cannot be loaded" in server.log
