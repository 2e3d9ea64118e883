"""What the Linux kernel tells about processes: who one is, how it ended, which ones belong to a service.

A pid alone names nothing: it is reused. Here a process is its pid together with its start time and the
boot it lives in, and every signal to a process found by search goes through a pidfd.

Why there is no supervisor process per service that keeps its exit code (measured on 2 cores, 2026-11):
a Python one costs 4.8 MB of private memory and 37 ms, a `/bin/sh` one 0.1 MB and 0.3 ms; but each
doubles the number of processes, hides the service's pid behind its own, and may be killed itself. The
code is read where the kernel keeps it: by `waitid` when we are the parent; else from the zombie's stat
line or, since Linux 6.15, from the pidfd itself. Only a service that ended while no manager was alive
(or was adopted on an older kernel whose init reaps at once) ends with an unknown code; services report
their own results anyway.
"""

import contextlib
import errno
import fcntl
import functools
import os
import random
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MARKER = "FLOPS_SERVICE"
"""Environment variable that every process of a service carries; user code must be handed it, too."""

_MARKER_PREFIX = b"\0" + MARKER.encode() + b"="
_GROUP_DEADLINE_S = 30.0
_ZOMBIE = frozenset({"Z", "X", "x"})

# linux/pidfd.h: _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info) in its first published size
_INFO_SIZE = 64
_PIDFD_GET_INFO = (3 << 30) | (_INFO_SIZE << 16) | (0xFF << 8) | 11
_PIDFD_INFO_EXIT = 1 << 3
_INFO_EXIT_CODE_OFFSET = 60


@functools.cache
def boot_id() -> str:
    """Names this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def step_aside(leader: int, nice: int) -> None:
    """Let the processes of a new session leave the processors to others, like nice(1); a hint.

    The value of a process counts only against processes of its own session where the kernel groups those
    (sched(7), "the autogroup feature"), so the session's group gets it as well. From a user without rights
    the kernel takes one such value in a tenth of a second (EAGAIN), so the group's may come a little later.
    """
    if nice == 0:
        return
    with contextlib.suppress(OSError):  # it has ended, or the kernel has no such groups
        nice = max(nice, os.getpriority(os.PRIO_PROCESS, leader))
        os.setpriority(os.PRIO_PROCESS, leader, nice)
        try:
            _set_group(leader, nice)
        except BlockingIOError:
            threading.Thread(target=_set_group_later, args=(Identity.of(leader), nice), daemon=True).start()


def _set_group(leader: int, nice: int) -> None:
    Path(f"/proc/{leader}/autogroup").write_text(str(nice))


def _set_group_later(leader: "Identity | None", nice: int) -> None:
    deadline = time.monotonic() + _GROUP_DEADLINE_S
    while time.monotonic() < deadline:
        time.sleep(random.uniform(0.1, 0.3))  # noqa: S311 - others may wait, too
        if leader is None or not leader.exists():
            return
        try:
            _set_group(leader.pid, nice)
        except BlockingIOError:
            continue
        except OSError:  # it has ended
            pass
        return


@dataclass(frozen=True)
class _Stat:
    """The fields we need of proc_pid_stat(5)."""

    state: str
    session: int
    start_ticks: int
    wait_status: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets and may hold spaces and brackets itself.
    fields = text[text.rindex(")") + 2 :].split()
    return _Stat(fields[0], int(fields[3]), int(fields[19]), int(fields[49]))


@dataclass(frozen=True)
class Identity:
    """One process, never to be mistaken for a later one with the same pid."""

    pid: int
    start_ticks: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> "Identity | None":
        stat = _stat(pid)
        return None if stat is None else cls(pid, stat.start_ticks, boot_id())

    def exists(self) -> bool:
        """Whether it is there still, be it as a zombie; its pid and session number are then its own."""
        if self.boot != boot_id():
            return False
        stat = _stat(self.pid)
        return stat is not None and stat.start_ticks == self.start_ticks

    def open(self) -> int | None:
        """A pidfd of it (readable once it has ended), or None when it is gone."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.exists():  # asked after the open: from here on the pidfd can mean no other process
            return pidfd
        os.close(pidfd)
        return None


def exit_code(process: Identity, pidfd: int) -> int | None:
    """How an ended process ended (0-255, or minus the signal), reaping it where that is ours to do.

    Returns:
        None: the kernel no longer tells anybody but its parent.
    """
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return _exit_code_of_stranger(process, pidfd)
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _exit_code_of_stranger(process: Identity, pidfd: int) -> int | None:
    stat = _stat(process.pid)
    if stat is not None and stat.start_ticks == process.start_ticks and stat.state in _ZOMBIE:
        return os.waitstatus_to_exitcode(stat.wait_status)
    info = bytearray(_INFO_SIZE)
    struct.pack_into("=Q", info, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:  # an older kernel
        return None
    if not struct.unpack_from("=Q", info, 0)[0] & _PIDFD_INFO_EXIT:
        return None
    return os.waitstatus_to_exitcode(struct.unpack_from("=i", info, _INFO_EXIT_CODE_OFFSET)[0])


def signal_group(leader: int, number: signal.Signals) -> None:
    """Signal the process group a leader made; it may be empty, or another user's, by now."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _marker_of(pid: int) -> str | None:
    try:
        environment = b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None  # gone, or another user's: neither is one of ours
    _, found, rest = environment.partition(_MARKER_PREFIX)
    return rest.partition(b"\0")[0].decode(errors="replace") if found else None


def _find(doomed: Callable[[str], bool], sessions: frozenset[int]) -> Iterator[int]:
    """Pidfds (the caller closes them) of processes with a doomed marker or in one of the sessions."""
    own = os.getpid()
    for entry in os.listdir("/proc"):  # noqa: PTH208 - hundreds of entries at every end of a service
        if not entry.isdigit() or int(entry) == own:
            continue
        pid = int(entry)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.EINVAL):  # gone; its pid is by now a thread's
                continue
            raise
        marker = _marker_of(pid)
        if (marker is not None and doomed(marker)) or (sessions and _lives_in(pid, sessions)):
            yield pidfd
        else:
            os.close(pidfd)


def _lives_in(pid: int, sessions: frozenset[int]) -> bool:
    stat = _stat(pid)
    return stat is not None and stat.session in sessions and stat.state not in _ZOMBIE


def sweep(
    doomed: Callable[[str], bool],
    sessions: frozenset[int] = frozenset(),
    *,
    timeout_s: float = 2.0,
) -> int:
    """Kill every process that belongs to an ended service, however it forked or changed its session.

    A process escapes only by wiping its environment *and* leaving its session.

    Args:
        doomed: decides by the value of `MARKER`.
        sessions: sessions to be killed as well; only those whose leader surely has its pid still.
        timeout_s: processes may fork while we look, so it looks until none is left, but not for ever.
    Returns:
        How many were killed.
    Raises:
        TimeoutError: some do not die, or became another user's.
    """
    deadline = time.monotonic() + timeout_s
    killed = 0
    while True:
        found = list(_find(doomed, sessions))
        try:
            for pidfd in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            killed += len(found)
            for pidfd in found:
                wait_for_end(pidfd, max(0.0, deadline - time.monotonic()))
        finally:
            for pidfd in found:
                os.close(pidfd)
        if not found:
            return killed
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(found)} processes did not die of SIGKILL in {timeout_s:g} s")


def wait_for_end(pidfd: int, timeout_s: float) -> bool:
    """Whether a process ended in time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
