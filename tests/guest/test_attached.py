"""Workers in containers of their own, which share a folder with their agent and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from flops.core.errors import InvalidInputError, UnavailableError
from flops.guest import (
    Guest,
    GuestClosed,
    GuestDied,
    GuestError,
    GuestTimeout,
    LastingSeat,
    Worker,
    guest_path,
)
from flops.guest.attached import Attached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Require
    from tests.guest.conftest import Body, ModelFile, Repository

    StartWorker = Callable[..., "subprocess.Popen[bytes]"]

T = 30.0
VANISHED = 3
STUCK = "def fit_model(self):\n    import time\n    time.sleep(100)"


@pytest.fixture
def seat() -> Iterator[Path]:
    """The socket in the folder that agent and worker share."""
    folder = Path(tempfile.mkdtemp(prefix="flops-seat-"))
    yield folder / "agent.sock"
    shutil.rmtree(folder)


@pytest.fixture
def worker(seat: Path) -> Iterator[StartWorker]:
    """Starts workers as their containers do."""
    started: list[subprocess.Popen[bytes]] = []

    def start(code: Path, *, before: tuple[str, ...] = (), path: Path = seat) -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen(
                [
                    *(*before, sys.executable, "-m", "flops_worker"),
                    *("--connect", str(path), "--code", str(code), "--threads", "1"),
                ],
                cwd=guest_path(),
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(guest_path())},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=T)


def contained(seat: Path, elsewhere: Path) -> tuple[str, ...]:
    """How a command begins that runs in mounts, network and processes of its own.

    The shared folder is somewhere else there, and where it was there is nothing.
    """
    inside = 'mount --bind "$0" "$1" && mount -t tmpfs none "$0" && shift && exec "$@"'
    namespaces = ("unshare", "--user", "--map-current-user") if os.getuid() else ("unshare",)
    more = ("--mount", "--net", "--pid", "--fork", "--mount-proc")
    return (*namespaces, *more, "sh", "-c", inside, str(seat.parent), str(elsewhere))


def prints(process: subprocess.Popen[bytes]) -> str:
    output, _ = process.communicate(timeout=T)
    return output.decode()


def test_a_worker_in_namespaces_of_its_own_works_like_any_other(
    repository: Repository,
    worker: StartWorker,
    seat: Path,
    tmp_path: Path,
    model_file: ModelFile,
    model_fd: int,
    body: Body,
    require: Require,
) -> None:
    code = repository(
        "def set_model_data(self):\n"
        "    import os\n"
        "    from flops_worker.door import entrance\n"
        "    files = entrance.request()\n"
        "    assert len(files) == 100\n"
        "    self.data = b''.join(os.pread(fd, 9, 0) for fd in files)\n"
        "def fit_model(self):\n"
        "    import os, socket\n"
        "    self.parameters = [array * 2 for array in self.parameters]\n"
        "    print(os.environ['PYTHONHASHSEED'], os.environ['OMP_NUM_THREADS'], socket.if_nameindex())\n"
        "    return len(self.data)"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    before = contained(seat, elsewhere)
    probe = subprocess.run([*before, "true"], capture_output=True, check=False)
    require(probe.returncode == 0, f"a namespace ({probe.stderr.decode().strip()})")
    process = worker(code, before=before, path=elsewhere / seat.name)

    def dataset() -> list[int]:
        files = []
        for _ in range(100):
            files.append(os.memfd_create("data"))
            os.write(files[-1], b"abc")
        return files

    with Guest.attach(seat, dataset=dataset, deadline_s=T) as guest:
        assert not seat.exists()
        assert guest.load(T).python_version.startswith("3.")
        layout, initial = guest.describe(T)
        os.close(initial)
        assert layout.nbytes == 6 * 4 + 3 * 8
        guest.load_data(T)
        for number in (1, 2):
            model = model_file(np.full((2, 3), number, dtype=np.float32), np.arange(3.0))
            fit = guest.fit(model, number, timeout_s=T)
            assert fit.num_examples == 300
            expected = np.full(6, 2 * number, dtype=np.float32).tobytes() + (2 * np.arange(3.0)).tobytes()
            assert body(fit.update_fd) == expected
        assert guest.evaluate(model_fd, 2, timeout_s=T).num_examples == 4
        assert not guest.isolation.network_cut
    assert prints(process) == "0 1 [(1, 'lo')]\n" * 2
    assert process.returncode == 0


def test_the_worker_may_come_first(repository: Repository, worker: StartWorker, seat: Path) -> None:
    process = worker(repository())
    time.sleep(0.3)
    assert process.poll() is None
    with Guest.attach(seat, deadline_s=T) as guest:
        guest.load(T)
    assert process.wait(T) == 0


def test_what_an_agent_left_that_was_killed_is_replaced(
    repository: Repository, worker: StartWorker, seat: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(seat))
    process = worker(repository())
    with Guest.attach(seat, deadline_s=T) as guest:
        guest.load(T)
    assert process.wait(T) == 0


@pytest.mark.parametrize(
    ("statement", "exit_code", "by", "last", "ends_with"),
    [
        ("os._exit(7)", 7, None, "last words", 1),
        ("os._exit(0)", 0, None, "last words", 1),
        ("os.kill(os.getpid(), 9)", None, "SIGKILL", "last words", 137),
        ("import ctypes; ctypes.string_at(0)", None, "SIGSEGV", "in fit_model", 139),
    ],
)
def test_how_the_process_ended_is_told(
    repository: Repository,
    worker: StartWorker,
    seat: Path,
    model_fd: int,
    statement: str,
    exit_code: int | None,
    by: str | None,
    last: str,
    ends_with: int,
) -> None:
    code = repository(f"def fit_model(self):\n    import os\n    print('last words')\n    {statement}")
    process = worker(code)
    with Guest.attach(seat, deadline_s=T) as guest:
        guest.load(T)
        with pytest.raises(GuestDied, match="during fit_model - see the log") as caught:
            guest.fit(model_fd, 1, timeout_s=T)
        with pytest.raises(GuestClosed):
            guest.evaluate(model_fd, 1, timeout_s=T)
    assert (caught.value.exit_code, caught.value.signal) == (exit_code, by)
    assert any(last in line for line in caught.value.log)
    assert caught.value.from_outside == (by == "SIGKILL")
    assert process.wait(T) == ends_with


def test_an_end_between_requests_is_told_at_the_next(
    repository: Repository, worker: StartWorker, seat: Path, model_fd: int
) -> None:
    code = repository(
        "def fit_model(self):\n"
        "    import os, threading\n"
        "    threading.Timer(0.1, os._exit, (9,)).start()\n"
        "    return 1"
    )
    process = worker(code)
    with Guest.attach(seat, deadline_s=T) as guest:
        guest.load(T)
        guest.fit(model_fd, 1, timeout_s=T)
        assert process.wait(T) == 1
        with pytest.raises(GuestDied, match="ended with exit code 9 during evaluate_model"):
            guest.evaluate(model_fd, 1, timeout_s=T)


def test_errors_of_user_code_are_those_of_any_guest(
    repository: Repository, worker: StartWorker, seat: Path, model_fd: int
) -> None:
    process = worker(repository("def fit_model(self):\n    raise ValueError('too cold')"))
    with Guest.attach(seat, deadline_s=T) as guest:
        guest.load(T)
        with pytest.raises(GuestError, match="fit_model raised ValueError: too cold"):
            guest.fit(model_fd, 1, timeout_s=T)
        assert guest.evaluate(model_fd, 1, timeout_s=T).num_examples == 4
    assert "ValueError: too cold" in prints(process)


def test_code_that_hangs_is_ended_by_its_keeper(
    repository: Repository, worker: StartWorker, seat: Path, model_fd: int
) -> None:
    process = worker(repository(STUCK))
    with Guest.attach(seat, deadline_s=T) as guest:
        guest.load(T)
        with pytest.raises(GuestTimeout):
            guest.fit(model_fd, 1, timeout_s=0.5)
        assert process.wait(5.0) == VANISHED


@pytest.mark.parametrize(("end", "exit_code"), [(Guest.close, 0), (Guest.kill, VANISHED)])
@pytest.mark.parametrize("busy", [True, False])
def test_a_worker_ends_with_its_agent_and_knows_whether_that_is_all(
    repository: Repository,
    worker: StartWorker,
    seat: Path,
    model_fd: int,
    end: Callable[[Guest], None],
    exit_code: int,
    busy: bool,
) -> None:
    process = worker(repository(STUCK))
    guest = Guest.attach(seat, deadline_s=T)
    guest.load(T)
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            guest.fit(model_fd, 1, timeout_s=T)
        except GuestError as error:
            failures.append(error)

    asking = threading.Thread(target=fit)
    if busy:
        asking.start()
        time.sleep(0.3)
    end(guest)
    assert process.wait(5.0) == exit_code
    if busy:
        asking.join(T)
        assert [type(error) for error in failures] == [GuestClosed]


def test_what_user_code_has_started_ends_with_it(
    repository: Repository, worker: StartWorker, seat: Path, model_fd: int
) -> None:
    code = repository(
        "def fit_model(self):\n    import subprocess\n    return subprocess.Popen(['sleep', '100']).pid"
    )
    process = worker(code)
    with Guest.attach(seat, deadline_s=T) as guest:
        guest.load(T)
        child = guest.fit(model_fd, 1, timeout_s=T).num_examples
        assert Path(f"/proc/{child}").exists()
    assert process.wait(T) == 0
    deadline = time.monotonic() + T
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_whose_agent_is_killed_ends_at_once(
    repository: Repository, worker: StartWorker, seat: Path
) -> None:
    process = worker(repository("def get_model(self):\n    import time\n    time.sleep(100)"))
    program = (
        "import sys, pathlib; from flops.guest import Guest\n"
        "Guest.attach(pathlib.Path(sys.argv[1]), deadline_s=30).load()"
    )
    agent = subprocess.Popen([sys.executable, "-c", program, str(seat)])
    deadline = time.monotonic() + T
    while not seat.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    while seat.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    agent.kill()
    agent.wait(T)
    assert process.wait(5.0) == VANISHED
    assert "the agent is gone" in prints(process)


def test_the_agent_learns_that_a_container_is_gone(
    repository: Repository, worker: StartWorker, seat: Path, model_fd: int, tmp_path: Path, require: Require
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    before = contained(seat, elsewhere)
    probe = subprocess.run([*before, "true"], capture_output=True, check=False)
    require(probe.returncode == 0, f"a namespace ({probe.stderr.decode().strip()})")
    worker(repository(STUCK), before=before, path=elsewhere / seat.name)
    with Guest.attach(seat, deadline_s=T) as guest:
        guest.load(T)
        threading.Timer(0.3, os.kill, (guest.pid, signal.SIGKILL)).start()
        with pytest.raises(GuestDied, match="ended with its container") as caught:
            guest.fit(model_fd, 1, timeout_s=T)
    assert (caught.value.exit_code, caught.value.signal) == (None, None)
    assert caught.value.from_outside


def test_a_first_process_ends_when_it_is_told_to(
    repository: Repository, worker: StartWorker, seat: Path, tmp_path: Path, require: Require
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    before = contained(seat, elsewhere)
    probe = subprocess.run([*before, "true"], capture_output=True, check=False)
    require(probe.returncode == 0, f"a namespace ({probe.stderr.decode().strip()})")
    process = worker(repository(), before=before, path=elsewhere / seat.name)
    with Guest.attach(seat, deadline_s=T) as guest:
        guest.load(T)
        os.kill(guest.pid, signal.SIGTERM)
        assert process.wait(5.0) == 128 + signal.SIGTERM


def test_a_learner_goes_on_with_the_worker_that_is_started_again(
    repository: Repository, worker: StartWorker, seat: Path, model_fd: int
) -> None:
    """As its orchestrator does."""
    code = repository("def fit_model(self):\n    self.seen.append(1)\n    return len(self.seen)")
    processes = [worker(code)]
    lasting = Worker(lambda: Guest.attach(seat, deadline_s=T))
    learner = LastingSeat(lasting, 0, 1, None)
    learner.load()
    learner.load_data()
    assert [learner.fit(model_fd, number, 0, {}).num_examples for number in (1, 2)] == [1, 2]
    processes[0].terminate()
    processes.append(worker(code))
    assert learner.fit(model_fd, 3, 0, {}).num_examples == 1
    lasting.dismiss()
    assert [process.wait(T) for process in processes] == [143, 0]


def test_a_worker_that_never_comes_is_named(seat: Path) -> None:
    with pytest.raises(UnavailableError, match=f"no worker has come to {seat} within 0.3 s - see the log of"):
        Guest.attach(seat, deadline_s=0.3)
    assert not seat.exists()


def test_waiting_for_a_worker_can_be_given_up(seat: Path) -> None:
    lasting = Worker(lambda: Guest.attach(seat, deadline_s=T, unwanted=lambda: lasting.over))
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            lasting.guest()
        except GuestError as error:
            failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    lasting.kill()
    waiting.join(5.0)
    assert [type(error) for error in failures] == [GuestClosed]


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(InvalidInputError, match="is open to other users - give its volume to user"):
        Guest.attach(folder / "s", deadline_s=0.1)
    with pytest.raises(InvalidInputError, match="is longer than 107 bytes"):
        Guest.attach(folder / ("x" * 108), deadline_s=0.1)


def test_another_user_is_not_a_worker(seat: Path, require: Require) -> None:
    require(os.getuid() == 0, "root, which can be two users")
    stranger = (
        "import os, socket, sys, time\n"
        "os.chdir(sys.argv[1])\n"
        "while not os.path.exists('agent.sock'): time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "os.chmod('.', 0o755)\n"
        "os.chmod('agent.sock', 0o666)\n"
        "os.setuid(65534)\n"
        "with socket.socket(socket.AF_UNIX) as sock:\n"
        "    sock.connect('agent.sock')\n"
        "    sock.settimeout(10)\n"
        "    sys.exit(0 if sock.recv(1) == b'' else 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", stranger, str(seat.parent)])
    with pytest.raises(UnavailableError):
        Guest.attach(seat, deadline_s=2.0)
    assert process.wait(T) == 0


def test_whatever_the_last_words_are_they_end_the_guest(seat: Path, model_fd: int) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        guest = Guest(Attached(ours, 0), 0, None)
        body = b'{"ended": {"exit_code": "x", "signal": [], "log": {"a": 1}}}'
        theirs.send(len(body).to_bytes(4, "big") + body)
        with pytest.raises(GuestDied, match="ended with its container"):
            guest.fit(model_fd, 1, timeout_s=T)
        guest.close()
