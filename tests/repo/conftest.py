"""Real git repositories, made on the spot by git itself."""

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

MANAGER = """import numpy as np


class ModelManager:
    def __init__(self):
        self.parameters = [np.arange(6, dtype=np.float32).reshape(2, 3)]

    def set_model_data(self):
        pass

    def get_model(self):
        return self

    def get_model_parameters(self):
        return self.parameters

    def set_model_parameters(self, parameters):
        self.parameters = parameters

    def fit_model(self):
        return 1

    def evaluate_model(self):
        return 0.5, 0.5, 1
"""


class Repository:
    """A git work tree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments: str) -> str:
        settings = ("-c", "user.name=Somebody", "-c", "user.email=somebody@localhost")
        return subprocess.run(
            ["git", "-C", str(self.path), *settings, *arguments],
            env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    def write(self, files: Mapping[str, str]) -> None:
        for name, text in files.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def commit(self) -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "work")
        return self.git("rev-parse", "HEAD")


MakeCheckout = Callable[..., Path]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A repository with one commit."""
    made = Repository(tmp_path / "origin")
    made.write({"model.py": "first\n"})
    made.commit()
    return made


@pytest.fixture
def checkout(tmp_path: Path) -> MakeCheckout:
    """Makes a checkout: a working ModelManager and an empty conda.yaml, unless said otherwise (None: no)."""

    def make(files: dict[str, str | None] | None = None) -> Path:
        folder = tmp_path / "checkout"
        folder.mkdir(exist_ok=True)
        content = {"model_manager.py": MANAGER, "conda.yaml": "dependencies: []\n", **(files or {})}
        for name, text in content.items():
            if text is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
        return folder

    return make
