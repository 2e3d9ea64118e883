"""What processes of this machine use, as the kernel counts it.

Counters, not rates: who wants rates looks twice. One look is one pass over ``/proc``.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flops.core.ids import ServiceName
from flops.orchestration.port import ServiceUsage

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class _Process:
    """The fields of proc_pid_stat(5) that count here."""

    parent: int
    session: int
    ticks: int
    """Of it, and of its children that are gone."""
    threads: int


def consumed(leaders: Mapping[ServiceName, int]) -> list[ServiceUsage]:
    """What services use, each with all processes that descend from its first one or live in its session.

    A process belongs to the nearest service above it. One that has left both its parents and its session
    counts for nobody; nor do bytes, which the kernel does not count by process.

    Args:
        leaders: pid of each service's first process.
    """
    names = {pid: name for name, pid in leaders.items()}
    processes = dict(_processes())
    members: dict[ServiceName, list[int]] = {}
    for pid in processes:
        owner = _owner(pid, processes, names)
        if owner is not None:
            members.setdefault(owner, []).append(pid)
    return [
        ServiceUsage(
            name,
            cpu_s=sum(processes[pid].ticks for pid in pids) / _TICKS_PER_S,
            memory_bytes=sum(map(_private_bytes, pids)),
            threads=sum(processes[pid].threads for pid in pids),
        )
        for name, pids in sorted(members.items())
    ]


def rate(before: float | None, now: float | None, taken_s: float) -> float | None:
    """Of a counter, a second; None: it is not counted, or began anew in between."""
    if before is None or now is None or taken_s <= 0 or now < before:
        return None
    return (now - before) / taken_s


def _owner(
    pid: int, processes: Mapping[int, _Process], names: Mapping[int, ServiceName]
) -> ServiceName | None:
    seen: set[int] = set()
    at = pid
    while at in processes and at not in seen:  # numbers are reused while we look: there may be a ring
        if at in names:
            return names[at]
        seen.add(at)
        at = processes[at].parent
    return names.get(processes[pid].session)


def _processes() -> Iterator[tuple[int, _Process]]:
    for entry in os.listdir("/proc"):  # noqa: PTH208 - hundreds of entries, every second
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:  # noqa: PTH123
                text = file.read()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The second field is the program's name in brackets and may hold spaces and brackets itself.
        fields = text[text.rindex(b")") + 2 :].split()
        ticks = sum(map(int, fields[11:15]))
        yield int(entry), _Process(int(fields[1]), int(fields[3]), ticks, int(fields[17]))


def _private_bytes(pid: int) -> int:
    """Memory that is nobody else's, and no file's: files can be read again."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:  # noqa: PTH123
            fields = file.read().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return max(0, int(fields[1]) - int(fields[2])) * _PAGE_BYTES
