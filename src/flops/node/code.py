"""A project's code: a tar archive from the manager, laid down as files and folders and nothing else."""

import hashlib
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from flops.core.errors import FailedError, InvalidInputError

MAX_FILES = 100_000
MAX_DEPTH = 64
_MAX_NAME = 255
_PART_BYTES = 1 << 20


class Bounded:
    """A file that takes what it was promised, and no more.

    Args:
        check: called at each part; what it raises ends the transfer.
    """

    def __init__(self, file: BinaryIO, size_bytes: int, check: Callable[[], None]) -> None:
        self._file, self._left, self._check = file, size_bytes, check
        self._digest = hashlib.sha256()

    def write(self, part: bytes) -> int:
        self._check()
        self._left -= len(part)
        if self._left < 0:
            raise FailedError("the code is larger than the manager said - it is not taken")
        self._digest.update(part)
        return self._file.write(part)

    def ended(self, sha256: str) -> None:
        """Raises FailedError: it is not what was promised."""
        if self._left != 0 or self._digest.hexdigest() != sha256:
            raise FailedError("the code is not what the manager said it would be - it is not taken")


def lay_down(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder that appears whole or not at all.

    Raises:
        InvalidInputError: it holds what is no regular file or folder, a name that leads elsewhere, or more
            than a repository has.
    """
    aside = folder.with_name(f".{folder.name}.new")
    if aside.exists():  # of a node that was killed
        shutil.rmtree(aside)
    aside.mkdir(parents=True, mode=0o700)
    try:
        _unpack(archive, aside)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive, mode="r:") as tar:
            for member in _members(tar):
                _write(tar, member, folder)
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise InvalidInputError(f"the code is no archive that can be read: {error}") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise InvalidInputError("the code has two things of one name - it is not taken") from error


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for number, member in enumerate(tar, start=1):
        if number > MAX_FILES:
            raise InvalidInputError(f"the code has more than {MAX_FILES} files - it is not taken")
        path = PurePosixPath(member.name)
        strange = (
            not member.name
            or path.is_absolute()
            or ".." in path.parts
            or ".git" in path.parts
            or len(path.parts) > MAX_DEPTH
            or any(len(part.encode()) > _MAX_NAME or "\0" in part for part in path.parts)
        )
        if strange:
            raise InvalidInputError(f"the code has a file called '{member.name[:80]}' - it is not taken")
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise InvalidInputError(
                f"'{member.name[:80]}' in the code is no regular file or folder - it is not taken"
            )
        yield member


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    target = folder / member.name
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None
    mode = 0o700 if member.mode & 0o100 else 0o600
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with source, os.fdopen(fd, "wb") as file:
        shutil.copyfileobj(source, file, _PART_BYTES)
