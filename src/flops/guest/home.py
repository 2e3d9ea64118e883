"""The temporary home of one guest: its HOME and TMPDIR, gone when the guest is."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "flops-guest-home-"


class Home:
    """A fresh folder, locked while it is in use.

    A process that is killed leaves its home behind, and the kernel frees its lock: so every new home sweeps
    those that nobody holds.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        for stale in parent.glob(f"{_PREFIX}*"):
            _remove_unless_held(stale)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            lock = _lock(self.path)
            if lock is not None:
                self._lock = lock
                return
            # Swept by another process between making and locking it.

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _lock(folder: Path) -> int | None:
    """The lock of a folder as an open file; None where another holds it, or it is gone or not ours."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_uid == os.getuid() and folder.exists():
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    return None


def _remove_unless_held(folder: Path) -> None:
    lock = _lock(folder)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
