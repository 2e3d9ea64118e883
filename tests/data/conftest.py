"""A real data server as a process of its own, and a client to it."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from flops.data import DataClient

TOKEN = "t0ken-of-the-tests-and-nobody-else"
START_S = 30.0


@dataclass
class RunningServer:
    """One server process; `kill` is -9, `stop` is SIGTERM."""

    home: Path
    process: subprocess.Popen[bytes]
    locations: list[str]

    @property
    def location(self) -> str:
        return self.locations[0]

    @property
    def root(self) -> Path:
        return self.home / "data"

    @property
    def incoming(self) -> list[Path]:
        return list((self.root / "incoming").iterdir())

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


StartServer = Callable[..., RunningServer]


def start(home: Path, *options: str, unix: bool = True) -> RunningServer:
    """Start a server below ``home`` and wait until it says that it listens."""
    token_file = home / "token"
    token_file.write_text(TOKEN + "\n")
    token_file.chmod(0o600)
    command = [sys.executable, "-m", "flops.data.server", "--root", str(home / "data")]
    command += ["--token-file", str(token_file), "--ready-file", str(home / "ready")]
    if unix:
        command += ["--socket", str(home / "run" / "data.sock")]
    with (home / "log").open("ab") as log:
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    with process.stdout as output:
        readable, _, _ = select.select([output], [], [], START_S)
        line = output.readline() if readable else b""
    if not line:
        process.kill()
        process.wait(10)
        raise AssertionError((home / "log").read_text())
    return RunningServer(home, process, json.loads(line)["locations"])


@pytest.fixture(scope="session")
def new_home() -> Iterator[Callable[[], Path]]:
    """Makes folders with paths short enough for a Unix socket, which pytest's own are not."""
    with ExitStack() as stack:

        def make() -> Path:
            folder = Path(tempfile.mkdtemp(prefix="flops-data-"))
            stack.callback(shutil.rmtree, folder)
            return folder

        yield make


@pytest.fixture(scope="session")
def start_data_server(new_home: Callable[[], Path]) -> Iterator[StartServer]:
    """Starts servers; those still running at the end are killed."""
    with ExitStack() as stack:

        def start_one(*options: str, home: Path | None = None, unix: bool = True) -> RunningServer:
            server = start(home or new_home(), *options, unix=unix)
            stack.callback(server.kill)
            return server

        yield start_one


@pytest.fixture(scope="session")
def data_server(start_data_server: StartServer) -> RunningServer:
    """One server for all tests that keep to a site of their own."""
    return start_data_server()


@pytest.fixture
def data_client(data_server: RunningServer) -> Iterator[DataClient]:
    with DataClient(data_server.location, TOKEN) as client:
        yield client


@pytest.fixture
def site(request: pytest.FixtureRequest) -> str:
    """A site that no other test uses."""
    return str(request.node.name)[-100:]


@pytest.fixture
def ipc_file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file.arrow", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


@pytest.fixture
def table() -> pa.Table:
    return pa.table({"x": list(range(100)), "label": ["a", "b"] * 50})
