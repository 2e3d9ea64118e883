"""PostgreSQL 15 for tests: a real server of our own, in a temporary folder, on a free loopback port.

Debian's package starts a cluster of its own; nothing here touches it. The server sorts text as people do
(ICU, en-US), not by bytes as SQLite does, so that no test relies on one order.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

BINARIES = Path("/usr/lib/postgresql/15/bin")
USER = "flops"
_STARTS_WITHIN_S = 30.0
_TEMPLATE = "migrated"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "16MB",
    "max_connections": "100",
    "fsync": "off",  # our tests kill the server, never the machine
    "autovacuum": "off",
}


def postgres_installed() -> bool:
    return (BINARIES / "postgres").exists() and shutil.which("setpriv") is not None


@dataclass
class PostgresServer:
    """One server, which can be killed and started again on the same port and folder."""

    folder: Path
    port: int
    password: str = field(default_factory=lambda: f"se/cr@t {secrets.token_hex(8)}")
    _process: "subprocess.Popen[bytes] | None" = None
    _databases: int = 0

    def initialize(self) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        _hand_over(self.folder, secret)
        subprocess.run(
            [
                *_as_nobody(),
                str(BINARIES / "initdb"),
                f"--pgdata={self.folder / 'data'}",
                f"--username={USER}",
                f"--pwfile={secret}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--locale-provider=icu",
                "--icu-locale=en-US",
                "--no-sync",
            ],
            check=True,
            capture_output=True,
            cwd=self.folder,
        )

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *_as_nobody(),
                    str(BINARIES / "postgres"),
                    f"-D{self.folder / 'data'}",
                    f"-p{self.port}",
                    *(f"-c{name}={value}" for name, value in _SETTINGS.items()),
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
            )
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.execute("SELECT 1")
            except psycopg.OperationalError:
                time.sleep(0.02)
            else:
                return
        self.stop()
        raise RuntimeError(f"postgres does not start: {(self.folder / 'log').read_text()[-500:]}")

    def stop(self, number: int = signal.SIGINT) -> None:
        """End the server: SIGINT as an operator would, SIGQUIT without a farewell, or SIGKILL."""
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.wait(timeout=30)
        self._process = None

    def kill(self) -> None:
        """Kill the server and its processes, as losing power would."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in (str(self._process.pid), *children):
            os.kill(int(pid), signal.SIGKILL)
        self._process.wait(timeout=30)
        self._process = None
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
            time.sleep(0.01)

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run one statement, outside any transaction."""
        with closing(
            psycopg.connect(
                host="127.0.0.1",
                port=self.port,
                user=USER,
                password=self.password,
                dbname=database,
                autocommit=True,
                connect_timeout=5,
            )
        ) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def url(self, database: str, user: str = USER, password: str | None = None) -> str:
        quoted = (password or self.password).replace("/", "%2F").replace("@", "%40").replace(" ", "%20")
        return f"postgresql://{user}:{quoted}@127.0.0.1:{self.port}/{database}"

    def empty_database(self) -> str:
        """The URL of a new database without any table."""
        self._databases += 1
        name = f"test{self._databases}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return self.url(name)

    def database(self) -> str:
        """The URL of a new database with the manager's tables: a copy, which is made in a fraction of the
        time that migrations take.
        """
        from flops.persistence import open_database

        if not self.execute(f"SELECT 1 FROM pg_database WHERE datname = '{_TEMPLATE}'"):
            self.execute(f"CREATE DATABASE {_TEMPLATE} TEMPLATE template0")
            open_database(self.url(_TEMPLATE)).dispose()
        self._databases += 1
        name = f"test{self._databases}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE} STRATEGY file_copy")
        return self.url(name)


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A server that runs; neither a process nor a file is left of it."""
    # pytest's own temporary folders are closed to the user that the server runs as.
    folder = Path(tempfile.mkdtemp(prefix="flops-postgres-"))
    server = PostgresServer(folder, _free_port())
    try:
        server.initialize()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


def _as_nobody() -> list[str]:
    """PostgreSQL refuses to run as root; and it ends with us, should we be killed."""
    command = ["setpriv", "--pdeathsig=QUIT"]
    if os.geteuid() == 0:
        command += ["--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    return [*command, "--"]


def _hand_over(*paths: Path) -> None:
    if os.geteuid() == 0:
        for path in paths:
            shutil.chown(path, "nobody", "nogroup")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
