"""A FLOPS_HOME belongs to one manager: the lock, the token, the address and the port."""

import fcntl
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flops.core.errors import ConflictError, UnavailableError
from flops.core.settings import Settings
from flops.manager.paths import read_or_make_token, write_private, write_private_json


@dataclass(frozen=True)
class RemoteReports:
    """Where services of other machines report: a socket that listens, and the PEM files that it proves itself
    with.
    """

    listener: socket.socket
    certificate: Path
    key: Path

    @property
    def url(self) -> str:
        return remote_url(*self.listener.getsockname()[:2])


def remote_url(host: str, port: int) -> str:
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


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

    def listen_for_remote_reports(self, host: str) -> RemoteReports:
        """The socket where services of other machines report, on the address at which they reach this one;
        the port is that of last time, where it is free.

        Raises:
            UnavailableError: this machine cannot listen there.
        """
        from flops.manager.authority import Authority  # managers of programs need none of it

        try:
            family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise _cannot_listen(host, error) from error
        ports = self.settings.home / "reports.port"
        try:
            last = int(ports.read_text())
        except (OSError, ValueError):
            last = 0
        for port in (last, 0):
            listener = socket.socket(family)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((address[0], port))
                listener.listen(128)
            except OSError as error:
                listener.close()
                if port == 0:
                    raise _cannot_listen(host, error) from error
                continue
            break
        write_private(ports, f"{listener.getsockname()[1]}\n")
        issued = Authority(self.settings.authority_dir).issue("FLOps manager", [host])
        certificate, key = (self.settings.authority_dir / f"manager.{kind}" for kind in ("pem", "key"))
        write_private(certificate, issued.certificate)
        write_private(key, issued.key)
        return RemoteReports(listener, certificate, key)

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


def _cannot_listen(host: str, error: OSError) -> UnavailableError:
    return UnavailableError(
        f"the manager cannot listen on {host}, where services would report ({error.strerror}) - set "
        "FLOPS_ADVERTISE to an address of this machine that they reach"
    )


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
