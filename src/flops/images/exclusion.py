"""One at a time, among threads and processes: an exclusive lock on a file."""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flops.core.errors import FailedError
from flops.images import uv

_WAIT_S = 0.2


@contextmanager
def exclusive(
    path: Path,
    what: str = "",
    tell: uv.Progress | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[int]:
    """Hold the lock; gives its file descriptor, to which a child process may hold on.

    Args:
        path: made where it is missing; it stays.
        what: is being made under the lock, for those who wait.
    Raises:
        FailedError: ``cancel`` was set while waiting.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if tell is not None:
                tell(f"waiting: the same {what} is being made for another project")
            _wait(fd, what, cancel)
        yield fd
    finally:
        os.close(fd)


def _wait(fd: int, what: str, cancel: threading.Event | None) -> None:
    if cancel is None:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return
    while not cancel.wait(_WAIT_S):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return
    raise FailedError(f"waiting for the same {what} was stopped on request")
