"""Environments for other people's code, from this machine's own package index and its own interpreters."""

import os
import re
import shutil
import sysconfig
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from flops.core.errors import FailedError, InvalidInputError
from flops.images import Environment, Lock, ensure_environment, installed_interpreters
from flops.images.uv import Progress

KEPT = 5
"""Environments that are kept although nothing runs in them: the next project may have the same lock."""
MAX_LOCK_BYTES = 1 << 20

# A name and its version; never a URL, a path or an option: where packages come from is this machine's choice.
_PIN = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(\[[A-Za-z0-9._,-]+\])?==[A-Za-z0-9.!+_-]+"
    r"( *;[ A-Za-z0-9._<>=!'\"()-]+)?"
)


@dataclass(frozen=True)
class Made:
    """An environment, and what its user should know about it."""

    environment: Environment
    warning: str = ""


def checked_lock(text: str, expected: str) -> Lock:
    """The lock that an assignment named.

    Raises:
        InvalidInputError: it is another one, or says where packages are to come from.
    """
    lock = Lock.parse(text) if len(text) <= MAX_LOCK_BYTES else None
    if lock is None or lock.hash != expected:
        raise InvalidInputError(f"what the manager sent is not lock {expected[:12]} - nothing is installed")
    # Each line counts, not what a parser makes of them: a header may hide nothing either.
    for line in text.splitlines():
        if line.strip() and not line.startswith("#") and not _PIN.fullmatch(line):
            raise InvalidInputError(
                f"lock {expected[:12]} asks for '{line[:60]}', and this node installs versions of packages "
                "from its own index alone - nothing is installed"
            )
    return lock


def make_environment(
    lock: Lock,
    root: Path,
    *,
    progress: Progress,
    cancel: threading.Event,
    environment: Mapping[str, str] = os.environ,
) -> Made:
    """The environment of a lock, from wheels alone: building a package would run its code, with a network.

    Raises:
        FailedError, InvalidInputError, UnavailableError: it cannot be had here, and why.
    """
    own = sysconfig.get_platform()
    if lock.platform != own:
        raise FailedError(
            f"the project's packages were chosen for {lock.platform}, this node is {own} - run the "
            "manager on a machine of the same kind"
        )
    here, warning = _for_this_machine(lock, environment)
    made = ensure_environment(
        here,
        root,
        environment=environment,
        wheels_only=True,
        progress=progress,
        cancel=cancel,
    )
    os.utime(made.python.parent.parent)
    return Made(made, warning)


def forget_environments(root: Path, used: Collection[str]) -> None:
    """Remove what was used longest ago, but for `KEPT` of them and for those in use (by their hashes)."""
    if not root.is_dir():
        return
    idle = [found for found in root.glob("[!.]*") if found.is_dir() and found.name not in used]
    idle.sort(key=lambda found: found.stat().st_mtime, reverse=True)
    for found in idle[KEPT:]:
        trash = found.with_name(f".{found.name}.trash-forgotten")
        found.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _for_this_machine(lock: Lock, environment: Mapping[str, str]) -> tuple[Lock, str]:
    """The lock with a Python that is here: the same one, else the nearest patch of the same minor."""
    try:
        wanted = Version(lock.python)
    except InvalidVersion as error:
        raise InvalidInputError(f"lock {lock.hash[:12]} is for Python '{lock.python[:20]}'") from error
    same = [
        found.version
        for found in installed_interpreters(environment)
        if found.version.release[:2] == wanted.release[:2]
    ]
    if not same:
        minor = ".".join(map(str, wanted.release[:2]))
        raise FailedError(
            f"the project needs Python {minor}, which is not installed on this node - install it, or let the "
            "project use another one"
        )
    if wanted in same:
        return lock, ""
    nearest = min(same, key=lambda version: (abs(version.micro - wanted.micro), -version.micro))
    warning = f"Python {nearest} is used, {wanted} is not installed on this node"
    return Lock.of(str(nearest), lock.packages, platform=lock.platform), warning
