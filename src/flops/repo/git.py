"""Running git on repositories that nobody vouches for.

No hooks, no submodules, no prompts, no protocols but https, ssh and file, no configuration of ours that a
caller's environment could redirect; and git's failures in our words.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flops.core.errors import (
    FailedError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from flops.core.source import redact

_WAKE_S = 0.2
_KEPT_GIT_VARIABLES = ("GIT_SSL_", "GIT_SSH", "GIT_PROXY_", "GIT_HTTP_")
_PASSWORD = re.compile(r"//[^/\s]+@")  # up to the last @: an unescaped one may be part of a password
_SAFE = (
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "core.fsmonitor=false"),
    *("-c", "submodule.recurse=false"),
    *("-c", "fetch.recurseSubmodules=false"),
    *("-c", "protocol.version=2"),
    *("-c", "gc.auto=0"),
    *("-c", "maintenance.auto=false"),
    *("-c", "advice.detachedHead=false"),
    *("-c", "core.autocrlf=false"),
    *("-c", "http.lowSpeedLimit=1000"),
    *("-c", "http.lowSpeedTime=60"),
)


@dataclass(frozen=True)
class Limits:
    """Bounds of one fetch."""

    max_bytes: int = 1 << 30
    """Of all files together, and of what git transfers."""
    max_files: int = 100_000
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Result:
    """How a run of git ended."""

    returncode: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return os.fsdecode(self.stdout).strip()


class Git:
    """Git for one fetch: its deadline and its cancellation hold over all calls together."""

    def __init__(self, source: str, limits: Limits, cancel: threading.Event | None = None) -> None:
        self._raw = source
        self._source = redacted(source)
        self._limits = limits
        self._cancel = cancel
        self._deadline = time.monotonic() + limits.timeout_s
        self._environment = _environment(os.environ)

    def run(self, *arguments: str, folder: Path | None = None) -> Result:
        """Run git to its end, whatever its exit status.

        Raises:
            FailedError: git is not installed, or was cancelled.
            UnavailableError: it takes too long.
        """
        self._look_at_clock()  # a short command may end before it is looked at
        where = [] if folder is None else ["-C", str(folder)]
        try:
            process = subprocess.Popen(
                [*_with_parent(), "git", *where, *_SAFE, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise _missing() from error
        try:
            self._bound(process.pid)
            while True:
                try:
                    stdout, stderr = process.communicate(timeout=_WAKE_S)
                    break
                except subprocess.TimeoutExpired:
                    self._look_at_clock()
        except BaseException:
            _kill(process)
            raise
        text = stderr.decode("utf-8", "replace").replace(self._raw, self._source)
        message = _PASSWORD.sub("//***@", text)
        if process.returncode == 127 and "failed to execute git" in message:
            raise _missing()
        return Result(process.returncode, stdout, message)

    def must(self, *arguments: str, folder: Path | None = None, ref: str | None = None) -> Result:
        """As `run`; any failure is raised as the error that tells what to do.

        Args:
            ref: what was asked for, if the command can fail for it.
        """
        result = self.run(*arguments, folder=folder)
        if result.returncode:
            raise explained(result, self._source, ref, self._limits)
        return result

    def _bound(self, pid: int) -> None:
        """No file that git or its helpers write may be larger than the limit."""
        try:
            bound = self._limits.max_bytes
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (bound, bound))
        except (ProcessLookupError, PermissionError):
            return  # it ended already

    def _look_at_clock(self) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise FailedError(f"fetching '{self._source}' was stopped on request")
        if time.monotonic() > self._deadline:
            raise UnavailableError(
                f"fetching '{self._source}' took longer than {self._limits.timeout_s:g} s - "
                "look at the network, then try again"
            )


def redacted(source: str) -> str:
    """A source fit to be shown: without the password, user name and query of its URL."""
    return redact(source)


def explained(result: Result, source: str, ref: str | None, limits: Limits) -> FlopsError:
    """Why git failed.

    Source:
        wording of git 2.30 to 2.47 and of curl and OpenSSH behind it, with LC_ALL=C.
    """
    text = result.stderr
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "no message")

    def says(*parts: str) -> bool:
        return any(part in text for part in parts)

    if says("couldn't find remote ref", "not our ref", "upload-pack: not our ref", "bad object"):
        if ref is None:
            return NotFoundError(f"'{source}' has no commit yet - commit and push something first")
        return no_such_ref(source, ref)
    if says("dubious ownership"):
        return UnauthorizedError(
            f"'{source}' belongs to another user - take it over, or run "
            "'git config --global --add safe.directory FOLDER'"
        )
    if says(
        "Could not resolve host", "Could not resolve hostname", "Connection refused", "Failed to connect"
    ):
        return UnavailableError(
            f"the host of '{source}' cannot be reached - check the address and the network, then try again"
        )
    if says("timed out", "Operation too slow", "early EOF", "Connection reset", "HTTP 5", "error: 5"):
        return UnavailableError(f"'{source}' broke off ({last.strip()[:200]}) - try again later")
    if says(
        "could not read Username", "Authentication failed", "Permission denied", "HTTP 401", "error: 403"
    ):
        return UnauthorizedError(
            f"'{source}' does not exist, or asks for a login - check the address, "
            "or set up a git credential or an ssh key that works without a question"
        )
    if says("Host key verification failed"):
        return UnauthorizedError(
            f"the ssh host of '{source}' is not known here - connect to it once with ssh, then try again"
        )
    if says("certificate", "SSL"):
        return UnauthorizedError(
            f"the certificate of '{source}' is not trusted ({last.strip()[:200]}) - "
            "set GIT_SSL_CAINFO to the right authority"
        )
    if says("not found", "does not appear to be a git repository", "not a git repository"):
        return NotFoundError(
            f"there is no git repository at '{source}' - check the address, and that this machine may read it"
        )
    if result.returncode == -signal.SIGXFSZ or says("File too large", "signal 25", "File size limit"):
        return too_large(source, limits)
    if says("No space left on device"):
        return FailedError(f"no space is left to fetch '{source}' - free some, then try again")
    if says("transport", "not allowed"):
        return InvalidInputError(
            f"'{source}' uses a protocol that is not allowed - use an https, ssh or file URL, or a folder"
        )
    return FailedError(f"git could not fetch '{source}': {last.strip()[:300]} - try it with 'git clone'")


def no_such_ref(source: str, ref: str, names: Sequence[str] = ()) -> NotFoundError:
    known = f"it has {', '.join(names)}" if names else "name one that is pushed"
    return NotFoundError(f"'{source}' has no branch, tag or commit '{ref}' - {known}")


def too_large(source: str, limits: Limits) -> InvalidInputError:
    return InvalidInputError(
        f"'{source}' is larger than {limits.max_bytes >> 20} MiB or {limits.max_files} files - "
        "keep data and results out of the repository"
    )


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    result = {
        key: value
        for key, value in environment.items()
        if not key.startswith("GIT_") or key.startswith(_KEPT_GIT_VARIABLES)
    }
    result.update(
        GIT_ALLOW_PROTOCOL="https:ssh:file",
        GIT_TERMINAL_PROMPT="0",
        GIT_ASKPASS="",
        SSH_ASKPASS="",
        SSH_ASKPASS_REQUIRE="never",
        GIT_LFS_SKIP_SMUDGE="1",
        GIT_OPTIONAL_LOCKS="0",  # looking at a user's folder must not write to it
        LC_ALL="C",
    )
    return result


def _missing() -> FailedError:
    return FailedError("git is not installed - install it (Debian: 'apt-get install git')")


def _with_parent() -> list[str]:
    """A prefix that ends git with this process, even after kill -9; empty without util-linux."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv and shutil.which("git") else []


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End git and its helpers, which are all in its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.communicate()
