"""The `process` adapter with real processes: what should survive does, and nothing else."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flops.core.errors import ConflictError, FailedError
from flops.core.ids import ServiceName
from flops.orchestration import ProcessOrchestrator, ServiceSpec, ServiceStatus
from flops.orchestration.ending import judge
from flops.orchestration.exits import ExitWatch
from flops.orchestration.linux import MARKER, Identity, sweep
from flops.orchestration.logfile import cap, open_log, read_tail

A = ServiceName("p-test-agent-1")

OpenProcesses = Callable[[], ProcessOrchestrator]
WaitUntil = Callable[[Callable[[], bool]], None]

# Leaves its session and its parent, as daemons do; writes its pid; ignores all requests to end.
DAEMON = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        path = sys.argv[1]
        with open(path + ".part", "w") as file:
            file.write(str(os.getpid()))
        os.rename(path + ".part", path)
        time.sleep(600)
    os._exit(0)
os.wait()
time.sleep(600 if len(sys.argv) < 3 else 0)
"""

# Ends on request, but tells first, and asks for permission where it was given a pipe.
POLITE = """
import signal, sys
def end(number, frame):
    print("asked", flush=True)
    if len(sys.argv) > 1:
        open(sys.argv[1]).read()
    print("bye", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
while True:
    signal.pause()
"""

# A manager: deploys the services given as JSON, says so, and waits for its end.
MANAGER = """
import json, sys, time
from pathlib import Path
from flops.orchestration import ProcessOrchestrator, ServiceSpec
folder = Path(sys.argv[1])
orchestrator = ProcessOrchestrator(folder / "state", folder / "logs", backoff_s=60)
for service in json.loads(sys.argv[2]):
    name, command = service.pop("name"), tuple(service.pop("command"))
    orchestrator.deploy(ServiceSpec(name, command, "agent", "p-test", **service))
print("deployed", flush=True)
time.sleep(600)
"""


def spec(*command: str, name: str = A, **more: Any) -> ServiceSpec:
    return ServiceSpec(ServiceName(name), command, "agent", "p-test", **more)


def only(orchestrator: ProcessOrchestrator) -> ServiceStatus:
    (status,) = orchestrator.list()
    return status


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


_of_other_tests: set[int] = set()


@pytest.fixture(autouse=True)
def _earlier_children() -> None:
    """Other suites of the same run may leave children of this process behind, zombies mostly."""
    _of_other_tests.clear()
    _of_other_tests.update(child.pid for child in psutil.Process().children())


def children() -> list[psutil.Process]:
    """The processes that this test started and that are not gone without a trace."""
    return [child for child in psutil.Process().children() if child.pid not in _of_other_tests]


def killed_manager(folder: Path, *services: dict[str, Any]) -> None:
    """Run a manager that deploys the services and dies of kill -9."""
    with subprocess.Popen(
        [sys.executable, "-c", MANAGER, str(folder), json.dumps(services)], stdout=subprocess.PIPE
    ) as manager:
        assert manager.stdout is not None
        assert manager.stdout.readline() == b"deployed\n"
        manager.kill()


def test_service_gets_its_environment_folder_log_and_a_session_of_its_own(
    open_processes: OpenProcesses, watch: Any, tmp_path: Path
) -> None:
    orchestrator = open_processes()
    history = watch(orchestrator)
    script = (
        "import os, sys; print(os.environ['COLOUR'], os.getcwd(), os.getsid(0) == os.getpid(),"
        " sys.stdin.read() == '', sorted(map(int, os.listdir('/proc/self/fd')))[:3])"
    )
    (tmp_path / "work").mkdir()

    orchestrator.deploy(
        spec(sys.executable, "-c", script, environment={"COLOUR": "blue"}, directory=tmp_path / "work")
    )

    history.until(A, "exited")
    assert orchestrator.logs(A) == f"blue {tmp_path / 'work'} True True [0, 1, 2]\n"


def test_service_that_steps_aside_does_so_with_all_of_its_session(
    open_processes: OpenProcesses, watch: Any
) -> None:
    orchestrator = open_processes()
    history = watch(orchestrator)
    script = "until [ $(nice) = 19 ]; do sleep 0.02; done; cat /proc/self/autogroup || echo nice 19"

    orchestrator.deploy(spec("/bin/sh", "-c", script, nice=19))

    history.until(A, "exited")
    assert orchestrator.logs(A).endswith("nice 19\n")


