"""Running uv: streamed progress, deadline, cancellation, and its failures in our words."""

import os
import re
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flops.core.disk import DiskFullError
from flops.core.errors import FailedError, InvalidInputError, UnavailableError

Progress = Callable[[str], None]

_POLL_S = 0.2  # how late a cancellation may be noticed; output is never waited for
_SHOWN = re.compile(r"\s*(Downloading|Building|Built|Resolved|Prepared|Installed)\b.*")
_PASSWORD = re.compile(r"//[^/\s]+@")
_NETWORK = re.compile(
    r"Request failed after|error sending request|tcp connect error|dns error|timed out|"
    r"HTTP status server error|Could not connect|Network connectivity is disabled|"
    r"connection (?:closed|reset)",
    re.IGNORECASE,
)
_MAX_OUTPUT = 8 << 20
_finding = threading.Lock()
"""uv asks sysconfig; of two threads that ask first at once one gets None for a text (Python 3.11)."""


class KilledError(UnavailableError):
    """A program was killed from outside, perhaps for lack of memory: what it was doing is half done."""

    def __init__(self, what: str, number: int) -> None:
        self.signal = signal.Signals(number).name
        super().__init__(f"'{what}' was killed by {self.signal}, perhaps for lack of memory - try again")


@dataclass(frozen=True)
class Finished:
    """How a run of uv ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def network_failed(self) -> bool:
        return self.returncode != 0 and bool(_NETWORK.search(self.stderr))


def run(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    timeout_s: float,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    keep_open: Sequence[int] = (),
) -> Finished:
    """Run uv to its end; its process never outlives this call.

    Args:
        progress: told each line that a user would want to see; what it raises ends the run.
        keep_open: file descriptors that the process inherits (a lock stays held while uv is at work).
    Raises:
        FailedError: uv cannot be started, ran over ``timeout_s``, or ``cancel`` was set.
        KilledError: somebody killed it.
    """
    return start([find_uv(), *arguments], environment, timeout_s, progress, cancel, keep_open)


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    timeout_s: float,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    keep_open: Sequence[int] = (),
) -> Finished:
    """As `run`, for any program."""
    what = " ".join(command[:3]).removeprefix(os.path.dirname(command[0]) + "/")  # noqa: PTH120
    deadline = time.monotonic() + timeout_s
    try:
        process = subprocess.Popen(
            [*_with_parent(), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            process_group=0,  # a new session would have the weight of one that steps aside for nobody
            pass_fds=tuple(keep_open),
        )
    except OSError as error:
        raise FailedError(f"'{what}' cannot be started: {error} - install FLOps again") from error
    assert process.stdout is not None
    assert process.stderr is not None
    output = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    lines = _Lines(progress)
    try:
        with process, selectors.DefaultSelector() as selector:
            try:
                for fd in output:
                    selector.register(fd, selectors.EVENT_READ)
                while selector.get_map():
                    for key, _ in selector.select(_POLL_S):
                        part = os.read(key.fd, 1 << 16)
                        if not part:
                            selector.unregister(key.fd)
                        elif len(output[key.fd]) < _MAX_OUTPUT:
                            output[key.fd] += part
                        if key.fd == process.stderr.fileno():
                            lines.feed(part)
                    if cancel is not None and cancel.is_set():
                        raise FailedError(f"'{what}' was stopped on request")
                    if time.monotonic() > deadline:
                        raise FailedError(
                            f"'{what}' did not end within {timeout_s:.0f} s - "
                            "look at the package index and the network, then try again"
                        )
                process.wait(timeout=max(1.0, deadline - time.monotonic()))
            except BaseException:
                _kill(process)
                raise
    except subprocess.TimeoutExpired as error:
        raise FailedError(f"'{what}' closed its output and did not end - try again") from error
    if process.returncode < 0:
        raise KilledError(what, -process.returncode)
    stdout, stderr = (bytes(part).decode("utf-8", "replace") for part in output.values())
    return Finished(process.returncode, stdout, _PASSWORD.sub("//***@", stderr))


def failure(finished: Finished, doing: str) -> UnavailableError | InvalidInputError | FailedError:
    """The error that tells why uv failed while ``doing`` something.

    Source:
        wording of uv 0.5 to 0.12; an unknown wording ends in a FailedError that carries uv's own last lines.
    """
    text = finished.stderr
    if finished.network_failed:
        return UnavailableError(
            f"{doing} failed: a package index could not be reached ({_cause(text)}) - "
            "check the network and pip's configuration, then try again"
        )
    if "ailed to build" in text or "ailed to download and build" in text:
        return InvalidInputError(
            f"{doing} failed: {_cause(text)} - pin a version that has a wheel for this Python, "
            "or install what its build needs"
        )
    if "No space left on device" in text:
        return DiskFullError(f"{doing} waits: no space is left on the disk - free some")
    return FailedError(f"{doing} failed: {_cause(text)} - see uv's documentation for this message")


def find_uv() -> str:
    """The uv of FLOps' own installation."""
    import uv

    try:
        with _finding:
            return str(uv.find_uv_bin())
    except FileNotFoundError as error:
        found = shutil.which("uv")
        if found is None:
            raise FailedError("the program 'uv' is missing - install FLOps again") from error
        return found


class _Lines:
    """Cuts a stream into lines and tells the ones worth showing."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._rest = b""

    def feed(self, part: bytes) -> None:
        if self._progress is None:
            return
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace").strip()
            if _SHOWN.fullmatch(text):
                self._progress(_PASSWORD.sub("//***@", text[:200]))


def _with_parent() -> list[str]:
    """A prefix that ends the process with this one, even after kill -9; empty without util-linux."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


def _cause(text: str) -> str:
    """uv's first lines about an error, as one short line."""
    lines = [
        re.sub(r"^(error|cause):\s*", "", line.strip(" ×╰─▶├│")) for line in text.splitlines() if line.strip()
    ]
    start = next((i for i, line in enumerate(text.splitlines()) if "error" in line or "×" in line), 0)
    kept = [line for line in lines[start:] if not line.startswith(("hint", "warning"))]
    short = ": ".join(kept[:4] if kept else lines[-2:])
    return short[:400] or "uv said nothing"
