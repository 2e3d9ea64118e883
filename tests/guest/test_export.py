"""Models are saved in their MLflow flavor, from parameters alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.guest.conftest import Body, ModelFile, Repository, Start

pytestmark = pytest.mark.slow
T = 120.0
EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist-sklearn"
PREDICT = """
import sys, json
import mlflow.pyfunc, numpy
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(numpy.asarray(model.predict(numpy.eye(784)[:2])).tolist()))
"""


def test_the_example_is_saved_with_signature_and_input_example(
    start: Start, model_file: ModelFile, tmp_path: Path
) -> None:
    weights = np.zeros((10, 784))
    weights[3, 0] = weights[8, 1] = 1
    guest = start(EXAMPLE)
    guest.load(T)
    folder = tmp_path / "exported"
    result = guest.export(
        model_file(weights, np.zeros(10)), folder, "sklearn", "digits", ["scikit-learn"], timeout_s=T
    )
    assert result.flavor == "sklearn"
    assert result.input_example
    assert result.signature is not None
    inputs = json.loads(json.loads(result.signature)["inputs"])
    assert inputs[0]["tensor-spec"] == {"dtype": "float64", "shape": [-1, 784]}
    assert "scikit-learn" in (folder / "requirements.txt").read_text().splitlines()
    output = subprocess.run(
        [sys.executable, "-c", PREDICT, str(folder)], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(output) == [3, 8]


def test_a_model_that_cannot_predict_yet_is_saved_all_the_same(
    repository: Repository, start: Start, tmp_path: Path
) -> None:
    guest = start(
        repository(
            "def __init__(self):\n"
            "    from sklearn.linear_model import LogisticRegression\n"
            "    self.model = LogisticRegression()\n"
            "    self.model.coef_ = np.zeros((2, 5))\n"
            "def get_model(self):\n    return self.model\n"
            "def get_model_parameters(self):\n    return [self.model.coef_]\n"
            "def set_model_parameters(self, parameters):\n    self.model.coef_ = parameters[0]"
        )
    )
    guest.load(T)
    _, fd = guest.describe(T)
    result = guest.export(fd, tmp_path / "exported", timeout_s=T)
    os.close(fd)
    assert result.flavor == "sklearn"
    assert "the model cannot predict from its parameters alone" in result.warnings[0]
    assert (tmp_path / "exported" / "MLmodel").exists()


def test_a_class_of_the_repository_travels_with_its_code(
    repository: Repository, start: Start, tmp_path: Path
) -> None:
    code = repository(
        "def __init__(self):\n"
        "    from own import Doubling\n"
        "    self.model = Doubling()\n"
        "    self.parameters = [np.ones(1)]\n"
        "def get_model(self):\n    return self.model\n"
        "def get_input_example(self):\n    return np.ones((1, 2))",
        own="from sklearn.base import BaseEstimator\nimport flops_utils.ml_repo_templates\n"
        "class Doubling(BaseEstimator):\n"
        "    def fit(self, x, y=None): return self\n"
        "    def predict(self, x): return x * 2\n",
    )
    (code / "data.csv").write_text("secret")
    guest = start(code)
    guest.load(T)
    _, fd = guest.describe(T)
    folder = tmp_path / "exported"
    assert guest.export(fd, folder, timeout_s=T).signature is not None
    os.close(fd)
    names = {path.name for path in (folder / "code").iterdir()}
    assert names == {"model_manager.py", "own.py", "flops_utils"}
    output = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            PREDICT.replace("numpy.eye(784)[:2]", "numpy.ones((1, 2))"),
            str(folder),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true"},
    ).stdout
    assert json.loads(output) == [[2.0, 2.0]]


def test_a_model_of_no_known_library_has_no_flavor(
    repository: Repository, start: Start, model_fd: int, tmp_path: Path, body: Body
) -> None:
    guest = start(repository())
    guest.load(T)
    result = guest.export(model_fd, tmp_path / "exported", timeout_s=T)
    assert result.flavor is None
    assert "no library that MLflow has a flavor for" in result.warnings[0]
    assert not (tmp_path / "exported").exists()
