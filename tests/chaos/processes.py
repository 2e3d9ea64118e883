"""What runs in a FLOPS_HOME, process by process, and what may be done to one: kill it, freeze it, cut one of
its connections.

A process is found by the marker that services carry, by the manager's own address file, or as a descendant
of one of them; it is signalled through a pidfd that was opened before it was looked at, so no other process
can be hit.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.home import Home

_PIDFD_GETFD = 438  # the same number on every architecture; Python has no name for it
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Process:
    """One process: ``kind`` manager, aggregator, cluster, agent, worker, data, recorder, step, step-child."""

    pid: int
    kind: str
    service: str


def processes(home: Home) -> list[Process]:
    """Everything of this home that runs now."""
    parents, markers = _table()
    roles = _services(home)
    found = []
    manager = home.manager_pid()
    if manager is not None:
        found.append(Process(manager, "manager", "manager"))
    for pid, marker in markers.items():
        service, _, folder = marker.partition("@")
        if folder != home.marker:
            continue
        role, leader = roles.get(service, ("", 0))
        if pid == leader:
            found.append(Process(pid, role, service))
        elif b"flops_worker" in _command(pid):
            found.append(Process(pid, "worker", service))
        else:
            found.append(Process(pid, "other", service))
    if manager is not None:
        found += [
            Process(pid, "step" if parents[pid] == manager else "step-child", "step")
            for pid in _descendants(manager, parents)
            if pid not in markers
        ]
    return found


def left_over(home: Home) -> list[str]:
    """Processes of this home, in words; also those that lost their parents."""
    _, markers = _table()
    ours = [pid for pid, marker in markers.items() if marker.endswith(f"@{home.marker}")]
    text = os.fsencode(home.settings.home)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid() and text in _command(int(entry.name)):
            ours.append(int(entry.name))
    return [f"{pid}: {_in_words(pid)}" for pid in sorted(set(ours))]


def kill(process: Process) -> bool:
    """SIGKILL; returns once it is dead. False: it was gone before."""
    with _pidfd(process.pid) as pidfd:
        if pidfd is None:
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(5000)
        return True


def send(process: Process, number: signal.Signals) -> bool:
    with _pidfd(process.pid) as pidfd:
        if pidfd is None:
            return False
        signal.pidfd_send_signal(pidfd, number)
        return True


@dataclass(frozen=True)
class Connection:
    """One open connection: a descriptor of a process."""

    process: Process
    fd: int
    kind: str

    def cut(self) -> bool:
        """End it in both directions, for both ends; nobody else notices."""
        with _pidfd(self.process.pid) as pidfd:
            if pidfd is None:
                return False
            fd = _libc.syscall(_PIDFD_GETFD, pidfd, self.fd, 0)
            if fd < 0:
                return False
            with socket.socket(fileno=fd) as ours:
                try:
                    ours.shutdown(socket.SHUT_RDWR)
                except OSError:  # it has just ended by itself
                    return False
            return True


def connections(home: Home, running: list[Process]) -> list[Connection]:
    """Connections that may be cut: found at the end that accepted them, where the socket has a name."""
    run_dir = home.settings.run_dir
    names = {
        "aggregator": (str(run_dir) + "/p-", "agent-aggregator"),
        "cluster": (str(run_dir) + "/p-", "agent-aggregator"),
        "data": (str(home.settings.data_socket), "agent-data"),
        "manager": (str(home.settings.manager_socket), "aggregator-manager"),
    }
    inodes = _connected_unix_sockets()
    found = []
    for process in running:
        if process.kind == "worker":
            found += [Connection(process, fd, "agent-worker") for fd in _channel_of(process.pid)]
        elif process.kind in names:
            prefix, kind = names[process.kind]
            found += [
                Connection(process, fd, kind)
                for fd, inode in _sockets_of(process.pid)
                if inodes.get(inode, "").startswith(prefix)
            ]
    return found


def _table() -> tuple[dict[int, int], dict[int, str]]:
    """Parents of all processes, and the markers of those that carry one."""
    parents: dict[int, int] = {}
    markers: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] in "ZX":
                continue
            environment = (entry / "environ").read_bytes()
            parents[pid] = int(fields[1])
            _, found, rest = (b"\0" + environment).partition(b"\0FLOPS_SERVICE=")
            if found:
                markers[pid] = rest.partition(b"\0")[0].decode()
    return parents, markers


def _descendants(root: int, parents: dict[int, int]) -> Iterator[int]:
    for pid, parent in parents.items():
        if parent == root:
            yield pid
            yield from _descendants(pid, parents)


def _services(home: Home) -> dict[str, tuple[str, int]]:
    """Role and pid of each service, as the orchestrator noted them."""
    found = {}
    for path in home.settings.services_dir.glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_bytes())
            pid = record["process"]["pid"] if record["process"] else 0
            role = str(record["spec"]["role"])
            if role == "aggregator" and not path.stem.endswith("-aggregator"):
                role = "cluster"  # the root's name has nothing behind its role
            found[path.stem] = (role, pid)
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _in_words(pid: int) -> str:
    return _command(pid).replace(b"\0", b" ").decode(errors="replace")[:200]


def _connected_unix_sockets() -> dict[str, str]:
    """Inode to path; an accepted socket bears the name of the one it came through."""
    found = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[5] == "03":
            found[fields[6]] = fields[7]
    return found


def _sockets_of(pid: int) -> Iterator[tuple[int, str]]:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(entry.readlink())
                if target.startswith("socket:["):
                    yield int(entry.name), target[8:-1]


def _channel_of(worker: int) -> list[int]:
    words = _command(worker).split(b"\0")
    return [int(words[words.index(b"--fd") + 1])] if b"--fd" in words else []


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield pidfd
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)
