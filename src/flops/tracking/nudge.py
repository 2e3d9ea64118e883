"""A nudge: one process wakes another on the same machine, through a named pipe.

A nudge carries nothing but "look again", may be lost when nobody listens, and never blocks or fails the
one who rings. Chosen over inotify (needs ctypes), over Unix sockets (their paths are limited to 108
bytes) and over looking every half second.
"""

import contextlib
import errno
import os
import select
from pathlib import Path
from types import TracebackType

from flops.core.errors import ConflictError


class Nudge:
    """The ringing side."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ring(self) -> None:
        """Wake the listener, if there is one."""
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENXIO):  # nobody ever listened; nobody listens now
                return
            raise
        try:
            # A full pipe holds nudges enough; a listener that left just now will look when it comes back.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(fd, b".")
        finally:
            os.close(fd)


class Listener:
    """The woken side: at most one for each path, else they take each other's nudges.

    Raises:
        ConflictError: the path is taken by something that is no pipe.
    """

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        if not path.is_fifo():
            raise ConflictError(f"{path} is not a named pipe - move it away and start again")
        # Open for writing too: a pipe without any writer would report its end for ever.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """For event loops; readable means nudged, `wait` with a timeout of 0 clears it."""
        return self._fd

    def wait(self, timeout_s: float | None) -> bool:
        """Sleep until nudged (true) or until ``timeout_s`` passed; all nudges so far count as one."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(None if timeout_s is None else max(0, round(timeout_s * 1000))):
            return False
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._fd, 4096)) == 4096:
                pass
        return True

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> "Listener":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
