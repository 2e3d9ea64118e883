"""A FLOPS_HOME belongs to one manager: the lock, the token, the address and the port.

Managers of one PostgreSQL share the lock, and the lease in that database tells who of them acts: a lock would
stay with one that is frozen.
"""

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from flops.core.errors import ConflictError, InvalidInputError, UnavailableError
from flops.core.settings import Settings
from flops.manager.databases import check_database, is_remembered, remember_database
from flops.manager.paths import read_or_make_token, write_private, write_private_json

DEFAULT_PORT = 8780
"""Of the REST API for other machines."""
_STARTS_WITHIN_S = 5.0
_DAYS = 365.0
"""That a certificate of a listener is good for; a new one comes half-way."""
_ANY = ("0.0.0.0", "::")  # noqa: S104 - what an operator may ask for


@dataclass(frozen=True)
class TlsListener:
    """A socket that listens to other machines, and the PEM files that it proves itself with."""

    listener: socket.socket
    certificate: Path
    key: Path
    names: tuple[str, ...]
    """How it may be called."""
    renew: Callable[[], object] = field(repr=False)
    """Puts a new certificate and key into the files."""
    days: float
    """That a certificate is issued for."""

    def due_in_s(self) -> float:
        """Until the certificate has half of its life behind it; negative: it has."""
        from flops.manager.authority import days_left

        left = days_left(self.certificate.read_text(encoding="ascii"))
        return (left - self.days / 2) * 86400

    @property
    def url(self) -> str:
        return remote_url(self.names[0], self.listener.getsockname()[1])


def local_url(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def remote_url(host: str, port: int) -> str:
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


class Home:
    """A claimed FLOPS_HOME; the claim ends with the process, however it ends."""

    def __init__(self, settings: Settings, lock_fd: int, *, shared: bool = False) -> None:
        self.settings = settings
        self._shared = shared
        self._standby_file = settings.standby_dir / f"{uuid.uuid4().hex[:12]}.json"
        self.token = read_or_make_token(settings.token_file)
        self._lock_fd = lock_fd

    def listen(self) -> socket.socket:
        """The socket of the REST API, on loopback: the wanted port, else the one of last time, else any.

        Raises:
            ConflictError: the wanted port is taken.
        """
        wanted = self.settings.port
        last = 0 if self.settings.standby else self._last_port()  # which is that of the one who acts
        for port in [wanted] if wanted else [last, 0]:
            listener = _stream_socket(socket.AF_INET)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
                listener.listen(128)
            except OSError:
                listener.close()
                continue
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

    def listen_for_remote_reports(self, host: str, *, days: float = _DAYS) -> TlsListener:
        """The socket where services of other machines report, on the address at which they reach this one;
        the port is that of last time, where it is free.

        Raises:
            UnavailableError: this machine cannot listen there.
        """
        kept = self.settings.home / "reports.port"
        try:
            last = int(kept.read_text())
        except (OSError, ValueError):
            last = 0
        try:
            listener = _listen(host, (last, 0))
        except OSError as error:
            raise UnavailableError(
                f"the manager cannot listen on {host}, where services would report ({error.strerror}) - set "
                "FLOPS_ADVERTISE to an address of this machine that they reach"
            ) from error
        write_private(kept, f"{listener.getsockname()[1]}\n")
        return self._with_certificate(listener, "manager", (host,), days)

    def listen_on_network(self) -> TlsListener | None:
        """The socket of the REST API for other machines; None: nobody asked for one.

        Raises:
            InvalidInputError: the wanted address is none.
            UnavailableError: this machine cannot listen there.
        """
        wanted = self.settings.listen
        if wanted is None:
            return None
        host, port = _host_and_port(wanted)
        try:
            listener = _listen(host, (port,))
        except OSError as error:
            raise UnavailableError(
                f"the manager cannot listen on {wanted} ({error.strerror}) - choose another address of this "
                "machine, or another port"
            ) from error
        own = [host] if host not in _ANY else [socket.gethostname(), *_addresses()]
        return self._with_certificate(
            listener, "api", tuple(dict.fromkeys([*self.settings.names, *own])), _DAYS
        )

    def _with_certificate(
        self, listener: socket.socket, file: str, names: tuple[str, ...], days: float
    ) -> TlsListener:
        from flops.manager.authority import Authority  # managers of this machine alone need none of it

        authority = Authority(self.settings.authority_dir)
        renew = partial(authority.issue_files, file, "FLOps manager", names, days=days)
        certificate, key = renew()
        return TlsListener(listener, certificate, key, names, renew, days)

    def announce(self, listener: socket.socket) -> str:
        """Write the address file: from now on callers find this manager."""
        url = local_url(listener)
        write_private(self._port_file, f"{listener.getsockname()[1]}\n")
        write_private_json(self.settings.address_file, {"url": url, "pid": os.getpid()})
        self._standby_file.unlink(missing_ok=True)
        return url

    def announce_standby(self, listener: socket.socket) -> str:
        """Write an address file of its own for a manager that waits; until it is announced itself."""
        url = local_url(listener)
        self.settings.standby_dir.mkdir(mode=0o700, exist_ok=True)
        write_private_json(self._standby_file, {"url": url, "pid": os.getpid()})
        return url

    def withdraw(self) -> None:
        """Nobody finds this manager any more; one that has taken over stays found. Before its lease ends."""
        if not self._shared or self._is_announced():
            self.settings.address_file.unlink(missing_ok=True)
            self.settings.manager_socket.unlink(missing_ok=True)

    def _is_announced(self) -> bool:
        with suppress(OSError, ValueError, KeyError, TypeError):
            announced = json.loads(self.settings.address_file.read_text(encoding="utf-8"))
            return bool(announced["pid"] == os.getpid())
        return False

    def leave(self) -> None:
        """Another manager may come."""
        self.withdraw()
        self._standby_file.unlink(missing_ok=True)
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


def _listen(host: str, ports: Sequence[int]) -> socket.socket:
    """A socket on the first of the ports that is free; 0 is any.

    Raises:
        OSError: none is, or the host is not of this machine.
    """
    family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    for port in ports:
        listener = _stream_socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address[0], port))
            listener.listen(128)
        except OSError:
            listener.close()
            if port == ports[-1]:
                raise
            continue
        return listener
    raise AssertionError("unreachable")


