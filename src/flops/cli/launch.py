"""Finding the manager of a FLOPS_HOME, and starting one where none runs."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flops.client import Client, ManagerAwayError
from flops.client.address import Address, local_address, local_token, standby_addresses
from flops.client.login import find_login
from flops.core.errors import FailedError, FlopsError, InvalidInputError
from flops.core.settings import Settings
from flops.telemetry import last_lines

_LOOK_AGAIN_S = 0.03
_GRACE_S = 5.0
_HEALTH_TIMEOUT_S = 5.0
_TAKEOVER_S = 20.0

_Found = TypeVar("_Found")


def settings_here() -> Settings:
    """The settings of this shell.

    Raises:
        InvalidInputError: a FLOPS_ variable cannot be read.
    """
    try:
        return Settings.from_environment()
    except ValueError as error:
        raise InvalidInputError(str(error)) from error


def find(settings: Settings) -> Client | None:
    """The manager that one is signed in to, else `find_here`'s."""
    if (login := find_login(settings)) is not None:
        return Client(login.url, login.token, login.ca)
    return find_here(settings)


def find_here(settings: Settings) -> Client | None:
    """The running manager of this FLOPS_HOME; None where none answers.

    Whoever listens at the address must name the process that wrote it: a port may have been taken over
    since, and the token is for the manager alone.
    """
    address = local_address(settings)
    if address is None or _health(address).get("status") != "ok":
        return None
    return Client(address.url, local_token(settings))


def standbys(settings: Settings) -> list[Address]:
    """Managers of this FLOPS_HOME and machine that stand by, or take over right now."""
    return [address for address in standby_addresses(settings) if _health(address)]


def _health(address: Address) -> Mapping[str, Any]:
    """What the process that wrote the address says of itself; empty: it does not answer there."""
    with Client(address.url, token="", attempts=1, timeout_s=_HEALTH_TIMEOUT_S) as anonymous:
        try:
            health = anonymous.get_health()
        except FlopsError:
            return {}
    return health if health.get("pid") == address.pid else {}


def ensure(
    settings: Settings,
    *,
    port: int | None = None,
    listen: str | None = None,
    announce: Callable[[str], None] = lambda _: None,
    command: Sequence[str] = (sys.executable, "-P", "-m", "flops.manager"),
    deadline_s: float = 60.0,
) -> Client:
    """The running manager, started first if there is none.

    Several callers at once start one manager: they take turns by a file lock.

    Args:
        announce: told when a manager is being started, in words for the user.
        command: what starts a manager; ``--home`` and the options are added.
    Raises:
        FailedError: it ended or did not answer within the deadline; holds the tail of its log.
    """
    if client := find(settings):
        return client
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _turn(settings.home / "start.lock"):
        if client := find(settings):
            return client
        if standbys(settings):
            announce("waiting for the manager that takes over")
            if client := _wait_for_takeover(settings):
                return client
        announce("starting the manager")
        options = [] if port is None else ["--port", str(port)]
        options += [] if listen is None else ["--listen", listen]
        return _start(settings, options, command, deadline_s, lambda _: find_here(settings))


def start_standby(
    settings: Settings,
    *,
    port: int | None = None,
    command: Sequence[str] = (sys.executable, "-P", "-m", "flops.manager"),
    deadline_s: float = 60.0,
) -> Address:
    """Start one more manager that stands by; where none acts, it does so itself.

    Raises:
        FailedError: it ended or did not answer within the deadline; holds the tail of its log.
    """
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = ["--standby", *([] if port is None else ["--port", str(port)])]

    def started(pid: int) -> Address | None:
        own = local_address(settings)
        for address in [*standby_addresses(settings), *([own] if own is not None else [])]:
            health = _health(address) if address.pid == pid else {}
            if health.get("status") == "ok" or health.get("active"):
                return address
        return None

    return _start(settings, options, command, deadline_s, started)


def end_standbys(settings: Settings) -> int:
    """End the managers that stand by on this machine; answers how many. The one that acts goes on."""
    ended = 0
    for address in standbys(settings):
        with contextlib.suppress(ProcessLookupError):
            os.kill(address.pid, signal.SIGTERM)
            ended += 1
        deadline = time.monotonic() + _GRACE_S
        while address in standby_addresses(settings) and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN_S)
    return ended


def _wait_for_takeover(settings: Settings) -> Client | None:
    deadline = time.monotonic() + _TAKEOVER_S
    while time.monotonic() < deadline:
        if client := find_here(settings):
            return client
        time.sleep(_LOOK_AGAIN_S)
    return None


def _start(
    settings: Settings,
    options: Sequence[str],
    command: Sequence[str],
    deadline_s: float,
    started: Callable[[int], _Found | None],
) -> _Found:
    settings.logs_dir.mkdir(parents=True, exist_ok=True)
    log = settings.logs_dir / "manager.log"
    arguments = [*command, "--home", str(settings.home), *options]
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=settings.home,
            start_new_session=True,
        )
    deadline = time.monotonic() + deadline_s
    try:
        while time.monotonic() < deadline:
            if found := started(process.pid):
                process.returncode = 0  # it outlives us on purpose: no warning when the Popen is dropped
                return found
            if (code := process.poll()) is not None:
                raise FailedError(
                    f"the manager could not start (exit code {code}) - its log, {log}, ends with:\n"
                    + last_lines(log, start)
                )
            time.sleep(_LOOK_AGAIN_S)
    except BaseException:
        _end(process)
        raise
    _end(process)
    raise FailedError(
        f"the manager did not answer within {deadline_s:g} s and was stopped - its log, {log}, ends with:\n"
        + last_lines(log, start)
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until_gone(settings: Settings, client: Client, *, deadline_s: float = 20.0) -> bool:
    """Wait for a manager that was asked to end; False if it still answers at the deadline."""
    deadline = time.monotonic() + deadline_s
    with Client(client.url, token="", attempts=1, timeout_s=1.0) as anonymous:
        while time.monotonic() < deadline:
            try:
                anonymous.get_health()
            except ManagerAwayError:
                if local_address(settings) is None or find_here(settings) is None:
                    return True
            time.sleep(_LOOK_AGAIN_S)
    return False


@contextlib.contextmanager
def _turn(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
