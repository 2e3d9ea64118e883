"""Where a data server may listen: a Unix socket in a private folder, TLS, or plain TCP on loopback only."""

import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from flops.core.errors import ConflictError, InvalidInputError

_LONGEST_SOCKET_PATH = 107  # sun_path, without its closing zero


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of the server's certificate chain and its private key, and of the authority that clients must
    be certified by; without one, a token is enough.
    """

    certificate: Path
    key: Path
    authority: Path | None = None

    def options(self) -> dict[str, Any]:
        """What a Flight server is told.

        Raises:
            InvalidInputError: a file cannot be read.
        """
        try:
            pair = (self.certificate.read_bytes(), self.key.read_bytes())
            authority = self.authority.read_bytes() if self.authority is not None else None
            return {
                "tls_certificates": [pair],
                "verify_client": authority is not None,
                "root_certificates": authority,
            }
        except OSError as error:
            raise InvalidInputError(
                f"the TLS file '{error.filename}' cannot be read ({error.strerror}) - check its path"
            ) from error


def unix_location(path: Path) -> str:
    """The Flight location of a Unix socket."""
    # Quoted twice because it is unquoted twice, by Arrow and by gRPC.
    return "grpc+unix://" + quote(quote(str(path.absolute())))


def prepare_socket(path: Path) -> str:
    """Make the socket's folder (mode 700) and return the location to listen on.

    Whoever may enter the folder may connect, so a folder that others can enter is refused.

    Raises:
        InvalidInputError: the folder is open to others, or the path is too long.
        ConflictError: a server is listening there.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise InvalidInputError(
            f"the socket path '{path}' is longer than {_LONGEST_SOCKET_PATH} bytes - use a shorter one"
        )
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise InvalidInputError(
            f"the socket's folder '{folder}' is open to other users - run 'chmod 700' on it, "
            "or use another folder"
        )
    with socket.socket(socket.AF_UNIX) as probe:
        # gRPC would take over the socket of a living server without a word.
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return unix_location(path)
    raise ConflictError(f"another server listens on '{path}' - stop it, or use another --socket")


def check_listen(location: str) -> tuple[str, int]:
    """Check a network location to listen on: ``grpc+tls://HOST:PORT`` or, on loopback,
    ``grpc://HOST:PORT``.

    Returns: host and port.

    Raises:
        InvalidInputError: another form, or plain TCP that others can reach.
        ConflictError: the port is taken.
    """
    try:
        parts = urlsplit(location)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.scheme not in ("grpc+tls", "grpc", "grpc+tcp"):
        raise InvalidInputError(
            f"cannot listen on '{location}' - use grpc+tls://HOST:PORT (grpc://127.0.0.1:PORT to test)"
        )
    if parts.scheme != "grpc+tls" and not _is_loopback(host):
        raise InvalidInputError(
            f"'{location}' would send data unencrypted - use grpc+tls:// with --tls-cert and --tls-key"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # gRPC shares a port (SO_REUSEPORT) with whoever else does: two servers would answer in turn.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConflictError(
                f"cannot listen on '{location}': {error.strerror} - use another port or host"
            ) from error
    return host, port


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
