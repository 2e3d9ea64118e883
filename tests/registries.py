"""Image registries for tests: real docker-registry processes on free loopback ports."""

import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flops.images.registry_service import registry_command

USER, PASSWORD = "ali", "open sesame"
_HTPASSWD = f"{USER}:$2b$05$XIwKAZTJogv1rd9I9m.Ex.2mtIJgI92XM5Zr9oqhGuQOzHElQApZS\n"
_STARTS_WITHIN_S = 20.0


@dataclass
class RegistryProcess:
    """One docker-registry, which can be killed and started again on the same port and folder."""

    folder: Path
    port: int
    htpasswd: Path | None = None
    certificate: tuple[Path, Path] | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    """Settings by environment, such as REGISTRY_AUTH_TOKEN_REALM."""
    _process: "subprocess.Popen[bytes] | None" = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def storage(self) -> Path:
        return self.folder / "storage" / "docker" / "registry" / "v2"

    def blob(self, digest: str) -> Path:
        """The file in which the registry keeps a blob."""
        hexadecimal = digest.removeprefix("sha256:")
        return self.storage / "blobs" / "sha256" / hexadecimal[:2] / hexadecimal / "data"

    def tags(self, repository: str) -> list[str]:
        folder = self.storage / "repositories" / repository / "_manifests" / "tags"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def log(self) -> str:
        return (self.folder / "log").read_text("utf-8", "replace")

    def start(self) -> None:
        command, environment = registry_command(
            self.folder, "127.0.0.1", self.port, htpasswd=self.htpasswd, certificate=self.certificate
        )
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env={**environment, **self.extra}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        scheme = "https" if self.certificate else "http"
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(httpx.TransportError):
                httpx.get(f"{scheme}://{self.host}/v2/", verify=False, trust_env=False)
                return
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"docker-registry does not start: {self.log()[-500:]}")

    def kill(self) -> None:
        """As a crash does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


@contextmanager
def running_registry(folder: Path, **settings: Any) -> Iterator[RegistryProcess]:
    """A registry for the time of a ``with`` block; ``settings``: fields of `RegistryProcess`."""
    folder.mkdir(parents=True, exist_ok=True)
    process = RegistryProcess(folder, free_port(), **settings)
    process.start()
    try:
        yield process
    finally:
        process.stop()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def htpasswd(folder: Path) -> Path:
    """A file that knows `USER` with `PASSWORD`."""
    file = folder / "htpasswd"
    file.write_text(_HTPASSWD)
    return file


@dataclass(frozen=True)
class Authority:
    """A certificate authority of our own, and what it signed for 127.0.0.1."""

    ca: Path
    certificate: Path
    key: Path


def authority(folder: Path) -> Authority:
    now = datetime.datetime.now(datetime.UTC)

    def build(name: str, issuer: str, key: Any, signing: Any, *, ca: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        return builder.sign(signing, hashes.SHA256())

    ca_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    made = Authority(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    made.ca.write_bytes(
        build("test authority", "test authority", ca_key, ca_key, ca=True).public_bytes(
            serialization.Encoding.PEM
        )
    )
    made.certificate.write_bytes(
        build("127.0.0.1", "test authority", server_key, ca_key, ca=False).public_bytes(
            serialization.Encoding.PEM
        )
    )
    made.key.write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    made.key.chmod(0o600)
    return made


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Let ``folder`` be a file system of a few megabytes; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True, timeout=30
    )
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


def resize_disk(folder: Path, megabytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={megabytes}m", str(folder)], check=True, timeout=30)


def can_mount() -> bool:
    """Whether `small_disk` can work here."""
    return (
        os.geteuid() == 0
        and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    )


@dataclass(frozen=True)
class Asked:
    """One request to a `scripted` registry; ``read`` reads that many bytes of its body."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    read: Callable[[int], bytes]


Reply = tuple[int, Mapping[str, str], bytes]


@contextmanager
def scripted(answer: Callable[[Asked], Reply | None]) -> Iterator[str]:
    """A registry that does what no honest one does; gives ``host:port``.

    ``answer`` gives status, headers and body; None: hang up without a word.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            split = urlsplit(self.path)
            asked = Asked(
                self.command,
                split.path,
                parse_qs(split.query, keep_blank_values=True),
                {key.lower(): value for key, value in self.headers.items()},
                self.rfile.read,
            )
            reply = answer(asked)
            if reply is None:
                self.close_connection = True
                return
            status, headers, body = reply
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                with suppress(OSError):
                    self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