def _stream_socket(family: int) -> socket.socket:
    """With its protocol named: asyncio switches Nagle's algorithm off for no other, and then answers wait for
    the caller's delayed acknowledgement, 40 ms.
    """
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        host, port = text, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InvalidInputError(
            f"'{text[:80]}' is no address to listen on - use HOST:PORT, such as 0.0.0.0:8780"
        )
    return host, int(port)


def _addresses() -> list[str]:
    """At which other machines reach this one, as far as its own name tells."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(entry[4][0]).partition("%")[0] for entry in found]


def claim_home(settings: Settings, *, shared: bool = False) -> Home:
    """Take the lock of the FLOPS_HOME.

    Args:
        shared: with other managers of the same PostgreSQL.
    Raises:
        ConflictError: another manager has it, or the home's projects are in another database.
    """
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(settings.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if shared:
            _share(fd, settings)
        else:
            _lock(fd, fcntl.LOCK_EX, settings)
        os.ftruncate(fd, 0)
        if not shared:
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return Home(settings, fd, shared=shared)


def _share(fd: int, settings: Settings) -> None:
    """Share the lock with whoever works with the same database; to change that needs the home alone."""
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while True:
        known = is_remembered(settings)
        try:
            _lock(fd, fcntl.LOCK_SH if known else fcntl.LOCK_EX, settings)
        except ConflictError:  # somebody who starts has it alone for a moment
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
            continue
        break
    if not known:
        check_database(settings)
        remember_database(settings)
        fcntl.flock(fd, fcntl.LOCK_SH)


def _lock(fd: int, mode: int, settings: Settings) -> None:
    try:
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.pread(fd, 32, 0).decode().strip()
        who = f"another manager (pid {pid})" if pid else "another manager"
        raise ConflictError(
            f"{who} already uses {settings.home} - stop it with 'flops down', or choose another FLOPS_HOME"
        ) from error
