"""Whether a process that left its name in the database is still there, as far as this machine can tell."""

import os
import select
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_ENDED = ("Z", "X", "x")
_ENDS_WITHIN_MS = 5000


def own_process() -> dict[str, Any]:
    """What tells this process from all others, on all machines and over all times."""
    pid = os.getpid()
    return {"pid": pid, "started": _started(pid), "host": socket.gethostname(), **_surroundings()}


def is_gone(process: Mapping[str, Any]) -> bool:
    """Whether the process has certainly ended: it ran where we look, and is not there. False: who knows."""
    return is_here(process) and _started(process["pid"]) != str(process["started"])


def end(process: Mapping[str, Any]) -> None:
    """Kill the process where it is surely the one that is meant, and wait until it is gone."""
    if is_gone(process) or process.get("pid") == os.getpid() or not is_here(process):
        return
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(process["pid"])
        try:
            if not is_gone(process):  # it is the one behind the descriptor
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                poll.poll(_ENDS_WITHIN_MS)
        finally:
            os.close(pidfd)


def is_here(process: Mapping[str, Any]) -> bool:
    """Whether it ran where we look: on this boot of this machine, among the processes that we see."""
    known = isinstance(process.get("pid"), int) and bool(process.get("started"))
    return known and all(process.get(key) == value for key, value in _surroundings().items())


def _surroundings() -> dict[str, str]:
    """This boot of this machine, and which of its processes are seen from here."""
    return {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "space": str(Path("/proc/self/ns/pid").readlink()),
    }


def _started(pid: int) -> str:
    """When the process started, in ticks of this boot; empty where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    fields = text[text.rindex(")") + 2 :].split()
    return "" if fields[0] in _ENDED else fields[19]
