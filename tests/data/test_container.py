"""A data server in a container: told everything by one file, near by a socket, from afar over TLS."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from flops.core.errors import InvalidInputError, UnauthorizedError, UnavailableError
from flops.data import DataClient, unix_location
from flops.data.config import DataServerConfig
from flops.manager.authority import Authority
from tests.data.conftest import TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Require

CONTAINED = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
READ_IN_A_CONTAINER = """
import sys
from flops.data import DataClient, unix_location
from pathlib import Path
with DataClient(unix_location(Path(sys.argv[1])), sys.argv[2]) as client:
    print(client.get_matching(["t"], "north").num_rows)
"""


def client_files(authority: Authority, folder: Path) -> dict[str, Any]:
    """What a client proves itself with."""
    issued = authority.issue("manager", client=True)
    files = {"tls_cert": folder / "client.pem", "tls_key": folder / "client.key"}
    files["tls_cert"].write_text(issued.certificate)
    files["tls_key"].write_text(issued.key)
    return files


class Contained:
    """A data server as the first process of its own."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.authority = Authority(home / "authority")
        issued = self.authority.issue("data-server", ["127.0.0.1"])
        (home / "cert.pem").write_text(issued.certificate)
        (home / "key.pem").write_text(issued.key)
        self.manager = client_files(self.authority, home)
        self.config = DataServerConfig(
            root=str(home / "lib"),
            token=TOKEN,
            socket=str(home / "run" / "data.sock"),
            listen=f"grpc+tls://0.0.0.0:{self.port}",
            tls_cert=str(home / "cert.pem"),
            tls_key=str(home / "key.pem"),
            tls_ca=str(self.authority.certificate_file),
        )
        self.socket = home / "run" / "data.sock"
        (home / "config.json").write_text(self.config.to_json())
        command = [sys.executable, "-P", "-m", "flops.data.server", "--config", str(home / "config.json")]
        self.log = home / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*CONTAINED, *command], stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 30.0)
        line = self.process.stdout.readline() if ready else b""
        assert line, (home / "log").read_text()
        self.locations = json.loads(line)["locations"]

    def stop(self) -> int:
        """As an engine does: the signal goes to the first process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        os.kill(int(children), signal.SIGTERM)
        try:
            return self.process.wait(60.0)
        except subprocess.TimeoutExpired as error:
            threads = [
                f"{thread.name} {(thread / 'wchan').read_text()} {(thread / 'syscall').read_text().strip()}"
                for thread in Path(f"/proc/{int(children)}/task").iterdir()
            ]
            raise AssertionError("\n".join([self.log.read_text(), *threads])) from error

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@pytest.fixture
def contained(new_home: Callable[[], Path], require: Require) -> Iterator[Contained]:
    probe = subprocess.run([*CONTAINED, "true"], capture_output=True, check=False)
    require(probe.returncode == 0, f"a namespace ({probe.stderr.decode().strip()})")
    server = Contained(new_home())
    yield server
    server.close()


def test_the_manager_reaches_a_node_over_tls_and_agents_of_the_node_its_socket(
    contained: Contained, table: pa.Table, tmp_path: Path
) -> None:
    assert contained.locations == [
        unix_location(contained.socket),
        f"grpc+tls://0.0.0.0:{contained.port}",
    ]
    node = f"grpc+tls://127.0.0.1:{contained.port}"
    trusted = contained.authority.certificate_file
    with DataClient(node, TOKEN, tls_ca=trusted, **contained.manager) as manager:
        fragment = manager.put(table, ["t"], "north", labels={"region": "north"})
        assert manager.list(["t"]) == [fragment]
        assert [(one.site, set(one.tags)) for one in manager.list()] == [("north", {"t"})]
        assert manager.ping().fragments == 1
    read = subprocess.run(
        [
            *("unshare", "--mount", "--net", sys.executable, "-c", READ_IN_A_CONTAINER),
            *(str(contained.socket), TOKEN),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert read.stdout == "100\n", read.stderr
    wrong = "a-token-of-somebody-else"
    with (
        DataClient(node, wrong, tls_ca=trusted, **contained.manager) as client,
        pytest.raises(UnauthorizedError),
    ):
        client.ping()
    stranger = Authority(tmp_path / "stranger")
    server = {
        "tls_cert": Path(contained.config.tls_cert or ""),
        "tls_key": Path(contained.config.tls_key or ""),
    }
    for ca, proof in (
        (stranger.certificate_file, contained.manager),
        (trusted, {}),
        (trusted, client_files(stranger, tmp_path)),
        (trusted, server),  # a server's certificate is good for no caller
    ):
        with DataClient(node, TOKEN, tls_ca=ca, **proof) as client, pytest.raises(UnavailableError):
            client.ping()


def test_a_first_process_ends_when_it_is_told_to(contained: Contained) -> None:
    assert contained.stop() == 0
    assert not contained.socket.exists()


def test_first_processes_that_are_told_to_as_soon_as_they_listen_end(
    new_home: Callable[[], Path], contained: Contained
) -> None:
    """A signal that comes before it is waited for is not lost: in one of five it was."""

    def start_and_stop(home: Path) -> int:
        server = Contained(home)
        try:
            return server.stop()
        finally:
            server.close()

    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(start_and_stop, [new_home() for _ in range(12)]))
    assert codes == [0] * 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be used"),
        ("[]", "it is no JSON object"),
        ('{"root": "/r"}', "missing 1 required keyword-only argument: 'token'"),
        ({"root": 1}, "root has a value of another kind"),
        ({"reserve_bytes": "x"}, "reserve_bytes has a value of another kind"),
        ({"unknown": 1}, "unexpected keyword argument 'unknown'"),
        ({"token": "short"}, "that is no token - write 16 to 4096"),
        ({"socket": None}, "nowhere to listen"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, content: str | dict[str, Any], message: str
) -> None:
    path = tmp_path / "config.json"
    fits = {"root": "/r", "token": TOKEN, "socket": "/s/s"}
    path.write_text(content if isinstance(content, str) else json.dumps({**fits, **content}))
    with pytest.raises(InvalidInputError, match=message):
        DataServerConfig.read(path)
    with pytest.raises(InvalidInputError, match="cannot be used"):
        DataServerConfig.read(tmp_path / "missing")


def test_the_token_is_not_shown() -> None:
    config = DataServerConfig(root="/r", token=TOKEN, socket="/s/s")
    assert TOKEN not in repr(config)
    assert json.loads(config.to_json())["token"] == TOKEN
