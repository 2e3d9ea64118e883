"""A FLOPS_HOME belongs to one manager: the lock, the token, the address and the port."""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from flops.core.errors import ConflictError
from flops.core.settings import Settings
from flops.manager.paths import read_or_make_token, write_private, write_private_json


class Home:
    """A claimed FLOPS_HOME; the claim ends with the process, however it ends."""

    def __init__(self, settings: Settings, lock_fd: int) -> None:
        self.settings = settings
        self.token = read_or_make_token(settings.token_file)
        self._lock_fd = lock_fd

    def listen(self) -> socket.socket:
        """The socket of the REST API, on loopback: the wanted port, else the one of last time, else any.

        Raises:
            ConflictError: the wanted port is taken.
        """
        wanted = self.settings.port
        last = self._last_port()
        for port in [wanted] if wanted else [last, 0]:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
                listener.listen(128)
            except OSError:
                listener.close()
                continue
            write_private(self._port_file, f"{listener.getsockname()[1]}\n")
            return listener
        raise ConflictError(
            f"port {wanted} on 127.0.0.1 is taken - choose another with --port, or leave it out for any "
            "free one"
        )

    def listen_for_reports(self) -> socket.socket:
        """The Unix socket where services of this machine report; in a folder of mode 700."""
        path = self.settings.manager_socket
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)
        path.unlink(missing_ok=True)  # of a manager that was killed; ours is the lock
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(128)
        return listener

    def announce(self, listener: socket.socket) -> str:
        """Write the address file: from now on callers find this manager."""
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        write_private_json(self.settings.address_file, {"url": url, "pid": os.getpid()})
        return url

    def leave(self) -> None:
        """Nobody finds this manager any more, and another may come."""
        self.settings.address_file.unlink(missing_ok=True)
        self.settings.manager_socket.unlink(missing_ok=True)
        if self.settings.home not in self.settings.run_dir.parents:
            with suppress(OSError):  # sockets of services that go on are still in it
                self.settings.run_dir.rmdir()
        os.close(self._lock_fd)

    @property
    def _port_file(self) -> Path:
        return self.settings.home / "port"

    def _last_port(self) -> int:
        with suppress(OSError, ValueError):
            port = int(self._port_file.read_text())
            return port if 1024 <= port < 1 << 16 else 0
        return 0


def claim_home(settings: Settings) -> Home:
    """Take the lock of the FLOPS_HOME.

    Raises:
        ConflictError: another manager has it.
    """
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(settings.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.pread(fd, 32, 0).decode().strip() or "unknown"
        os.close(fd)
        raise ConflictError(
            f"another manager (pid {pid}) already uses {settings.home} - stop it with 'flops down', "
            "or choose another FLOPS_HOME"
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return Home(settings, fd)
