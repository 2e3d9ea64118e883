"""The room: which interpreter and which checkout a guest runs with, and what it finds around it."""

import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import flops_worker
from flops.core.errors import NotFoundError, UnauthorizedError
from flops_worker.surroundings import settings

# What a guest may see of our environment. FLOPS_SERVICE marks the processes of a service: all must be found.
_PASSED_ON = (
    "FLOPS_SERVICE",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
)


@dataclass(frozen=True)
class Room:
    """The user's environment and checkout."""

    python: Path
    """Interpreter of the environment."""
    code: Path
    """Root of the checkout: working directory and first import path of the guest."""

    def check(self) -> None:
        """Raise NotFoundError if there is nothing to start."""
        if not os.access(self.python, os.X_OK):
            raise NotFoundError(f"interpreter {self.python} cannot be run - make the environment again")
        if not self.code.is_dir():
            raise NotFoundError(f"checkout {self.code} is not a folder - fetch the repository again")


def guest_path(cache: Path | None = None) -> Path:
    """The folder that a guest imports FLOps from: flops_worker and flops_utils, and nothing else of ours.

    Made below `cache` (default: the system's temporary folder) under a name with the hash of its contents,
    so versions live side by side. Safe to call from many processes at once: files are put in place whole.

    Raises:
        UnauthorizedError: the folder is another user's, or others may write to it.
    """
    files = _files()
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    root = cache or Path(tempfile.gettempdir())
    folder = root / f"flops-guest-{os.getuid()}-{digest.hexdigest()[:16]}"
    root.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_ours(folder)
    for name, content in files.items():
        target = folder / name
        try:
            if target.read_bytes() == content:
                continue
        except FileNotFoundError:
            target.parent.mkdir(mode=0o700, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(target)
    return folder


def environment(room: Room, path: Path, home: Path, threads: int | None) -> dict[str, str]:
    """The whole environment of a guest: no secrets, no proxies, and the settings of any user code."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        **settings(str(home), threads),
        **passed_on,
        "PATH": os.pathsep.join((str(room.python.parent), "/usr/local/bin", "/usr/bin", "/bin")),
        "PYTHONPATH": str(path),
    }


def _files() -> dict[str, bytes]:
    """Contents of all modules of the two packages, by their path below the folder."""
    source = Path(flops_worker.__file__).parent.parent
    return {
        f"{package}/{file.name}": file.read_bytes()
        for package in ("flops_worker", "flops_utils")
        for file in (source / package).glob("*.py")
    }


def _check_ours(folder: Path) -> None:
    status = folder.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.getuid()
        or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise UnauthorizedError(
            f"{folder} is not a private folder of this user, code in it cannot be trusted - remove it"
        )
