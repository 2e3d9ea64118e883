"""What the recorder gives back: one small file for each project, and one about itself.

Both are replaced as a whole (written aside, then renamed), so a reader sees an old or a new one, never a
torn one.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from flops.core.errors import FailedError

KEPT_REFUSALS = 20


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """A version in the model registry. ``path``: its folder, where artifacts lie on this machine."""

    name: str
    version: int
    uri: str
    model_id: str
    round: int
    path: str | None = None
    rounds: int = 0
    """Of the record that it was made from."""


@dataclass(frozen=True, kw_only=True)
class KeptArtifact:
    """A plain file kept with the run. ``path``: the file, where artifacts lie on this machine."""

    uri: str
    round: int
    path: str | None = None
    rounds: int = 0


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A record that can never be tracked; it stays in the spool at ``offset``."""

    offset: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """How far a project's records are shipped (``offset`` bytes of its spool), and what became of them."""

    project: str
    offset: int = 0
    experiment_id: str | None = None
    run_id: str | None = None
    model: RegisteredModel | None = None
    artifact: KeptArtifact | None = None
    status: str | None = None
    children: Mapping[str, str] = field(default_factory=dict)
    """Runs of clusters."""
    refused: tuple[Refusal, ...] = ()
    """The first 20; ``refused_count`` counts all."""
    refused_count: int = 0

    @property
    def page(self) -> str | None:
        """The run's page in MLflow's GUI, relative to the GUI's address."""
        if self.run_id is None:
            return None
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}"


@dataclass(frozen=True, kw_only=True)
class RecorderStatus:
    """One line about the recorder: ``waiting`` means that MLflow does not take records at present."""

    state: Literal["preparing", "ready", "waiting"]
    message: str
    since: float
    pid: int


_RESULT = TypeAdapter(Result)
_STATUS = TypeAdapter(RecorderStatus)
_T = TypeVar("_T")


def read_result(path: Path) -> Result | None:
    """The result, None before the recorder made one.

    Raises:
        FailedError: the file is not a result.
    """
    return _read(path, _RESULT)


def write_result(path: Path, result: Result) -> None:
    """Replace the result, durably: records before its offset are not shipped again."""
    _replace(path, _RESULT.dump_json(result), durable=True)


def read_status(path: Path) -> RecorderStatus | None:
    return _read(path, _STATUS)


def write_status(path: Path, status: RecorderStatus) -> None:
    _replace(path, _STATUS.dump_json(status), durable=False)


def _read(path: Path, adapter: TypeAdapter[_T]) -> _T | None:
    try:
        return adapter.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise FailedError(
            f"{path} cannot be read - delete it, the recorder makes it again from the spool"
        ) from error


def _replace(path: Path, content: bytes, *, durable: bool) -> None:
    aside = path.with_name(f"{path.name}.new")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(fd)
    aside.replace(path)
