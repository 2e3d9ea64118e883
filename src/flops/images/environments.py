"""Environments: one folder per lock, made once, shared by everyone, never changed.

A venv is made beside its place, filled, compiled (see `bytecode`), marked, and renamed into place: it is
there whole or not at all. The marker holds a digest of what was installed; an environment that was tampered
with is made again.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flops.core.errors import FailedError
from flops.images import bytecode, uv
from flops.images.exclusion import exclusive
from flops.images.interpreters import installed_interpreters
from flops.images.locks import Lock, write_atomically
from flops.images.pip_configuration import PipConfiguration

TIMEOUT_S = 3600.0
_COMPILE_TIMEOUT_S = 900.0
_MARKER = "flops-environment.json"


@dataclass(frozen=True)
class Environment:
    """A complete environment."""

    python: Path
    """Its interpreter."""
    hash: str
    """Of the lock it was made from."""
    created: bool
    """Whether this call made it."""
    seconds: float
    """How long this call took."""


def ensure_environment(
    lock: Lock,
    root: Path,
    *,
    configuration: PipConfiguration | None = None,
    environment: Mapping[str, str] = os.environ,
    modules: Sequence[str] | None = None,
    wheels_only: bool = False,
    progress: uv.Progress | None = None,
    cancel: threading.Event | None = None,
) -> Environment:
    """The environment of a lock, made if it is not there. An existing one costs no process and no network.

    Args:
        root: folder of all environments (``Settings.environments_dir``).
        modules: compile only what importing these takes (see `bytecode.imported`), for an environment that is
            used for one purpose; None: everything but tests. Processes without write access start fast then.
            What other environments have compiled of the same files is taken over in any case.
        wheels_only: build nothing: that would run a package's code on this machine.
        cancel: set it from another thread to end the call; nothing half-made stays.
    Raises:
        UnavailableError: a package could not be fetched.
        InvalidInputError: a package had to be built and could not.
        FailedError: the lock's Python is gone, no space is left, or ``cancel`` was set.
    """
    begun = time.monotonic()
    place = root.absolute() / lock.hash
    if _is_complete(place, lock):
        return Environment(_python(place), lock.hash, False, time.monotonic() - begun)
    root.mkdir(parents=True, exist_ok=True)
    tell = progress or _ignore
    with exclusive(place.with_name(f".{lock.hash}.lock"), "environment", tell, cancel) as lock_fd:
        created = not _is_complete(place, lock)
        if created:
            making = place.with_name(f".{lock.hash}.making")
            _remove(making)
            for trash in root.glob(f".{lock.hash}.*trash-*"):  # of a call that was killed
                shutil.rmtree(trash, ignore_errors=True)
            try:
                maker = _Maker(lock, making, environment, tell, cancel, lock_fd)
                maker.install(
                    configuration or PipConfiguration.from_pip(environment), wheels_only=wheels_only
                )
                bytecode.adopt(
                    making, [found for found in root.absolute().glob("[!.]*") if _is_marked(found)]
                )
                maker.compile(modules)
                marker = {"lock": lock.hash, "installed": _installed(making)}
                write_atomically(making / _MARKER, json.dumps(marker) + "\n")
                _remove(place)
                making.rename(place)
            except BaseException:
                _remove(making)
                raise
    return Environment(_python(place), lock.hash, created, time.monotonic() - begun)


class _Maker:
    """Fills one new environment."""

    def __init__(
        self,
        lock: Lock,
        folder: Path,
        environment: Mapping[str, str],
        tell: uv.Progress,
        cancel: threading.Event | None,
        lock_fd: int,
    ) -> None:
        self._lock = lock
        self._folder = folder
        self._environment = environment
        self._tell = tell
        self._cancel = cancel
        self._lock_fd = lock_fd

    def install(self, configuration: PipConfiguration, *, wheels_only: bool) -> None:
        """Make the venv and put every pinned package in, hard-linked from uv's cache where possible."""
        variables = configuration.uv_environment(self._environment)
        interpreter = self._interpreter()
        # relocatable: it is renamed into place, and its scripts must still work
        arguments = ["venv", "--relocatable", "--no-project", "--python", str(interpreter)]
        made = self._run([*arguments, str(self._folder)], variables, None)
        if made.returncode:
            raise uv.failure(made, f"making an environment for Python {self._lock.python}")
        requirements = self._folder / "lock.txt"
        requirements.write_text(self._lock.text, encoding="utf-8")
        python = str(_python(self._folder))
        arguments = ["pip", "sync", *configuration.uv_arguments(), "--python", python]
        arguments += ["--no-build"] if wheels_only else []
        # What is in uv's cache needs no index; without --offline uv would ask it all the same.
        synced = self._run([*arguments, "--offline", str(requirements)], variables, None)
        if synced.returncode:
            synced = self._run([*arguments, str(requirements)], variables, self._tell)
        if synced.returncode:
            raise uv.failure(synced, "installing the locked packages")
        self._tell(f"installed {len(self._lock.packages)} packages")

    def compile(self, modules: Sequence[str] | None) -> None:
        """Write the bytecode; a file that is no Python (packages ship templates) is no failure."""
        self._tell("compiling modules")
        sites = bytecode.site_packages(self._folder)
        if modules is None:
            files = [path for site in sites for path in bytecode.compilable(site)]
            processes = os.cpu_count() or 1
        else:
            files = [path for site in sites for path in bytecode.imported(site, modules)]
            processes = 1  # it suits what runs beside something else
        # Not by compileall's own -j: its children would outlive us, with the lock in their hands.
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(self._compile, range(processes), (files[n::processes] for n in range(processes))))

    def _compile(self, number: int, files: Sequence[Path]) -> None:
        listed = self._folder / f"compiled-{number}.txt"
        listed.write_text("".join(f"{path}\n" for path in files), encoding="utf-8")
        command = [str(_python(self._folder)), "-I", "-S", "-m", "compileall", "-qq", "-i", str(listed)]
        uv.start(command, self._environment, _COMPILE_TIMEOUT_S, None, self._cancel, (self._lock_fd,))

    def _interpreter(self) -> Path:
        for found in installed_interpreters(self._environment):
            if str(found.version) == self._lock.python:
                return found.path
        raise FailedError(
            f"Python {self._lock.python}, which lock {self._lock.hash[:12]} was made for, is not installed "
            "on this machine any more - run the project again to resolve its requirements anew"
        )

    def _run(
        self, arguments: list[str], variables: Mapping[str, str], tell: uv.Progress | None
    ) -> uv.Finished:
        # The process inherits the lock: should this one be killed, nobody else starts before uv has ended.
        return uv.run(
            arguments,
            environment=variables,
            timeout_s=TIMEOUT_S,
            progress=tell,
            cancel=self._cancel,
            keep_open=(self._lock_fd,),
        )


def _is_complete(place: Path, lock: Lock) -> bool:
    try:
        marker = json.loads((place / _MARKER).read_text(encoding="utf-8"))
        same = marker == {"lock": lock.hash, "installed": _installed(place)}
    except (OSError, ValueError):
        return False
    return same and _python(place).exists()


def _is_marked(folder: Path) -> bool:
    return (folder / _MARKER).exists()


def _installed(folder: Path) -> str:
    """Digest of the names and versions of all installed packages."""
    names = sorted(
        entry.name for site in bytecode.site_packages(folder) for entry in site.glob("*.dist-info")
    )
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _remove(folder: Path) -> None:
    """Delete a folder; it leaves its name at once, so a crash on the way leaves nothing that looks whole."""
    if not folder.exists():
        return
    trash = folder.with_name(f".{folder.name.strip('.')}.trash-{os.getpid()}-{time.monotonic_ns()}")
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _ignore(_message: str) -> None:
    return
