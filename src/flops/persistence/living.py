"""Whether a process that left its name in the database is still there, as far as this machine can tell."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ENDED = ("Z", "X", "x")


def own_process() -> dict[str, Any]:
    """What tells this process from all others, on all machines and over all times."""
    pid = os.getpid()
    return {"pid": pid, "started": _started(pid), "host": socket.gethostname(), **_surroundings()}


def is_gone(process: Mapping[str, Any]) -> bool:
    """Whether the process has certainly ended: it ran where we look, and is not there. False: who knows."""
    if not isinstance(process.get("pid"), int) or not process.get("started"):
        return False
    if any(process.get(key) != value for key, value in _surroundings().items()):
        return False
    return _started(process["pid"]) != str(process["started"])


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
