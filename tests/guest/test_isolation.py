"""What a guest can see of the machine, and that nothing of it outlives its owner."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flops.guest import Guest, GuestError, Room

if TYPE_CHECKING:
    from tests.conftest import Require
    from tests.guest.conftest import Ready, Repository, Start

T = 30.0


def gone(pid: int) -> bool:
    """Wait for a process that need not be our child to end."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], T)[0])
    finally:
        os.close(watched)


def connecting(port: int) -> str:
    return (
        "def fit_model(self):\n"
        "    import socket\n"
        f"    socket.create_connection(('127.0.0.1', {port}), timeout=5).close()\n"
        "    return 1"
    )


def test_a_guest_reaches_no_network(ready: Ready, model_fd: int, require: Require) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        guest = ready(connecting(server.getsockname()[1]))
        require(guest.isolation.network_cut, guest.isolation.reason)
        with pytest.raises(GuestError, match="fit_model raised ConnectionRefusedError"):
            guest.fit(model_fd, 1, timeout_s=T)


def test_a_guest_that_is_not_isolated_reaches_the_network(ready: Ready, model_fd: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        guest = ready(connecting(server.getsockname()[1]), isolate=False)
        assert guest.fit(model_fd, 1, timeout_s=T).num_examples == 1
    assert not guest.isolation.network_cut
    assert guest.isolation.reason == "isolation was not asked for"


def test_a_guest_has_its_own_loopback(ready: Ready, model_fd: int) -> None:
    guest = ready(
        "def fit_model(self):\n"
        "    import socket\n"
        "    with socket.create_server(('127.0.0.1', 0)) as server:\n"
        "        socket.create_connection(server.getsockname(), timeout=5).close()\n"
        "    return 1"
    )
    assert guest.fit(model_fd, 1, timeout_s=T).num_examples == 1


@pytest.mark.parametrize("name", ["environ", "mem"])
def test_a_guest_cannot_look_into_its_agent(ready: Ready, model_fd: int, name: str, require: Require) -> None:
    guest = ready(
        "def fit_model(self):\n"
        "    import os\n"
        f"    return len(open(f'/proc/{{os.getppid()}}/{name}', 'rb').read(9))"
    )
    require(guest.isolation.network_cut, guest.isolation.reason)
    with pytest.raises(GuestError, match="fit_model raised PermissionError"):
        guest.fit(model_fd, 1, timeout_s=T)


def test_a_guest_cannot_return_to_the_old_network(ready: Ready, model_fd: int, require: Require) -> None:
    guest = ready(
        "def fit_model(self):\n"
        "    import ctypes, os\n"
        "    libc = ctypes.CDLL(None, use_errno=True)\n"
        "    for pid in (1, os.getppid()):\n"
        "        try: fd = os.open(f'/proc/{pid}/ns/net', os.O_RDONLY)\n"
        "        except PermissionError: continue\n"
        "        assert libc.setns(fd, 0) != 0, 'escaped'\n"
        "    return 1"
    )
    require(guest.isolation.network_cut, guest.isolation.reason)
    assert guest.fit(model_fd, 1, timeout_s=T).num_examples == 1


def test_a_guest_finds_no_secrets_in_its_environment(
    ready: Ready, model_fd: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (
        "FLOPS_HOME",
        "FLOPS_TOKEN",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "https_proxy",
        "HTTP_PROXY",
    ):
        monkeypatch.setenv(name, "a-secret")
    monkeypatch.setenv("FLOPS_SERVICE", "p-7k2mqd-learner-1")
    guest = ready(
        "def fit_model(self):\n"
        "    import os\n"
        "    for name, value in os.environ.items(): print(name, value, sep='=')\n"
        "    return 1",
        threads=2,
    )
    guest.fit(model_fd, 1, timeout_s=T)
    lines = (tmp_path / "guest.log").read_text().splitlines()
    seen = dict(line.split("=", 1) for line in lines)
    assert "a-secret" not in seen.values()
    assert {name for name in seen if name.startswith("FLOPS_")} == {"FLOPS_SERVICE"}
    assert seen["FLOPS_SERVICE"] == "p-7k2mqd-learner-1"
    assert (seen["OMP_NUM_THREADS"], seen["PYTHONHASHSEED"], seen["HF_HUB_OFFLINE"]) == ("2", "0", "1")
    assert Path(seen["HOME"]).parent == Path(tempfile.gettempdir())
    guest.close()
    assert not Path(seen["HOME"]).exists()


def test_a_guest_imports_nothing_of_flops_but_its_worker(ready: Ready, model_fd: int) -> None:
    guest = ready(
        "def fit_model(self):\n"
        "    import sys, flops_worker\n"
        "    from pathlib import Path\n"
        "    return len(list(Path(flops_worker.__file__).parent.parent.iterdir()))"
    )
    assert guest.fit(model_fd, 1, timeout_s=T).num_examples == 2


def test_children_of_a_guest_end_with_it(ready: Ready, model_fd: int, tmp_path: Path) -> None:
    guest = ready(
        "def fit_model(self):\n    import subprocess\n    return subprocess.Popen(['sleep', '600']).pid"
    )
    child = guest.fit(model_fd, 1, timeout_s=T).num_examples
    guest.close()
    assert gone(child)


OWNER = """
import sys, threading, time
from pathlib import Path
from flops.guest import Guest, Room
guests = []
def start():
    guests.append(Guest.start(Room(Path(sys.executable), Path(sys.argv[1])), threads=1))
    guests[0].load(30)
thread = threading.Thread(target=start)
thread.start()
thread.join()  # a guest belongs to the process, not to the thread that started it
assert guests[0].describe(30)
threading.Thread(target=guests[0].load_data, daemon=True).start()
print(guests[0].pid, guests[0]._process._home.path, flush=True)
time.sleep(600)
"""


def test_a_busy_guest_and_its_children_end_when_their_owner_is_killed(
    repository: Repository, tmp_path: Path
) -> None:
    note = tmp_path / "child"
    os.mkfifo(note)
    code = repository(
        "def set_model_data(self):\n"
        "    import subprocess\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        f"    with open({str(note)!r}, 'w') as file: file.write(str(child.pid))\n"
        "    while True: pass"
    )
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        pid, home = owner.stdout.readline().split()
        child = int(note.read_text())
        assert Path(f"/proc/{pid}").exists()
        assert os.getsid(int(pid)) == os.getsid(owner.pid)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait(T)
        assert owner.stdout is not None
        owner.stdout.close()
    assert gone(int(pid))
    assert gone(child)
    assert Path(home).exists()
    with Guest.start(Room(Path(sys.executable), code)):
        assert not Path(home).exists(), "the next guest sweeps what killed owners left"


def test_an_idle_guest_ends_when_its_owner_exits(repository: Repository) -> None:
    script = OWNER.replace("time.sleep(600)", "").replace(
        "threading.Thread(target=guests[0].load_data, daemon=True).start()", ""
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(repository())], capture_output=True, text=True, check=True
    ).stdout
    assert gone(int(output.split()[0]))


def test_no_open_file_is_left_behind(repository: Repository, start: Start, model_fd: int) -> None:
    code = repository("def evaluate_model(self):\n    import os\n    os._exit(1)")
    before = sorted(Path("/proc/self/fd").iterdir())
    for end in ("close", "kill", "death"):
        guest = start(code)
        guest.load(T)
        os.close(guest.describe(T)[1])
        guest.load_data(T)
        guest.fit(model_fd, 1, timeout_s=T)
        if end == "death":
            with pytest.raises(GuestError):
                guest.evaluate(model_fd, 1, timeout_s=T)
            guest.close()
        else:
            getattr(guest, end)()
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_files_do_not_pile_up_in_a_guest(ready: Ready, model_fd: int) -> None:
    guest = ready("def fit_model(self):\n    import os\n    return len(os.listdir('/proc/self/fd'))")
    counts = [guest.fit(model_fd, number, timeout_s=T).num_examples for number in range(5)]
    assert counts[1] == counts[-1]
