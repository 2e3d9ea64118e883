"""A worker that runs in a container of its own, and comes to its agent through a socket that the two share.

Nothing but that folder is common to them; models and data travel as open files. How the worker's process
ended is told by its keeper (`flops_worker.keeper`).
"""

import os
import socket
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flops.core.errors import InvalidInputError, UnavailableError
from flops.guest.errors import GuestClosed
from flops.guest.process import Isolation
from flops_worker import channel

ATTACH_DEADLINE_S = 600.0
"""How long a worker may take to come: its image has to be fetched first."""

_LONGEST_SOCKET_PATH = 107  # sun_path, without its closing zero
_CREDENTIALS = struct.Struct("3i")
_LOOK_UP_S = 0.2
_MAX_LINES = 20


class Attached:
    """The connection to such a worker; what `flops.guest.process.Process` is to one that we started."""

    isolation = Isolation(network_cut=False, reason="its container takes care of that")

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.channel = sock
        self.pid = pid
        self.exit_code: int | None = None
        self.signal: str | None = None
        self._last_lines: list[str] = []

    @classmethod
    def wait_for(cls, path: Path, deadline_s: float, unwanted: Callable[[], bool]) -> "Attached":
        """See `flops.guest.Guest.attach`."""
        until = time.monotonic() + deadline_s
        with _listen(path) as listener:
            try:
                listener.settimeout(_LOOK_UP_S)
                while time.monotonic() < until:
                    if unwanted():
                        raise GuestClosed(where="the worker")
                    try:
                        sock, _ = listener.accept()
                    except TimeoutError:
                        continue
                    pid, user, _ = _CREDENTIALS.unpack(
                        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                    )
                    if user == os.getuid():
                        return cls(sock, pid)
                    sock.close()  # another user, who cannot have entered the folder by right
            finally:
                path.unlink(missing_ok=True)
        raise UnavailableError(
            f"no worker has come to {path} within {deadline_s:g} s - see the log of the worker's service"
        )

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """The worker's next message; its keeper's last words are the end of the channel."""
        message, files = channel.receive(self.channel)
        end = message.get("ended")
        if isinstance(end, dict):
            channel.close_all(files)
            self._note(end)
            raise channel.ChannelClosed("the worker's process has ended")
        return message, files

    def wait(self, timeout_s: float) -> bool:
        """Hear what the worker's keeper has to say about its end, if anything."""
        try:
            self.channel.settimeout(max(0.001, timeout_s))
            while True:
                _, files = self.receive()
                channel.close_all(files)
        except TimeoutError:
            return False
        except (channel.ChannelClosed, OSError):  # or closed on this side by another thread
            return True

    def end(self) -> None:
        """Nothing: the keeper ends it when the channel is shut."""

    def last_lines(self) -> list[str]:
        return self._last_lines

    def _note(self, end: dict[str, Any]) -> None:
        """Take down how it ended; user code can say this too, and anything else."""
        code, by, lines = end.get("exit_code"), end.get("signal"), end.get("log")
        self.exit_code = code if isinstance(code, int) else None
        self.signal = by if isinstance(by, str) else None
        self._last_lines = [str(line) for line in lines[-_MAX_LINES:]] if isinstance(lines, list) else []


def _listen(path: Path) -> socket.socket:
    """A socket for one worker, in place of what an agent that was killed has left.

    Whoever may enter its folder may connect, so a folder that others can enter is refused.
    """
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise InvalidInputError(f"the worker's socket '{path}' is longer than 107 bytes - use a shorter path")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = path.parent.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise InvalidInputError(
            f"the folder '{path.parent}' of the worker's socket is open to other users - give its volume to "
            f"user {os.getuid()} alone (mode 700)"
        )
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener
