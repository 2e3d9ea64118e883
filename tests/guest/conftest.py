"""Repositories made on the spot, and real guests that run them with this Python as the user's."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flops.guest import Guest, Room
from flops_worker import models

MANAGER = """
import numpy as np
from flops_utils.ml_repo_templates import ModelManagerTemplate

class ModelManager(ModelManagerTemplate):
    def __init__(self):
        self.parameters = [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3)]
        self.seen = []

    def set_model_data(self):
        self.data = [1, 2, 3]

    def get_model(self):
        return self

    def get_model_parameters(self):
        return self.parameters

    def set_model_parameters(self, parameters):
        self.parameters = parameters

    def fit_model(self):
        return 3

    def evaluate_model(self):
        return 0.25, 0.75, 4
"""

Repository = Callable[..., Path]
Start = Callable[..., Guest]
Environment = Callable[..., Path]
Ready = Callable[..., Guest]
ModelFile = Callable[..., int]
Body = Callable[[int], bytes]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """Makes a checkout: ``methods`` are added to (or replace those of) a ModelManager that works."""

    def make(methods: str = "", *, module: str | None = None, **files: str) -> Path:
        code = tmp_path / "checkout"
        code.mkdir(exist_ok=True)
        indented = "".join(f"    {line}\n" for line in methods.splitlines())
        (code / "model_manager.py").write_text(MANAGER + "\n" + indented if module is None else module)
        for name, text in files.items():
            (code / f"{name}.py").write_text(text)
        return code

    return make


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts guests, and sees to it that none is left."""
    guests: list[Guest] = []

    def make(code: Path, *, python: Path = Path(sys.executable), **options: Any) -> Guest:
        options.setdefault("log", tmp_path / "guest.log")
        options.setdefault("threads", 1)
        guests.append(Guest.start(Room(python, code), **options))
        return guests[-1]

    yield make
    for guest in guests:
        guest.kill()
        assert not Path(f"/proc/{guest.pid}").exists()


@pytest.fixture
def ready(repository: Repository, start: Start) -> Ready:
    """A guest that has loaded a repository with these methods, and its data."""

    def make(methods: str = "", **options: Any) -> Guest:
        guest = start(repository(methods), **options)
        guest.load(30)
        guest.load_data(30)
        return guest

    return make


@pytest.fixture
def model_file() -> Iterator[ModelFile]:
    """Writes arrays to open model files, which are closed at the end."""
    opened: list[int] = []

    def make(*arrays: np.ndarray[Any, Any]) -> int:
        opened.append(os.memfd_create("model"))
        models.write(opened[-1], arrays)
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


@pytest.fixture
def model_fd(model_file: ModelFile) -> int:
    """A model that fits the repository's."""
    return model_file(np.full((2, 3), 7, dtype=np.float32), np.array([1.0, np.pi, -0.0]))


@pytest.fixture
def body() -> Body:
    """Reads the bytes of all arrays of a model file."""

    def read(fd: int) -> bytes:
        layout, begin = models.LayoutReader().read(fd)
        return os.pread(fd, layout.nbytes, begin)

    return read


def _index_arguments() -> list[str]:
    """The user's own pip configuration, for uv."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    arguments = ["--index-strategy", "unsafe-best-match"]
    for line in dict.fromkeys(listed.splitlines()):
        name, _, value = line.partition("=")
        option = name.rsplit(".", 1)[-1]
        if option in ("index-url", "extra-index-url", "find-links"):
            for one in value.strip("'\"").split():
                arguments += [f"--{option}", one]
    return arguments


def _interpreter(version: str) -> Path | None:
    """An installed Python of that version, wherever such things are kept."""
    found = [
        shutil.which(f"python{version}"),
        *sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python")),
    ]
    for candidate in found:
        if candidate is None:
            continue
        check = subprocess.run([candidate, "-c", "import ssl"], capture_output=True, check=False)
        if check.returncode == 0:
            return Path(candidate)
    return None


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Makes a user's environment for a Python version, once, and returns its interpreter."""
    made: dict[tuple[str, ...], Path] = {}

    def make(version: str, *packages: str) -> Path:
        key = (version, *packages)
        if key not in made:
            interpreter = _interpreter(version)
            if interpreter is None:
                pytest.skip(f"no Python {version} on this machine")
            folder = tmp_path_factory.mktemp("environment") / "venv"
            uv = Path(sys.executable).with_name("uv")
            subprocess.run([uv, "venv", "-q", "--python", interpreter, folder], check=True)
            python = folder / "bin" / "python"
            install = [str(uv), "pip", "install", "-q", "--compile-bytecode", "--python", str(python)]
            subprocess.run([*install, *_index_arguments(), *packages], check=True)
            made[key] = python
        return made[key]

    return make
