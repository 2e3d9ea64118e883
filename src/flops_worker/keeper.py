"""The first process of a worker that has a container of its own: it keeps the process of the user's code.

It waits for the agent at a Unix socket, starts the user's code on that connection, prints what it prints,
ends it when the agent hangs up, reaps what it leaves behind, and tells the agent how it ended.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import List, Optional

from flops_worker import CUT_OFF, DISMISSED, channel
from flops_worker.surroundings import settings

VANISHED = 3
"""The exit code where there is no agent any more, or none has come."""

_PATIENCE_S = 600.0
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.5
_GRACE_S = 0.5
"""For a process that is idle, to see by itself that the agent has hung up."""
_LAST_OUTPUT_S = 1.0
_TAIL_BYTES = 16384
_TAIL_LINES = 20


def keep(path: str, code: str, threads: Optional[int]) -> int:
    """Serve the agent at the socket `path`; returns the exit code.

    Returns:
        0 the agent said that there is nothing more to do; `VANISHED`; 1 the user's process ended by itself;
        128 and the signal's number where a signal ended it, or this one.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the learner's data
    signals = _Signals()
    agent = _connect(path, signals)
    if agent is None:
        if signals.told_to_end:
            return 128 + signals.told_to_end
        return _say(f"no agent came to {path} within {_PATIENCE_S:g} s - see the agent's log", VANISHED)
    with agent:
        return _Kept(agent, code, threads, signals).watch()


class _Signals:
    """Signals, as something to poll. A first process is sent only those that it asks for."""

    def __init__(self) -> None:
        self.reading, writing = socket.socketpair()
        self.reading.setblocking(False)
        writing.setblocking(False)
        self._writing = writing
        self.told_to_end = 0
        """The number of the signal."""
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if number != signal.SIGCHLD:
            self.told_to_end = number

    def clear(self) -> None:
        try:
            while self.reading.recv(64):
                pass
        except BlockingIOError:
            pass


def _connect(path: str, signals: _Signals) -> Optional[socket.socket]:
    """The connection to the agent, which may come later; None where it does not, or a signal came first."""
    until = time.monotonic() + _PATIENCE_S
    pause_s = _FIRST_PAUSE_S
    while not signals.told_to_end and time.monotonic() < until:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
        select.select([signals.reading], [], [], pause_s)
        pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
    return None


class _Kept:
    """The process of the user's code."""

    def __init__(self, agent: socket.socket, code: str, threads: Optional[int], signals: _Signals) -> None:
        self._agent = agent
        self._signals = signals
        self._status: Optional[int] = None
        self._tail = b""
        self._process = subprocess.Popen(  # a session of its own, so that all of it can be killed
            [sys.executable, "-m", "flops_worker", "--fd", str(agent.fileno()), "--code", code],
            cwd=str(Path(__file__).parent.parent),
            env={**os.environ, **settings(tempfile.gettempdir(), threads)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(agent.fileno(),),
            start_new_session=True,
        )
        self._printing = threading.Thread(target=self._print, daemon=True)
        self._printing.start()

    def watch(self) -> int:
        """Wait for its end, or for the agent's; returns the exit code."""
        poll = select.poll()
        # Nothing is read here, and the connection stays blocking: it is the child's.
        poll.register(self._agent, 0)
        poll.register(self._signals.reading, select.POLLIN)
        hung_up = False
        while self._status is None and not hung_up and not self._signals.told_to_end:
            hung_up = any(fd == self._agent.fileno() for fd, _ in poll.poll())
            self._signals.clear()
            self._reap()
        if hung_up:
            self._wait(_GRACE_S)
        ended = self._status
        self._end()
        if ended == DISMISSED:
            return 0
        if self._signals.told_to_end:
            return 128 + self._signals.told_to_end
        if ended is None or ended == CUT_OFF:
            return 0 if self._was_dismissed() else _say("the agent is gone", VANISHED)
        return self._report(ended)

    def _report(self, status: int) -> int:
        """Tell the agent how the process ended: without that it sees no more than a closed connection."""
        by = _signal_name(-status) if status < 0 else None
        words = {"exit_code": None if by else status, "signal": by, "log": self._last_lines()}
        self._agent.settimeout(_LAST_OUTPUT_S)
        with contextlib.suppress(channel.ChannelClosed, socket.timeout):
            channel.send(self._agent, {"ended": words})
        how = f"by {by}" if by else f"with exit code {status}"
        return _say(f"the process of the repository's code ended {how}", 128 - status if by else 1)

    def _was_dismissed(self) -> bool:
        """Whether the agent's last message was its goodbye; it says that twice, once for us."""
        self._agent.settimeout(_LAST_OUTPUT_S)
        try:
            while True:
                message, files = channel.receive(self._agent)
                channel.close_all(files)
                if message.get("op") == "end":
                    return True
        except (channel.ChannelClosed, socket.timeout):
            return False

    def _end(self) -> None:
        """Kill what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        while self._status is None:
            self._wait(1.0)
        self._printing.join(_LAST_OUTPUT_S)

    def _wait(self, timeout_s: float) -> None:
        """Wait for the process to end."""
        until = time.monotonic() + timeout_s
        while self._status is None and time.monotonic() < until:
            select.select([self._signals.reading], [], [], max(0.0, until - time.monotonic()))
            self._signals.clear()
            self._reap()

    def _reap(self) -> None:
        """Collect all that has ended: orphans of the container are the first process's."""
        while self._status is None:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._process.pid:
                killed = os.WIFSIGNALED(status)
                self._status = -os.WTERMSIG(status) if killed else os.WEXITSTATUS(status)
                self._process.returncode = self._status

    def _print(self) -> None:
        """Hand on what the process prints, and keep the end of it."""
        output = self._process.stdout
        assert output is not None
        with output:
            while True:
                part = os.read(output.fileno(), 65536)
                if not part:
                    return
                self._tail = (self._tail + part)[-_TAIL_BYTES:]
                _write(part)

    def _last_lines(self) -> List[str]:
        return self._tail.decode(errors="replace").splitlines()[-_TAIL_LINES:]


def _signal_name(number: int) -> str:
    known = {one.value: one.name for one in signal.Signals}
    return known.get(number, f"signal {number}")


def _say(text: str, exit_code: int) -> int:
    _write(f"flops_worker: {text}\n".encode())
    return exit_code


def _write(part: bytes) -> None:
    """Print; what cannot be printed costs its lines, not the training."""
    rest = memoryview(part)
    try:
        while rest:
            rest = rest[os.write(1, rest) :]
    except OSError:
        pass