# Starts sessions, lets them step aside until no thread is at it any more, and tells what the kernel says.
ASIDE = """
import os, subprocess, threading
from pathlib import Path
from flops.orchestration.linux import step_aside
sessions = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(4)]
def nice(pid):
    group = Path(f"/proc/{pid}/autogroup")  # where the kernel groups sessions
    return int(group.read_text().split()[-1]) if group.exists() else os.getpriority(os.PRIO_PROCESS, pid)
try:
    for session in sessions:
        step_aside(session.pid, 19)
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(20)
    print(*[nice(session.pid) for session in sessions])
finally:
    for session in sessions:
        session.kill()
        session.wait()
"""


def test_services_of_a_user_without_rights_step_aside_however_many_start_at_once() -> None:
    without_rights = (
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"] if os.geteuid() == 0 else []
    )

    told = subprocess.run(
        [*without_rights, sys.executable, "-c", ASIDE], check=True, capture_output=True, text=True, timeout=60
    )

    # The kernel takes one of them in a tenth of a second.
    assert told.stdout.split() == ["19"] * 4


def test_secrets_in_specs_are_readable_by_the_owner_only(
    open_processes: OpenProcesses, tmp_path: Path
) -> None:
    open_processes().deploy(spec("sleep", "600", environment={"TOKEN": "secret"}))

    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / f"{A}.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "logs" / f"{A}.log").stat().st_mode & 0o777 == 0o600


def test_missing_folder_and_unwritable_program_are_named(
    open_processes: OpenProcesses, tmp_path: Path
) -> None:
    orchestrator = open_processes()
    (tmp_path / "script").write_text("not executable")

    with pytest.raises(FailedError) as caught:
        orchestrator.deploy(spec("sleep", "600", directory=tmp_path / "none"))
    assert str(caught.value) == (
        f"service {A} cannot start: its folder {tmp_path / 'none'} does not exist - make it first"
    )
    with pytest.raises(FailedError) as caught:
        orchestrator.deploy(spec(str(tmp_path / "script")))
    assert str(caught.value) == (
        f"service {A} cannot start '{tmp_path / 'script'}': Permission denied"
        " - check that it is installed and executable"
    )
    assert list((tmp_path / "state").iterdir()) == []
    assert list((tmp_path / "logs").iterdir()) == []
    assert children() == []


def test_program_that_vanished_between_restarts_fails_the_service(
    open_processes: OpenProcesses, watch: Any, tmp_path: Path
) -> None:
    orchestrator = open_processes()
    history = watch(orchestrator)
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nrm "$0"\nexit 1\n')
    program.chmod(0o700)

    orchestrator.deploy(spec(str(program), restart="on-failure"))

    assert history.until(A, "failed").reason.startswith(f"service {A} cannot start '{program}'")


def test_stubborn_service_is_killed_after_its_grace(
    open_processes: OpenProcesses, wait_until: WaitUntil
) -> None:
    orchestrator = open_processes()
    orchestrator.deploy(spec("sh", "-c", "trap '' TERM; echo ready; while true; do sleep 600; done"))
    wait_until(lambda: orchestrator.logs(A) == "ready\n")
    started = time.monotonic()

    orchestrator.stop(A, grace_s=0.2)

    assert 0.2 <= time.monotonic() - started < 3
    assert (only(orchestrator).state, only(orchestrator).exit_code) == ("exited", -9)


def test_service_may_end_in_its_own_way_within_the_grace(
    open_processes: OpenProcesses, wait_until: WaitUntil
) -> None:
    orchestrator = open_processes()
    orchestrator.deploy(spec(sys.executable, "-c", POLITE))
    wait_until(lambda: orchestrator.logs(A) == "ready\n")

    orchestrator.stop(A)

    assert orchestrator.logs(A) == "ready\nasked\nbye\n"
    assert (only(orchestrator).state, only(orchestrator).exit_code) == ("exited", 0)


def test_daemon_that_left_its_session_dies_when_the_service_is_stopped(
    open_processes: OpenProcesses, tmp_path: Path, wait_until: WaitUntil
) -> None:
    orchestrator = open_processes()
    orchestrator.deploy(spec(sys.executable, "-c", DAEMON, str(tmp_path / "daemon")))
    wait_until((tmp_path / "daemon").exists)
    pid = int((tmp_path / "daemon").read_text())
    assert not is_gone(pid)

    orchestrator.stop(A)

    assert is_gone(pid)


