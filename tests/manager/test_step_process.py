import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import psutil
import pytest

from flops.core.errors import FailedError, FlopsError, InvalidInputError, UnavailableError
from flops.core.term import boot_time, lease_end, set_lease_end
from flops.manager.cancellation import Cancellation, Cancelled
from flops.manager.process_tree import kill_tree
from flops.manager.step_process import StepProcess
from flops.persistence.lease import Lease


@pytest.fixture
def process(tmp_path: Path) -> Iterator[StepProcess]:
    process = StepProcess(tmp_path / "logs" / "steps.log", nice=3)
    yield process
    process.close()


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "step_process" in " ".join(child.cmdline())
    ]


def test_a_rooms_error_arrives_as_what_it_is(process: StepProcess, tmp_path: Path) -> None:
    request = {"home": str(tmp_path), "project": "p-222222", "spec": {"repo": ""}}
    for _ in range(2):  # and the process lives on
        with pytest.raises(InvalidInputError, match="repo must be a git URL or a folder"):
            process.run("fetch", request, print, Cancellation())
    assert len(children()) == 1


def test_steps_leave_the_processors_to_the_manager(process: StepProcess, tmp_path: Path) -> None:
    request = {"home": str(tmp_path), "project": "p-222222", "spec": {"repo": ""}}
    with pytest.raises(InvalidInputError):
        process.run("fetch", request, print, Cancellation())

    (child,) = children()
    assert child.nice() == max(3, psutil.Process().nice())


def test_steps_load_nothing_that_only_the_manager_needs() -> None:
    """Each project has a process for its steps: a second of processor and 35 MB of memory each."""
    code = "import flops.manager.steps, sys; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    heavy = {"alembic", "fastapi", "flwr", "httpx", "mlflow", "numpy", "pyarrow", "sqlalchemy", "uvicorn"}
    assert "pydantic" in told.stdout.split()
    assert heavy & set(told.stdout.split()) == set()


def test_any_other_error_is_told_with_its_name(process: StepProcess, tmp_path: Path) -> None:
    request = {"home": str(tmp_path), "project": "p-222222", "spec": {"repo": "/r"}}
    with pytest.raises(FailedError, match="step 'nonsense' failed: KeyError: 'nonsense'"):
        process.run("nonsense", request, print, Cancellation())


def run_data_list(process: StepProcess, tmp_path: Path, told: list[str], errors: list[Exception]) -> None:
    try:
        # There is no data server.
        request = {"home": str(tmp_path), "arguments": {"tags": [], "site": None}}
        process.run("data-list", request, told.append, Cancellation())
    except FlopsError as error:
        errors.append(error)


@pytest.mark.parametrize("kills", [1, 5])
def test_a_step_whose_process_is_killed_is_run_again_a_few_times(
    process: StepProcess, tmp_path: Path, kills: int
) -> None:
    told: list[str] = []
    errors: list[Exception] = []
    thread = threading.Thread(target=run_data_list, args=(process, tmp_path, told, errors))
    thread.start()
    killed: set[int] = set()
    while len(killed) < kills and thread.is_alive():
        for child in children():
            if child.pid not in killed:
                killed.add(child.pid)
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        thread.join(0.01)
    thread.join()
    again = ["the process of step 'data-list' ended (killed by SIGKILL), it is started again"]
    assert told == again * min(kills, 4)
    if kills < 5:
        assert isinstance(errors[0], InvalidInputError | UnavailableError)
    else:
        assert "step 'data-list' ended without an answer (killed by SIGKILL)" in str(errors[0])
        assert children() == []


def test_a_cancelled_step_leaves_no_process(process: StepProcess, tmp_path: Path) -> None:
    cancellation = Cancellation()
    timer = threading.Timer(0.1, cancellation.cancel)
    timer.start()
    # Shorter than the import of what it needs.
    request = {"home": str(tmp_path), "arguments": {"tags": [], "site": None}}
    with pytest.raises(Cancelled):
        process.run("data-list", request, print, cancellation)
    timer.join()
    assert children() == []


def test_the_step_process_ends_with_the_manager(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from flops.manager.step_process import StepProcess\n"
        "process = StepProcess(pathlib.Path(sys.argv[1]))\n"
        "print(process._start().pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    manager = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert manager.stdin is not None
    assert manager.stdout is not None
    step = psutil.Process(int(manager.stdout.readline()))
    manager.kill()
    step.wait(30)
    manager.communicate()


class Term:
    """A lease that runs as long as the test wants."""

    def __init__(self) -> None:
        self.until_fd = os.memfd_create("test")
        os.ftruncate(self.until_fd, mmap.PAGESIZE)
        self.until = mmap.mmap(self.until_fd, mmap.PAGESIZE)

    def end_at(self, time_s: float) -> None:
        set_lease_end(self.until, time_s)

    def check(self) -> None:
        if lease_end(self.until) < boot_time():
            raise UnavailableError("another manager acts")


def test_a_step_ends_with_the_lease_of_its_manager_and_begins_with_the_next_one(tmp_path: Path) -> None:
    term = Term()
    process = StepProcess(tmp_path / "log", cast(Lease, term))
    request = {"home": str(tmp_path), "project": "p-222222", "spec": {"repo": ""}}
    try:
        with pytest.raises(UnavailableError, match="another manager acts"):
            process.run("fetch", request, print, Cancellation())
        assert children() == []
        term.end_at(boot_time() + 600)
        with pytest.raises(InvalidInputError):
            process.run("fetch", request, print, Cancellation())
        (child,) = children()
        term.end_at(0.0)  # as where the manager is frozen: it does nothing about it
        child.wait(60)
    finally:
        process.close()
        os.close(term.until_fd)


def test_descendants_with_sessions_of_their_own_are_killed_too() -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    kill_tree(parent.pid)
    parent.communicate()
    assert parent.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        child.wait(30)
    assert not psutil.pid_exists(child.pid)
