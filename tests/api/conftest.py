"""A real manager process on a FLOPS_HOME of its own."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

DEADLINE_S = 60.0

OPEN = (
    "/v1/health",
    "/v1/authority",
    "/v1/node/join",
    "/v1/oidc",
    "/v1/oidc/begin",
    "/v1/oidc/finish",
)
"""Answered without a user's token."""


class ManagerProcess:
    """One FLOPS_HOME, and the manager that runs on it at present."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[httpx.Client] = []

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        return self.home.with_suffix(".log").read_text()

    def start(self) -> "ManagerProcess":
        with self.home.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flops.manager", "--home", str(self.home), *self._arguments],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        wait_for(self._is_announced, f"the manager's address; its log: {self.log}")
        return self

    def client(self, token: str | None = None) -> httpx.Client:
        token = self.token if token is None else token
        client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=DEADLINE_S,
            trust_env=False,
        )
        self._clients.append(client)
        return client

    @property
    def url(self) -> str:
        return str(json.loads((self.home / "manager.json").read_text())["url"])

    @property
    def token(self) -> str:
        return (self.home / "token").read_text().strip()

    def kill(self) -> None:
        """kill -9; its services live on."""
        self.process.kill()
        self.reap()

    def reap(self) -> int:
        code = self.process.wait(DEADLINE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def end(self) -> None:
        """Nothing that was started on this home is left."""
        if self._process is None:
            return
        if self.process.poll() is not None:
            with suppress(OSError):
                self.reap()
            self.start()
        self.client().post("/v1/shutdown", json={"force": True}).raise_for_status()
        self.reap()
        for client in self._clients:
            client.close()
        assert processes_of(self.home) == []

    def _is_announced(self) -> bool:
        assert self.process.poll() is None, self.log
        with suppress(FileNotFoundError, ValueError):
            return bool(json.loads((self.home / "manager.json").read_text())["pid"] == self.process.pid)
        return False


def processes_of(home: Path) -> list[str]:
    """Command lines of processes that were started for this home."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(home) in line and "pytest" not in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {deadline_s:g} s for {what}"
        time.sleep(0.02)


@pytest.fixture
def own_manager(tmp_path: Path) -> Iterator[ManagerProcess]:
    """A manager of the test's own, to be killed and started again."""
    manager = ManagerProcess(tmp_path / "home").start()
    yield manager
    manager.end()


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagerProcess]:
    """One manager for all tests of a module, which leave it running."""
    manager = ManagerProcess(tmp_path_factory.mktemp("api") / "home").start()
    yield manager
    manager.end()


@pytest.fixture
def client(manager: ManagerProcess) -> httpx.Client:
    return manager.client()


@pytest.fixture
def still_running() -> Callable[[Path], list[str]]:
    return processes_of


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A repository whose server takes connections and says nothing: fetching it lasts for ever."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"https://127.0.0.1:{listener.getsockname()[1]}/nothing.git"
