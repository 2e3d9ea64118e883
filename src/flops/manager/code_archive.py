"""A project's checkout as one archive, for learners on machines that share no files with this one."""

import hashlib
import json
import os
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.manager.paths import ProjectPaths, write_private_json

_GIT = ".git"


@dataclass(frozen=True)
class CodeArchive:
    """A tar archive of regular files and folders, without the repository's own."""

    path: Path
    sha256: str
    size_bytes: int


def code_of(settings: Settings, project: ProjectId, results: Mapping[str, Mapping[str, Any]]) -> CodeArchive:
    """The archive of a project's checkout."""
    fetched = results["fetch"]
    folder = ProjectPaths.of(settings, project).folder
    return code_archive(folder, Path(fetched["path"]), str(fetched["commit"]))


def code_archive(folder: Path, checkout: Path, commit: str) -> CodeArchive:
    """The archive of a checkout at a commit; made at the first call, and the same bytes each time it is made.

    Args:
        folder: of the project.
    """
    path, known = folder / "code.tar", folder / "code.json"
    with suppress(OSError, ValueError, KeyError):
        kept = json.loads(known.read_text(encoding="utf-8"))
        if kept["commit"] == commit and path.stat().st_size == kept["size_bytes"]:
            return CodeArchive(path, kept["sha256"], kept["size_bytes"])
    aside = path.with_suffix(".new")
    with aside.open("wb") as file:
        _write(file, checkout)
        file.flush()
        os.fsync(file.fileno())
    with aside.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size = aside.stat().st_size
    aside.replace(path)
    write_private_json(known, {"commit": commit, "sha256": sha256, "size_bytes": size})
    return CodeArchive(path, sha256, size)


def _write(file: IO[bytes], checkout: Path) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for parent, folders, files in os.walk(checkout):
            below = Path(parent)
            if below == checkout and _GIT in folders:
                folders.remove(_GIT)
            folders[:] = sorted(name for name in folders if not (below / name).is_symlink())
            for name in folders:
                archive.addfile(_entry(checkout, below / name, tarfile.DIRTYPE, 0o755))
            for name in sorted(files):
                source = below / name
                if name == _GIT or source.is_symlink() or not source.is_file():
                    continue  # a worktree's .git is a file
                executable = source.stat().st_mode & 0o100
                entry = _entry(checkout, source, tarfile.REGTYPE, 0o755 if executable else 0o644)
                entry.size = source.stat().st_size
                with source.open("rb") as content:
                    archive.addfile(entry, content)


def _entry(checkout: Path, source: Path, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(str(source.relative_to(checkout)))
    entry.type, entry.mode, entry.mtime = kind, mode, 0
    return entry
