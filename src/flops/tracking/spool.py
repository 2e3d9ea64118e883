"""The spool: tracking records on their way to MLflow, safe on disk before anything else happens to them.

One append-only file of JSON lines for each project. `Spool.append` returns when the records are on disk.
A complete line is never taken back, so a reader's offset stays valid for ever; a torn last line (power
cut, full disk) was never promised and is cut off by the next append. Any number of threads and processes
may append; nothing here imports mlflow.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flops.core.disk import DiskFullError, is_full
from flops.core.errors import InvalidInputError, UnavailableError
from flops.core.ids import ProjectId, project_id
from flops.tracking.nudge import Listener, Nudge
from flops.tracking.records import Record, record_from_json, record_to_json
from flops.tracking.results import RecorderStatus, Result, read_result, read_status

MAX_LINE_BYTES = 1 << 20
_SPOOL_FILE = re.compile(r"(?P<project>p-[0-9a-z]{4,12})\.jsonl")


@dataclass(frozen=True)
class Entry:
    """One complete line, from ``offset`` up to ``end``; ``record`` is None where it cannot be read."""

    offset: int
    end: int
    record: Record | None
    problem: str = ""


class Spool:
    """All projects' records below one folder (mode 700), and the recorder's answers beside them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._records = Nudge(directory / "records.nudge")
        self.status_file = directory / "recorder.json"

    def append(self, project: ProjectId, *records: Record) -> int:
        """Write records durably, in order, and wake the recorder.

        Returns:
            The spool's length: the records are shipped when the project's ``Result.offset`` has reached it.
        Raises:
            InvalidInputError: a record is over 1 MiB.
            UnavailableError: the disk does not take them (DiskFullError: it has no space). Some of them may
                be written; append all again.
        """
        lines = b"".join(_line(project, record) for record in records)
        try:
            with self._locked(project) as fd:
                _cut_torn_line(fd)
                try:
                    _write_all(fd, lines)
                except OSError:
                    _cut_torn_line(fd)
                    raise
                os.fsync(fd)
                end = os.fstat(fd).st_size
        except OSError as error:
            kind = DiskFullError if is_full(error) else UnavailableError
            raise kind(
                f"tracking records of project {project} cannot be written to {self.directory}: "
                f"{error.strerror} - free space there, then try again"
            ) from error
        self._records.ring()
        return end

    def read(self, project: ProjectId, offset: int = 0) -> Iterator[Entry]:
        """The complete lines from ``offset`` (a line's start) on; memory is bounded by the longest line."""
        try:
            file = self._path(project).open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(offset)
            while line := file.readline(MAX_LINE_BYTES):
                while not line.endswith(b"\n"):
                    more = file.readline(MAX_LINE_BYTES)
                    if not more:
                        return
                    line = b"\0" + more  # over-long: no record, only its end matters
                end = file.tell()
                try:
                    yield Entry(offset, end, record_from_json(line))
                except InvalidInputError as error:
                    yield Entry(offset, end, None, str(error))
                offset = end

    def size_bytes(self, project: ProjectId) -> int:
        try:
            return self._path(project).stat().st_size
        except FileNotFoundError:
            return 0

    def projects(self) -> list[ProjectId]:
        """Projects with records, by id."""
        found = (_SPOOL_FILE.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(ProjectId(match["project"]) for match in found if match)

    def remove(self, project: ProjectId) -> None:
        """Forget a project: its records, shipped or not, and its result. MLflow keeps what it has."""
        self._path(project).unlink(missing_ok=True)
        self.result_file(project).unlink(missing_ok=True)

    def result_file(self, project: ProjectId) -> Path:
        return self.directory / f"{project_id(project)}.result.json"

    def result(self, project: ProjectId) -> Result | None:
        """What the recorder made of a project's records so far."""
        return read_result(self.result_file(project))

    def recorder_status(self) -> RecorderStatus | None:
        return read_status(self.status_file)

    def listen_for_records(self) -> Listener:
        """The recorder's ear."""
        return Listener(self.directory / "records.nudge")

    def listen_for_results(self) -> Listener:
        """The manager's ear: nudged when a result names something new, and when a project is all shipped."""
        return Listener(self.directory / "results.nudge")

    def announce_result(self) -> None:
        Nudge(self.directory / "results.nudge").ring()

    def _path(self, project: ProjectId) -> Path:
        return self.directory / f"{project_id(project)}.jsonl"

    @contextmanager
    def _locked(self, project: ProjectId) -> Iterator[int]:
        path = self._path(project)
        new = not path.exists()
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)
        if new:
            _sync_directory(self.directory)


def _line(project: ProjectId, record: Record) -> bytes:
    line = record_to_json(record) + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise InvalidInputError(
            f"a '{record.kind}' record of project {project} has {len(line)} bytes, the limit is "
            f"{MAX_LINE_BYTES} - track fewer or shorter values"
        )
    return line


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _cut_torn_line(fd: int) -> None:
    size = os.fstat(fd).st_size
    if not size or os.pread(fd, 1, size - 1) == b"\n":
        return
    start = max(0, size - MAX_LINE_BYTES)
    newline = os.pread(fd, size - start, start).rfind(b"\n")
    if newline >= 0 or start == 0:
        os.ftruncate(fd, start + newline + 1)
    else:  # longer than anything written here: keep it as one damaged line
        _write_all(fd, b"\n")


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
