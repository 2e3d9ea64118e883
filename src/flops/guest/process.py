"""One guest process and what belongs to it: its channel, its lifeline, its log, its temporary home."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flops.guest.home import Home
from flops.guest.room import Room, environment, guest_path
from flops_worker import channel

_LAUNCHER = Path(__file__).with_name("launcher.py")
_LAUNCH_DEADLINE_S = 60.0
_LOG_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_TAIL_BYTES = 16_384
_TAIL_LINES = 20


@dataclass(frozen=True)
class Isolation:
    """What was achieved."""

    network_cut: bool
    """The guest has a network of its own with nothing in it but loopback."""
    reason: str
    """Why the network is not cut, or not by us; empty when it is."""


class Process:
    """A running guest. `end` may be called from any thread, and any number of times."""

    def __init__(
        self,
        room: Room,
        *,
        log: Path | None,
        isolate: bool,
        threads: int | None,
        memory_mb: int | None,
        module: str = "flops_worker",
    ) -> None:
        room.check()
        path = guest_path()
        self._ending = threading.Lock()
        self._last_lines: list[str] = []
        self._home = Home()
        try:
            self._log = os.open(log or self._home.path / "log", _LOG_FLAGS, 0o600)
        except OSError:
            self._home.remove()
            raise
        self._log_start = os.fstat(self._log).st_size
        self.channel, theirs = socket.socketpair()
        their_lifeline, self._lifeline = os.pipe()
        try:
            self._popen = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(_LAUNCHER)),
                    *(str(theirs.fileno()), str(their_lifeline), "isolate" if isolate else "share"),
                    str((memory_mb or 0) << 20),
                    *(str(room.python.absolute()), "-m", module),
                    *("--fd", str(theirs.fileno()), "--code", str(room.code.absolute())),
                ],
                cwd=path,
                env=environment(room, path, self._home.path, threads),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(), their_lifeline),
                process_group=0,
            )
        except BaseException:
            self.channel.close()
            self._release()
            raise
        finally:
            theirs.close()
            os.close(their_lifeline)
        self.isolation = self._isolation()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """Exit status of an ended process; None while it runs, or where a signal ended it."""
        code = self._popen.returncode
        return None if code is None or code < 0 else code

    @property
    def signal(self) -> str | None:
        """Name of the signal that ended the process."""
        code = self._popen.returncode
        if code is None or code >= 0:
            return None
        known = {one.value: one.name for one in signal.Signals}
        return known.get(-code, f"signal {-code}")

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """See `flops_worker.channel.receive`."""
        return channel.receive(self.channel)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the process to end by itself; it is not reaped, so its id and its group's stay its own."""
        with self._ending:
            if self._popen.returncode is not None:
                return True
            watched = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(watched, select.POLLIN)
            return bool(poll.poll(max(0.0, timeout_s) * 1000))
        finally:
            os.close(watched)

    def end(self) -> None:
        """Kill what is left of the process and its children, and free what belongs to it, but for the log."""
        with self._ending:
            if self._popen.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._popen.wait()
            self._last_lines = self._tail()
            self._release()

    def last_lines(self) -> list[str]:
        """The last lines the process wrote."""
        with self._ending:
            return self._tail() if self._popen.returncode is None else self._last_lines

    def _tail(self) -> list[str]:
        size = os.fstat(self._log).st_size
        start = max(self._log_start, size - _TAIL_BYTES)
        text = os.pread(self._log, size - start, start).decode(errors="replace")
        return text.splitlines()[-_TAIL_LINES:]

    def _release(self) -> None:
        os.close(self._lifeline)
        os.close(self._log)
        self._home.remove()

    def _isolation(self) -> Isolation:
        """What the launcher reports; if it says nothing it died, and the first request will tell."""
        self.channel.settimeout(_LAUNCH_DEADLINE_S)
        try:
            report, _ = channel.receive(self.channel)
        except (TimeoutError, channel.ChannelClosed):
            return Isolation(network_cut=False, reason="the launcher did not answer")
        reason = str(report.get("reason"))
        return Isolation(network_cut=not reason, reason=reason)
