"""Finding the manager of a FLOPS_HOME, and starting one where none runs."""

import contextlib
import fcntl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flops.client import Client, ManagerAwayError
from flops.client.address import local_address, local_token
from flops.client.login import find_login
from flops.core.errors import FailedError, FlopsError, InvalidInputError
from flops.core.settings import Settings

_LOG_TAIL_LINES = 15
_LOOK_AGAIN_S = 0.03
_GRACE_S = 5.0
_HEALTH_TIMEOUT_S = 5.0


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
    if address is None:
        return None
    with Client(address.url, token="", attempts=1, timeout_s=_HEALTH_TIMEOUT_S) as anonymous:
        try:
            health = anonymous.get_health()
        except FlopsError:
            return None
    if health.get("pid") != address.pid:
        return None
    return Client(address.url, local_token(settings))


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
        announce("starting the manager")
        options = [] if port is None else ["--port", str(port)]
        options += [] if listen is None else ["--listen", listen]
        return _start(settings, options, command, deadline_s)


def _start(settings: Settings, options: Sequence[str], command: Sequence[str], deadline_s: float) -> Client:
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
            if client := find_here(settings):
                process.returncode = 0  # it outlives us on purpose: no warning when the Popen is dropped
                return client
            if (code := process.poll()) is not None:
                raise FailedError(
                    f"the manager could not start (exit code {code}) - its log, {log}, ends with:\n"
                    + _tail(log, start)
                )
            time.sleep(_LOOK_AGAIN_S)
    except BaseException:
        _end(process)
        raise
    _end(process)
    raise FailedError(
        f"the manager did not answer within {deadline_s:g} s and was stopped - its log, {log}, ends with:\n"
        + _tail(log, start)
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


def _tail(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-_LOG_TAIL_LINES:]) or "  (nothing)"


@contextlib.contextmanager
def _turn(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
