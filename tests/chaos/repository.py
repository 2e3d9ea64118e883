"""The project that is put through it: a small repository whose training takes as long as it is told."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np

FEATURES, OUTPUTS = 16, 1200
"""77 KiB of parameters: enough that updates are announced and fetched, not sent beside their header."""
TAG = "chaos"

_MODEL_MANAGER = '''\
"""A linear map learned by noisy steps: every bit of it depends on the seed, the data and the round."""

import time

import numpy as np
import pyarrow as pa
from flops_utils.ml_repo_templates import ModelManagerTemplate
from flops_worker.door import entrance

FEATURES, OUTPUTS = {features}, {outputs}


class ModelManager(ModelManagerTemplate):
    def __init__(self):
        self.weights = np.zeros((OUTPUTS, FEATURES), np.float32)
        self.intercept = np.zeros(OUTPUTS, np.float32)

    def set_model_data(self):
        tables = [pa.ipc.open_file(pa.OSFile("/dev/fd/%d" % fd)).read_all() for fd in entrance.door.request()]
        table = pa.concat_tables(tables)
        rows = np.stack([table[f"x{{i}}"].to_numpy() for i in range(FEATURES)], axis=1)
        self.x = rows.astype(np.float32)
        truth = np.random.RandomState(1).standard_normal((FEATURES, OUTPUTS)).astype(np.float32)
        self.y = np.tanh(self.x @ truth)

    def get_model(self):
        from sklearn.linear_model import LinearRegression

        model = LinearRegression()
        model.coef_, model.intercept_, model.n_features_in_ = self.weights, self.intercept, FEATURES
        return model

    def get_model_parameters(self):
        return [self.weights, self.intercept]

    def set_model_parameters(self, parameters):
        self.weights, self.intercept = parameters

    def fit_model(self):
        print("a line in the log of this learner", flush=True)
        time.sleep({fit_s})
        for _ in range(3):
            some = np.random.permutation(len(self.x))[:32]
            x, y = self.x[some], self.y[some]
            x = x + 0.01 * np.random.standard_normal(x.shape).astype(np.float32)
            error = x @ self.weights.T + self.intercept - y
            self.weights = self.weights - np.float32(0.01) * (error.T @ x) / len(x)
            self.intercept = self.intercept - np.float32(0.01) * error.mean(axis=0)
        return len(self.x)

    def evaluate_model(self):
        time.sleep({evaluate_s})
        error = self.x @ self.weights.T + self.intercept - self.y
        return float(np.square(error).mean()), float((np.abs(error) < 0.5).mean()), len(self.x)
'''


def make_repository(folder: Path, *, fit_s: float = 0.12, evaluate_s: float = 0.04) -> Path:
    """A local git repository with one commit."""
    folder.mkdir(parents=True)
    code = _MODEL_MANAGER.format(features=FEATURES, outputs=OUTPUTS, fit_s=fit_s, evaluate_s=evaluate_s)
    (folder / "model_manager.py").write_text(code)
    (folder / "requirements.txt").write_text("numpy\nscikit-learn\npyarrow\n")
    for arguments in (
        ["init", "--quiet", "--initial-branch", "main"],
        ["add", "."],
        ["-c", "user.name=chaos", "-c", "user.email=chaos@localhost", "commit", "--quiet", "-m", "A model"],
    ):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def make_table(site: int) -> Any:
    """One site's data; the same each time."""
    import pyarrow as pa

    rows = np.random.RandomState(100 + site).standard_normal((200 + 20 * site, FEATURES))
    return pa.table({f"x{column}": rows[:, column] for column in range(FEATURES)})


def project_spec(repository: Path, *, learners: int, rounds: int, seed: int) -> dict[str, Any]:
    """A synchronous training in which every learner has to take part in every round."""
    return {
        "repo": str(repository),
        "name": "chaos",
        "model": {"flavor": "sklearn"},
        "data": {"tags": [TAG]},
        "training": {
            "rounds": rounds,
            "learners": learners,
            "min_available_learners": learners,
            "min_fit_learners": learners,
            "min_evaluate_learners": learners,
            "quorum": learners,
            "start_deadline_s": 600,
            "seed": seed,
        },
    }
