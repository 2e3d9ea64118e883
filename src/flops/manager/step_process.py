"""Steps run in a process of their own: heavy imports, big files and crashes stay out of the manager.

The manager (`StepProcess`) writes one JSON line per request to the process's standard input and reads JSON
lines: progress, then a result or an error. The process leads its own session; giving up means killing all of
it, uv, git, npm and the user's code included. When its standard input ends (the manager is gone) it does the
same to itself.
"""

import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any, Protocol

from flops.core.disk import DiskFullError, disk_full, is_full
from flops.core.errors import BY_CODE, FailedError, FlopsError
from flops.core.term import boot_time, lease_end
from flops.manager.cancellation import Cancellation
from flops.manager.process_tree import kill_tree
from flops.orchestration import step_aside
from flops.telemetry import about, collector_of, current, current_span, log_lines, record_spans, said, span

if TYPE_CHECKING:
    from flops.persistence.lease import Lease

log = logging.getLogger(__name__)

Progress = Callable[[str], None]

_LAST_LINES = 5
_LOOK_AT_LEASE_S = 0.2
_ATTEMPTS = 5
# Not by -m: the package imports this module, which would then exist twice.
_PROGRAM = "from flops.manager.step_process import main; main()"
# Errors keep their kind on the way to the manager.


class StepRunner(Protocol):
    """What runs steps: one at a time, in order."""

    def run(
        self,
        step: str,
        request: Mapping[str, Any],
        progress: Progress,
        cancellation: Cancellation,
    ) -> dict[str, Any]:
        """Run one step to its end and answer its result.

        Raises:
            Cancelled: the cancellation was set before the end; nothing of the step runs any more.
            FlopsError: the step failed.
        """
        ...

    def close(self) -> None:
        """Nothing of the runner is left afterwards."""
        ...


class StepProcess:
    """The manager's end. Started with the first step; one thread at a time.

    Args:
        lease: of the manager, where it has one: no step begins without it, and a process whose manager does
            not renew it, frozen maybe, ends by itself.
        nice: how far its steps step aside for whoever else wants the processors.
    """

    def __init__(self, log: Path, lease: "Lease | None" = None, *, nice: int = 0) -> None:
        self._log = log
        self._lease = lease
        self._nice = nice
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        step: str,
        request: Mapping[str, Any],
        progress: Progress,
        cancellation: Cancellation,
    ) -> dict[str, Any]:
        answer = self._answer(step, request, progress, cancellation)
        if "error" in answer:
            kind = BY_CODE.get(answer["error"]["code"], FailedError)
            if answer["error"].get("disk_full"):
                kind = DiskFullError
            raise kind(answer["error"]["message"])
        result = answer["result"]
        assert isinstance(result, dict)
        return result

    def _answer(
        self, step: str, request: Mapping[str, Any], progress: Progress, cancellation: Cancellation
    ) -> dict[str, Any]:
        """Run the step; one whose process was killed, for memory or by somebody, is run again a few times."""
        for attempt in range(1, _ATTEMPTS + 1):
            cancellation.check()
            if self._lease is not None:
                self._lease.check()
            process = self._start()
            with cancellation.calling(self._kill):
                answer = self._ask(
                    process,
                    {"step": step, "request": dict(request), "about": _facts(), "span": current_span()},
                    progress,
                )
            if answer is not None:
                return answer
            self.close()
            cancellation.check()
            how = _exit_in_words(process.returncode)
            if process.returncode >= 0 or attempt == _ATTEMPTS:
                break
            progress(f"the process of step '{step}' ended ({how}), it is started again")
        raise FailedError(
            f"step '{step}' ended without an answer ({how}){_last_lines(self._log)} - see {self._log}"
        )

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _kill(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        process.wait()

    def _start(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._log.parent.mkdir(parents=True, exist_ok=True)
            shared = [self._lease.until_fd] if self._lease is not None else []
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM, *map(str, shared)],
                    pass_fds=shared,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            step_aside(self._process.pid, self._nice)
        return self._process

    def _ask(
        self, process: "subprocess.Popen[str]", question: Mapping[str, Any], progress: Progress
    ) -> dict[str, Any] | None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        except OSError:
            _end(process)
            return None
        for line in process.stdout:
            if not line.endswith("\n"):  # it died in the middle of it
                break
            answer = json.loads(line)
            if "progress" not in answer:
                assert isinstance(answer, dict)
                return answer
            progress(str(answer["progress"]))
        _end(process)
        return None

    def _kill(self) -> None:
        if self._process is not None:
            _kill(self._process)


def _kill(process: "subprocess.Popen[str]") -> None:
    # It is not waited for before it is killed, so the number cannot belong to another process.
    if process.returncode is None:
        kill_tree(process.pid)


def _end(process: "subprocess.Popen[str]") -> None:
    """See the end of a process that died, and end what it left behind in its session."""
    with suppress(ProcessLookupError):  # not waited for yet, so the group is still its own
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _facts() -> dict[str, str | int]:
    """What the manager knows of this moment, but for what the step process is itself."""
    return {name: value for name, value in current().items() if name != "service"}


def _exit_in_words(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _last_lines(log: Path) -> str:
    with suppress(OSError), log.open(errors="replace") as lines:
        last = [line.strip() for line in deque(lines, _LAST_LINES) if line.strip()]
        if last:
            return ": " + said(last[-1])[:300]
    return ""


# The other end


def main() -> None:
    """Read requests from standard input and answer them, until it ends."""
    log_lines("step")
    record_spans("step", collector_of())
    for fd in sys.argv[1:]:
        os.set_inheritable(int(fd), False)  # the user's code has no business with it
        threading.Thread(target=_end_with_lease, args=(int(fd),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Whatever a library prints must not get between the answers.
    os.dup2(2, 1)
    requests: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_pump, args=(sys.stdin, requests), daemon=True).start()
    # It takes a while: whoever is to end with the manager does so meanwhile, too.
    from flops.manager.steps import run_step

    lock = threading.Lock()

    def answer(message: Mapping[str, Any]) -> None:
        with lock:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    while True:
        question = json.loads(requests.get())
        step = question["step"]

        def progress(message: str, step: str = step) -> None:
            log.info("%s: %s", step, message)
            answer({"progress": message})

        try:
            with about(**question.get("about", {})), span(f"run {step}", parent=question.get("span", "")):
                log.info("%s begins", step)
                result = run_step(step, question["request"], progress)
                log.info("%s has ended", step)
        except FlopsError as error:
            full = isinstance(error, DiskFullError)
            answer({"error": {"code": error.code, "message": str(error), "disk_full": full}})
        except OSError as error:
            if not is_full(error):
                raise
            told = disk_full(Path(question["request"]["home"]), f"step '{step}'")
            answer({"error": {"code": told.code, "message": str(told), "disk_full": True}})
        else:
            answer({"result": result})


def _pump(lines: IO[str], requests: "SimpleQueue[str]") -> None:
    for line in lines:
        requests.put(line)
    kill_tree(os.getpid(), itself=False)
    os._exit(0)


def _end_with_lease(fd: int) -> None:
    """End the process with all that it started once its manager may not act any more."""
    with mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ) as until:
        while boot_time() < lease_end(until):
            time.sleep(_LOOK_AT_LEASE_S)
    kill_tree(os.getpid(), itself=False)
    os.kill(os.getpid(), signal.SIGKILL)  # not by itself: it is to be started again
