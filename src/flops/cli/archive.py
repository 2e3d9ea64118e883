"""Unpacking a model's archive into a new folder; nothing in it can reach outside."""

import contextlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from flops.core.errors import ConflictError, FailedError


def receive(download: Callable[[BinaryIO], None], folder: Path) -> list[Path]:
    """Download a tar archive and unpack it as ``folder``: all of it or nothing.

    Returns:
        The files, relative to the folder.
    Raises:
        ConflictError: the folder exists and is not empty.
        FailedError: the archive is damaged, or holds anything but plain files below it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(f"'{folder}' exists already - choose another place with --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with tempfile.TemporaryFile(dir=scratch) as file:
            download(file)
            file.seek(0)
            files = _unpack(file, scratch)
        scratch.chmod(0o777 & ~_umask())
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return files


def _unpack(file: BinaryIO, folder: Path) -> list[Path]:
    files = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if not (member.isreg() or member.isdir()) or path.is_absolute() or ".." in path.parts:
                    raise FailedError(
                        f"the model's archive holds '{member.name}', which is no plain file below it - "
                        "nothing was unpacked"
                    )
                # Older patch releases of 3.11 lack the filter; the check above does not depend on it.
                if hasattr(tarfile, "data_filter"):
                    archive.extract(member, folder, filter="data")
                else:
                    archive.extract(member, folder, set_attrs=False)
                if member.isreg():
                    files.append(Path(path))
    except (tarfile.TarError, EOFError) as error:
        raise FailedError(f"the model's archive is damaged ({error}) - try again") from error
    return sorted(files)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