def test_daemon_dies_when_the_service_ends_by_itself(
    open_processes: OpenProcesses, watch: Any, tmp_path: Path, wait_until: WaitUntil
) -> None:
    orchestrator = open_processes()
    history = watch(orchestrator)
    script = f"{DAEMON}\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.005)"

    orchestrator.deploy(spec(sys.executable, "-c", script, str(tmp_path / "daemon"), "end"))

    assert history.until(A, "exited").exit_code == 0
    assert is_gone(int((tmp_path / "daemon").read_text()))


def test_child_that_wiped_its_environment_dies_with_the_session(
    open_processes: OpenProcesses, watch: Any
) -> None:
    orchestrator = open_processes()
    history = watch(orchestrator)

    orchestrator.deploy(spec("sh", "-c", "env -i sleep 600 & echo $!"))

    history.until(A, "exited")
    assert is_gone(int(orchestrator.logs(A)))


def test_services_of_the_same_name_in_other_folders_are_left_alone(
    open_processes: OpenProcesses, tmp_path: Path
) -> None:
    mine = open_processes()
    other = ProcessOrchestrator(tmp_path / "other-state", tmp_path / "other-logs")
    mine.deploy(spec("sleep", "600"))
    other.deploy(spec("sleep", "600"))

    mine.stop(A)

    try:
        assert only(other).state == "running"
    finally:
        other.stop(A)
        other.close()


def test_no_zombie_is_left(open_processes: OpenProcesses, watch: Any) -> None:
    orchestrator = open_processes()
    history = watch(orchestrator)
    for number in range(5):
        orchestrator.deploy(spec("true", name=f"p-test-agent-{number}"))
    for _ in range(10):
        history.next()  # running and exited of each

    assert children() == []


def test_fifty_stubborn_services_stop_together_within_five_seconds(
    open_processes: OpenProcesses, wait_until: WaitUntil
) -> None:
    orchestrator = open_processes()
    names = [ServiceName(f"p-test-agent-{number}") for number in range(50)]
    for name in names:
        orchestrator.deploy(spec("sh", "-c", "trap '' TERM; echo ready; sleep 600; sleep 600", name=name))
    wait_until(lambda: all(orchestrator.logs(name) for name in names))
    started = time.monotonic()

    orchestrator.stop_many(names, grace_s=1.0)

    assert time.monotonic() - started < 5
    assert {(status.state, status.pid) for status in orchestrator.list()} == {("exited", None)}
    assert children() == []


def test_deploying_while_it_is_being_stopped_is_refused(
    open_processes: OpenProcesses, tmp_path: Path, wait_until: WaitUntil
) -> None:
    orchestrator = open_processes()
    os.mkfifo(tmp_path / "permission")
    again = spec(sys.executable, "-c", POLITE, str(tmp_path / "permission"))
    orchestrator.deploy(again)
    wait_until(lambda: orchestrator.logs(A) == "ready\n")
    stopper = threading.Thread(target=orchestrator.stop, args=(A, 20.0))
    stopper.start()
    wait_until(lambda: orchestrator.logs(A) == "ready\nasked\n")

    with pytest.raises(ConflictError, match="is being stopped - deploy it once it has ended"):
        orchestrator.deploy(again)

    (tmp_path / "permission").write_text("end")
    stopper.join()
    orchestrator.deploy(again)
    assert only(orchestrator).state == "running"


def test_watcher_that_stops_services_is_told_that_it_must_not(
    open_processes: OpenProcesses, caplog: pytest.LogCaptureFixture, wait_until: WaitUntil
) -> None:
    orchestrator = open_processes()
    orchestrator.watch(lambda status: orchestrator.stop(status.name))

    orchestrator.deploy(spec("sleep", "600"))

    wait_until(lambda: "it would wait for itself" in caplog.text)
    assert only(orchestrator).state == "running"


def test_log_that_outgrew_its_limit_is_cut_while_the_service_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = open_log(path)
    try:
        for number in range(1000):
            os.write(writer, b"line %04d\n" % number)
        assert not cap(path, 10_000)
        assert cap(path, 9_999)
        os.write(writer, b"afterwards\n")
    finally:
        os.close(writer)

    lines = path.read_text().splitlines()
    assert lines[0] == "[earlier lines were cut off]"
    assert lines[1] == "line 0501"
    assert lines[-2:] == ["line 0999", "afterwards"]
    assert read_tail(path, 25) == "line 0999\nafterwards\n"


