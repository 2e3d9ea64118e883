"""Backups: one tar archive with every row, projects' configuration files and registered models.

Rows are JSON lines, one file a table, read in one transaction: they say nothing of the engine, so a backup
from SQLite goes into PostgreSQL and back. Rows come first: whatever they name is there when its files are
read, because files are written before their rows and models are never removed. The last member has the
SHA-256 of all others, so a cut or damaged archive is known as one. `flops.manager.restore` reads it.

An archive holds what the home holds: tokens' digests, credentials of repositories. It is as secret.
"""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import sqlalchemy as sa

from flops import __version__
from flops.core.clock import Clock
from flops.core.disk import disk_full, is_full
from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.manager.paths import ProjectPaths
from flops.persistence import JSON, reading, revision_of

FORMAT = "flops-backup"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SUMS = "sha256.json"
REVISIONS = "alembic_version"
"""The table of the migrations' own; `manifest.json` has what it says."""
_NOT_KEPT = (REVISIONS, "manager_lease")
RESTORED = "restored"
"""In what a project's training came to: true after a restore, which brings no checkpoints."""
_PART_BYTES = 1 << 20


class Backup:
    """One backup, its rows already read; `parts` gives the archive's bytes, once."""

    def __init__(self, settings: Settings, engine: sa.Engine, clock: Clock) -> None:
        """Raises: DiskFullError: there is no space for the rows beside the home."""
        self._settings = settings
        self._clock = clock
        self._files = ExitStack()
        self._tables: list[tuple[str, IO[bytes]]] = []
        self._projects: list[ProjectId] = []
        self._models: list[tuple[str, Path]] = []
        try:
            with reading(engine) as connection:
                self._read(connection)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and is_full(error):
                raise disk_full(settings.home, "the backup") from error
            raise

    def close(self) -> None:
        self._files.close()

    def parts(self) -> Iterator[bytes]:
        sums: dict[str, str] = {}
        with self._files:
            for name, file in self._members():
                sums[name] = yield from _member(name, file)
            yield from _member(SUMS, io.BytesIO(json.dumps(sums, indent=1).encode()))
            yield bytes(2 * tarfile.BLOCKSIZE)

    def _members(self) -> Iterator[tuple[str, IO[bytes]]]:
        for name, rows in self._tables:
            yield name, rows
        for project in self._projects:
            config = ProjectPaths.of(self._settings, project).config
            yield from _files_below(config, f"files/projects/{project}/config")
        for name, folder in self._models:
            yield from _files_below(folder, f"files/{name}")

    def _read(self, connection: sa.Connection) -> None:
        known = reflected(connection)
        counts: dict[str, int] = {}
        files: dict[str, IO[bytes]] = {}
        for table in known.sorted_tables:
            file = tempfile.TemporaryFile(dir=self._settings.home)  # noqa: SIM115 - closed by the stack
            files[table.name] = self._files.enter_context(file)
            counts[table.name] = 0
            query = sa.select(table).order_by(*table.primary_key)
            for row in connection.execute(query, execution_options={"yield_per": 1000}):
                values = dict(row._mapping)
                self._note(table.name, values)
                file.write(json.dumps(values, separators=(",", ":")).encode() + b"\n")
                counts[table.name] += 1
            file.seek(0)
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "flops": __version__,
            "revision": revision_of(connection),
            "created": self._clock.now(),
            "rows": counts,
        }
        self._tables = [
            (MANIFEST, io.BytesIO(json.dumps(manifest, indent=1).encode() + b"\n")),
            *((f"tables/{name}.jsonl", file) for name, file in files.items()),
        ]

    def _note(self, table: str, values: dict[str, Any]) -> None:
        """Whose files go with a row; where they are is said relative to the home."""
        if table == "projects":
            self._projects.append(ProjectId(values["id"]))
        elif table == "models" and values["folder"] is not None:
            folder = Path(values["folder"])
            values["folder"] = None
            if folder.is_dir():
                name = values["folder"] = model_place(values["name"], values["version"])
                self._models.append((name, folder))


def model_place(name: str, version: int) -> str:
    """Where the files of a model version lie, below a home and below ``files`` of an archive."""
    return f"models/{quote(name, safe='')}/{version}"


def reflected(connection: sa.Connection) -> sa.MetaData:
    """The tables as they are at present, whatever the code says; JSON's null is SQL's, as in all of ours."""
    found = sa.MetaData()
    found.reflect(connection)
    for name in _NOT_KEPT:
        if name in found.tables:
            found.remove(found.tables[name])
    for table in found.tables.values():
        for column in table.columns:
            if isinstance(column.type, sa.JSON):
                column.type = JSON
    return found


def _files_below(folder: Path, name: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Plain files, open one after the other; those that go away meanwhile are left out."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue
        with file:
            yield f"{name}/{path.relative_to(folder).as_posix()}", file


def _member(name: str, file: IO[bytes]) -> Generator[bytes, None, str]:
    """A plain file of a tar archive (PAX), as large as it is now; returns its content's SHA-256."""
    digest = hashlib.sha256()
    info = tarfile.TarInfo(name)
    left = info.size = file.seek(0, os.SEEK_END)
    file.seek(0)
    info.mode = 0o600
    yield info.tobuf(tarfile.PAX_FORMAT)
    while left:
        part = file.read(min(_PART_BYTES, left))
        if not part:
            raise OSError(f"{name} became shorter while it was read")
        left -= len(part)
        digest.update(part)
        yield part
    yield bytes(-info.size % tarfile.BLOCKSIZE)
    return digest.hexdigest()
