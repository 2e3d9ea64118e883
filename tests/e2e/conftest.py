"""One manager for all tests here, driven as a user would: through the `flops` command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FLOPS = str(Path(sys.executable).with_name("flops"))

MODEL_MANAGER = """\
import numpy as np
from flops_utils.ml_repo_templates import ModelManagerTemplate


class ModelManager(ModelManagerTemplate):
    def __init__(self):
        self.parameters = [np.zeros((4, 3), np.float32), np.zeros(3)]
        CONSTRUCTOR

    def set_model_data(self):
        DATA

    def get_model(self):
        return None

    def get_model_parameters(self):
        return self.parameters

    def set_model_parameters(self, parameters):
        self.parameters = parameters

    def fit_model(self):
        self.parameters = [p + np.random.standard_normal(p.shape).astype(p.dtype) for p in self.parameters]
        FIT
        return 5

    def evaluate_model(self):
        return float(np.abs(self.parameters[0]).mean()), 0.5, 5
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines of a stream."""
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith("{")]

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)


class User:
    """Somebody with a terminal and a FLOPS_HOME."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        self.environment = {**os.environ, "FLOPS_HOME": str(home), **environment}
        self.command: tuple[str, ...] = (FLOPS,)

    def flops(self, *arguments: str, timeout_s: float = 180.0) -> Ended:
        result = subprocess.run(
            [*self.command, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Ended(result.returncode, result.stdout, result.stderr)

    def project(self, *arguments: str, timeout_s: float = 180.0) -> dict[str, Any]:
        """Run a project to its end; returns how it stands then."""
        ended = self.flops("run", *arguments, "--json", timeout_s=timeout_s)
        assert ended.lines, ended.stderr
        project: dict[str, Any] = ended.lines[-1]
        assert ended.code == (0 if project["state"] == "finished" else 1), ended.stdout
        return project

    def events(self, project: str, kind: str) -> list[dict[str, Any]]:
        lines = self.flops("events", project, "--json").lines
        return [line["data"] for line in lines if line["kind"] == kind]


@pytest.fixture(scope="session")
def make_user(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., User]:
    """A user with an empty FLOPS_HOME and some environment."""

    def make(**environment: str) -> User:
        return User(tmp_path_factory.mktemp("home"), **environment)

    return make


@pytest.fixture(scope="session")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """A user with data at three sites; the manager is started by the first command and stopped at the end."""
    person = User(tmp_path_factory.mktemp("home"))
    table = person.home / "t.csv"
    table.write_text("x,y\n" + "".join(f"{number},{number % 2}\n" for number in range(20)))
    try:
        for site in ("north", "south", "west"):
            put = person.flops("data", "put", str(table), "--tag", "e2e", "--site", site)
            assert put.code == 0, put.stderr
        yield person
    finally:
        person.flops("down", "--force")


@pytest.fixture
def repository(tmp_path: Path) -> Callable[..., Path]:
    """Make a repository of plain numpy code, with something put in its way."""

    def _repository(requirements: str = "numpy\n", **faults: str) -> Path:
        text = MODEL_MANAGER
        for place in ("constructor", "data", "fit"):
            text = text.replace(f"        {place.upper()}\n", f"        {faults.get(place, 'pass')}\n")
        folder = tmp_path / "repository"
        folder.mkdir()
        (folder / "model_manager.py").write_text(faults.get("header", "") + text)
        (folder / "requirements.txt").write_text(requirements)
        return folder

    return _repository