def test_killed_manager_leaves_services_running_and_the_next_adopts_them(
    open_processes: OpenProcesses, watch: Any, tmp_path: Path
) -> None:
    killed_manager(
        tmp_path,
        {"name": A, "command": ["sh", "-c", "echo here; sleep 600"]},
        {"name": "p-test-agent-2", "command": ["sleep", "600"]},
    )

    orchestrator = open_processes()
    history = watch(orchestrator)

    first, second = orchestrator.list()
    assert (first.state, second.state) == ("running", "running")
    assert first.pid is not None
    assert not is_gone(first.pid)
    orchestrator.deploy(spec("sh", "-c", "echo here; sleep 600"))  # the same: nothing happens
    assert orchestrator.list() == [first, second]

    orchestrator.stop_many([first.name, second.name])

    assert history.until(second.name, "exited").reason == "stopped"
    assert orchestrator.logs(A) == "here\n"
    assert is_gone(first.pid)


def test_end_of_an_adopted_service_is_seen_at_once(
    open_processes: OpenProcesses, watch: Any, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    killed_manager(tmp_path, {"name": A, "command": ["sh", "-c", f"read code < {tmp_path}/pipe; exit $code"]})
    orchestrator = open_processes()
    history = watch(orchestrator)

    (tmp_path / "pipe").write_text("3\n")

    status = history.next()
    if status.state == "lost":  # a kernel before 6.15 whose init was faster than we
        assert status.exit_code is None
        assert status.reason == "exit code unknown: it ended outside the sight of a manager"
    else:
        assert (status.state, status.exit_code, status.reason) == ("failed", 3, "exit code 3")


def test_adopted_daemons_die_with_their_service(
    open_processes: OpenProcesses, watch: Any, tmp_path: Path, wait_until: WaitUntil
) -> None:
    killed_manager(tmp_path, {"name": A, "command": [sys.executable, "-c", DAEMON, str(tmp_path / "daemon")]})
    orchestrator = open_processes()
    wait_until((tmp_path / "daemon").exists)

    orchestrator.stop(A)

    assert is_gone(int((tmp_path / "daemon").read_text()))


def test_service_that_ended_unseen_is_lost_and_its_daemons_are_killed(
    open_processes: OpenProcesses, tmp_path: Path, wait_until: WaitUntil
) -> None:
    killed_manager(
        tmp_path, {"name": A, "command": [sys.executable, "-c", DAEMON, str(tmp_path / "daemon"), "end"]}
    )
    wait_until((tmp_path / "daemon").exists)
    daemon = int((tmp_path / "daemon").read_text())
    recorded = json.loads((tmp_path / "state" / f"{A}.json").read_text())
    wait_until(lambda: is_gone(recorded["process"]["pid"]))
    # Whoever is init here may not have reaped it yet, which would tell its code: make it surely gone.
    recorded["process"]["start_ticks"] -= 1
    (tmp_path / "state" / f"{A}.json").write_text(json.dumps(recorded))
    assert not is_gone(daemon)

    status = only(open_processes())

    assert (status.state, status.exit_code, status.pid) == ("lost", None, None)
    assert status.reason == "exit code unknown: it ended outside the sight of a manager"
    assert is_gone(daemon)


@pytest.mark.parametrize("forgery", [{"start_ticks": 1}, {"boot": "of yesterday"}])
def test_recycled_pid_is_not_mistaken_for_the_service(
    open_processes: OpenProcesses, tmp_path: Path, forgery: dict[str, Any]
) -> None:
    stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        first = open_processes()
        first.deploy(spec("sleep", "600"))
        first.close()
        state = tmp_path / "state" / f"{A}.json"
        recorded = json.loads(state.read_text())
        recorded["process"] |= {"pid": stranger.pid} | forgery
        state.write_text(json.dumps(recorded))

        second = open_processes()

        assert only(second).state == "lost"
        second.stop(A)
        second.deploy(spec("sleep", "600"))
        second.stop(A)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_manager_killed_between_start_and_record_leaves_exactly_one_service(
    open_processes: OpenProcesses, watch: Any, tmp_path: Path
) -> None:
    killed_manager(tmp_path, {"name": A, "command": ["sleep", "600"]})
    state = tmp_path / "state" / f"{A}.json"
    recorded = json.loads(state.read_text())
    unrecorded = recorded["process"]["pid"]
    state.write_text(json.dumps(recorded | {"state": "pending", "process": None, "started_at": None}))

    orchestrator = open_processes()
    watch(orchestrator)

    deadline = time.monotonic() + 20
    while (status := only(orchestrator)).state != "running":
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert is_gone(unrecorded)
    assert status.restarts == 0
    marker = f"{MARKER}={A}@"
    carriers = [
        process.pid
        for process in psutil.process_iter()
        if marker in (_environment(process.pid)) and not is_gone(process.pid)
    ]
    assert status.pid in carriers
    assert unrecorded not in carriers


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def test_restart_that_was_due_when_the_manager_died_takes_place(
    open_processes: OpenProcesses, tmp_path: Path, wait_until: WaitUntil
) -> None:
    script = f"test -e {tmp_path}/again && exec sleep 600; touch {tmp_path}/again; exit 4"
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            MANAGER,
            str(tmp_path),
            json.dumps([{"name": A, "command": ["sh", "-c", script], "restart": "on-failure"}]),
        ],
        stdout=subprocess.DEVNULL,
    ) as manager:
        state = tmp_path / "state" / f"{A}.json"
        wait_until(lambda: state.exists() and json.loads(state.read_text())["exit_code"] == 4)
        manager.kill()

    orchestrator = open_processes()

    wait_until(lambda: only(orchestrator).state == "running")
    assert only(orchestrator).restarts == 1


