import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess


def run_manager(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "flops.manager", "--home", str(home), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_second_manager_on_one_home_is_refused(manager: "ManagerProcess") -> None:
    second = run_manager(manager.home)
    assert second.returncode == 1
    assert second.stdout == ""
    assert second.stderr == (
        f"another manager (pid {manager.process.pid}) already uses {manager.home} - stop it with "
        "'flops down', or choose another FLOPS_HOME\n"
    )


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run_manager(tmp_path / "home", "--port", str(port))
    assert refused.returncode == 1
    assert refused.stderr == (
        f"port {port} on 127.0.0.1 is taken - choose another with --port, or leave it out for any free one\n"
    )
    assert not (tmp_path / "home" / "manager.json").exists()


def test_an_idle_manager_is_light_and_quiet(manager: "ManagerProcess") -> None:
    manager.client().get("/v1/projects").raise_for_status()
    assert psutil.Process(manager.process.pid).memory_info().rss < 150e6
    for line in manager.log.splitlines():
        assert {"time", "level", "logger", "message"} <= set(json.loads(line))


def test_a_terminated_manager_takes_its_own_services_with_it(own_manager: "ManagerProcess") -> None:
    own_manager.client().get("/v1/data/fragments").raise_for_status()
    os.kill(own_manager.process.pid, signal.SIGTERM)
    assert own_manager.process.wait(30) == 0
    assert not (own_manager.home / "manager.json").exists()
    running = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(own_manager.home) in " ".join(process.info["cmdline"] or [])
        and "pytest" not in " ".join(process.info["cmdline"])
    ]
    assert running == []
