"""Where the manager keeps what below FLOPS_HOME, beyond what `flops.core.settings` names."""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flops.core.ids import ProjectId
from flops.core.settings import Settings


@dataclass(frozen=True)
class ProjectPaths:
    """The folder of one project."""

    folder: Path

    @classmethod
    def of(cls, settings: Settings, project: ProjectId) -> "ProjectPaths":
        return cls(settings.projects_dir / project)

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    @property
    def initial_model(self) -> Path:
        return self.folder / "initial.safetensors"

    @property
    def config(self) -> Path:
        """Tokens are in these files: folder mode 700, files mode 600."""
        return self.folder / "config"

    @property
    def state(self) -> Path:
        """The aggregator's own."""
        return self.folder / "state"

    def cluster(self, number: int) -> Path:
        """The state of a cluster's aggregator."""
        return self.folder / "clusters" / str(number)

    @property
    def uploads(self) -> Path:
        """Trained models from aggregators that share no files with the manager."""
        return self.folder / "uploads"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def export(self, rounds: int) -> Path:
        """What is handed to the tracker of the model after so many rounds: ``model`` in MLflow's format, and
        its bare parameters.
        """
        return self.folder / "export" / f"rounds-{rounds}"


def data_token_file(settings: Settings) -> Path:
    return settings.home / "data.token"


def models_dir(settings: Settings) -> Path:
    """Our copies of registered models: ``<name>/<version>``."""
    return settings.home / "models"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read; a reader sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_private_json(path: Path, content: Mapping[str, Any]) -> None:
    write_private(path, json.dumps(content, indent=1) + "\n")


def read_or_make_token(path: Path) -> str:
    """The token in the file; where there is none, a new one, made so that two makers agree on it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # refuses to replace, unlike rename
        except FileExistsError:
            path.chmod(0o600)
    finally:
        temporary.unlink()
    return path.read_text(encoding="ascii").strip()
