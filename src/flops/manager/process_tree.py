"""Ending a process with everything that descends from it, also what leads a session of its own (uv, git,
guests do).
"""

import os
import signal
from collections import defaultdict
from contextlib import suppress
from pathlib import Path


def kill_tree(pid: int, *, itself: bool = True) -> None:
    """Kill a process and all its descendants.

    Every process found is stopped before the next look, so none can start another one unseen; what has lost
    its parent already is not found.

    Args:
        itself: False: only the descendants.
    """
    found: list[int] = []
    fresh = [pid]
    while fresh:
        for one in fresh:
            if one != pid or itself:
                _signal(one, signal.SIGSTOP)
        found += fresh
        children = _children()
        fresh = [child for one in found for child in children[one] if child not in found]
    # Children first: the death of their parent would make them somebody else's.
    for one in reversed(found):
        if one != pid or itself:
            _signal(one, signal.SIGKILL)


def _children() -> dict[int, list[int]]:
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                # "pid (name) state ppid ...", where the name may hold anything
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children[int(fields[1])].append(int(entry.name))
    return children


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