def test_stop_that_a_crash_interrupted_is_completed(
    open_processes: OpenProcesses, tmp_path: Path, wait_until: WaitUntil
) -> None:
    killed_manager(tmp_path, {"name": A, "command": ["sh", "-c", "trap '' TERM; sleep 600; sleep 600"]})
    state = tmp_path / "state" / f"{A}.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"stopping": True}))

    orchestrator = open_processes()

    wait_until(lambda: only(orchestrator).state == "exited")
    assert only(orchestrator).reason == "stopped"


def test_unreadable_state_file_is_set_aside_and_its_processes_are_killed(
    open_processes: OpenProcesses, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_processes()
    first.deploy(spec("sleep", "600"))
    pid = only(first).pid
    first.close()
    assert pid is not None
    (tmp_path / "state" / f"{A}.json").write_text('{"format": 1, "spe')

    second = open_processes()

    assert second.list() == []
    assert is_gone(pid)
    assert (tmp_path / "state" / f"{A}.broken").exists()
    assert "state file set aside" in caplog.text
    os.waitpid(pid, 0)


def test_closed_orchestrator_lets_services_go_on(open_processes: OpenProcesses) -> None:
    first = open_processes()
    first.deploy(spec("sleep", "600"))
    before = only(first)

    first.close()

    assert only(open_processes()) == before


def test_identity_of_a_process_is_its_own() -> None:
    mine = Identity.of(os.getpid())

    assert mine is not None
    assert mine.exists()
    assert not Identity(mine.pid, mine.start_ticks + 1, mine.boot).exists()
    assert Identity.of(2**22 + 1) is None


def test_sweep_spares_everybody_without_a_doomed_marker() -> None:
    assert sweep(lambda marker: False) == 0


def test_watching_thread_survives_a_failing_step(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    done = threading.Event()

    def step(ended: list[str]) -> None:
        calls.append(len(ended))
        if len(calls) == 1:
            raise OSError("out of descriptors")
        done.set()

    watch = ExitWatch(step, name="test")
    watch.start()
    try:
        assert done.wait(20)
    finally:
        watch.close()
    assert "the ends of services are looked at again in 1 s" in caplog.text


def test_pauses_between_restarts_begin_anew_once_an_attempt_has_lived_for_a_while() -> None:
    spec = ServiceSpec(ServiceName(A), ("true",), "r", "p", restart="on-failure", max_restarts=1000)
    at_once = judge(spec, -9, restarts=6, stopping=False, backoff_s=0.5, quick_ends=6)
    after_a_while = judge(spec, -9, restarts=6, stopping=False, backoff_s=0.5, quick_ends=0)
    assert (at_once.restart_in_s, after_a_while.restart_in_s) == (30.0, 0.5)
