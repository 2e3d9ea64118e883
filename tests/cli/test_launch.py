import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flops.cli.launch import ensure, find, settings_here
from flops.core.errors import FailedError, InvalidInputError
from flops.core.settings import Settings

if TYPE_CHECKING:
    from tests.cli.conftest import StandIn

# A manager of the smallest kind: it answers to health, and notes that it was started.
TINY = """
import http.server, json, os, pathlib, sys
home = pathlib.Path(sys.argv[sys.argv.index("--home") + 1])
with (home / "starts").open("a") as file:
    file.write("x")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"status": "ok", "version": "1", "pid": os.getpid()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
(home / "token").write_text("t")
url = f"http://127.0.0.1:{server.server_port}"
(home / "manager.json").write_text(json.dumps({"url": url, "pid": os.getpid()}))
server.serve_forever()
"""


def end_manager(settings: Settings) -> None:
    pid = json.loads(settings.address_file.read_text())["pid"]
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def test_callers_at_once_start_one_manager(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "deep" / "home")
    told: list[str] = []
    answers: list[int] = []

    def call() -> None:
        with ensure(settings, announce=told.append, command=(sys.executable, "-c", TINY)) as client:
            answers.append(client.get_health()["pid"])

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert len(set(answers)) == 1
        assert len(answers) == 4
        assert told == ["starting the manager"]
        assert (settings.home / "starts").read_text() == "x"
        assert settings.home.stat().st_mode & 0o777 == 0o700
    finally:
        end_manager(settings)
    assert find(settings) is None


def test_a_manager_that_cannot_start_says_why(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    settings.logs_dir.mkdir()
    (settings.logs_dir / "manager.log").write_text("from an earlier life\n")
    command = (sys.executable, "-c", "import sys; print('port 80 is taken'); sys.exit(3)")
    with pytest.raises(FailedError) as caught:
        ensure(settings, command=command)
    assert str(caught.value) == (
        f"the manager could not start (exit code 3) - its log, {tmp_path}/logs/manager.log, ends with:\n"
        "  port 80 is taken"
    )


def test_a_manager_that_never_answers_is_ended(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    with pytest.raises(FailedError, match=r"did not answer within 1 s and was stopped") as caught:
        ensure(
            settings,
            command=(
                sys.executable,
                "-c",
                "import os, time; print(os.getpid(), flush=True); time.sleep(99)",
            ),
            deadline_s=1.0,
        )
    assert not Path(f"/proc/{str(caught.value).rsplit(maxsplit=1)[-1]}").exists()


def test_whoever_took_over_the_port_does_not_get_the_token(stand_in: "StandIn") -> None:
    settings = stand_in.settings
    client = find(settings)
    assert client is not None
    client.close()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        address = json.loads(settings.address_file.read_text()) | {"pid": other.pid}
        settings.address_file.write_text(json.dumps(address))
        assert find(settings) is None
    finally:
        other.communicate(b"\n")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": "http://127.0.0.1:1"}', '{"url": "x", "pid": 1}'])
def test_a_broken_address_file_means_no_manager(tmp_path: Path, text: str) -> None:
    settings = Settings(tmp_path)
    settings.address_file.write_text(text)
    assert find(settings) is None


def test_a_port_where_nobody_listens_means_no_manager(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = Settings(tmp_path)
    settings.address_file.write_text(json.dumps({"url": f"http://127.0.0.1:{port}", "pid": 1}))
    assert find(settings) is None


def test_a_proxy_of_the_internet_is_not_used(stand_in: "StandIn", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    client = find(stand_in.settings)
    assert client is not None
    with client:
        assert client.list_projects()["projects"] == []


def test_a_wrong_port_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOPS_PORT", "many")
    with pytest.raises(InvalidInputError, match=r"FLOPS_PORT must be a number \(is 'many'\)"):
        settings_here()


def test_help_needs_neither_the_network_nor_the_spec_library() -> None:
    heavy = ("httpx", "pydantic", "pyarrow", "mlflow", "fastapi")
    code = f"import sys, flops.cli.main; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
