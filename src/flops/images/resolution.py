"""From requirements to a lock: which interpreter, which versions; asked once, then remembered."""

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from flops.core.errors import InvalidInputError
from flops.images import clashes, uv
from flops.images.interpreters import (
    Candidates,
    Interpreter,
    candidates,
    installed_interpreters,
    own_interpreter,
)
from flops.images.locks import Lock, LockStore, request_key
from flops.images.pip_configuration import PipConfiguration
from flops.images.undeclared import broken_bounds

TIMEOUT_S = 900.0


def resolve(
    packages: Sequence[str],
    *,
    cache: Path,
    python: str | None = None,
    extra: Sequence[str] = (),
    configuration: PipConfiguration | None = None,
    environment: Mapping[str, str] = os.environ,
    refresh: bool = False,
    progress: uv.Progress | None = None,
    cancel: threading.Event | None = None,
) -> Lock:
    """The lock for some requirements; the stored one when the same were asked before.

    Args:
        packages: PEP 508 requirements.
        cache: folder of stored locks (``Settings.locks_dir``).
        python: PEP 440 specifiers of the wanted Python; None: the one FLOps runs on, where it fits.
        extra: requirements on top of the lock of ``packages``, whose pins are kept (an environment that does
            more than the learners', with the same versions). Where that is impossible, as few pins as uv
            finds are changed, and a warning names them.
        configuration: None: the user's pip configuration.
        refresh: ask the index again, even if nothing changed.
        cancel: set it from another thread to end the call.
    Raises:
        InvalidInputError: no versions fit together (which pins clash is said), or a build failed.
        UnavailableError: an index cannot be reached, and its remembered answers do not suffice.
        FailedError: uv failed otherwise, or ``cancel`` was set.
    """
    if configuration is None:
        configuration = PipConfiguration.from_pip(environment)
    store = LockStore(cache)
    key = request_key(packages, extra, python, configuration.fingerprint(environment))
    known = None if refresh else store.answer(key)
    if known is not None:
        return known.lock
    work = Resolution(configuration, environment, progress, cancel)
    if extra:
        base = resolve(
            packages,
            cache=cache,
            python=python,
            configuration=configuration,
            environment=environment,
            refresh=refresh,
            progress=progress,
            cancel=cancel,
        )
        chosen = _interpreter(base.python, environment)
        lock = work.extend(base, packages, extra, chosen)
    else:
        own = own_interpreter()
        wanted = candidates(python, installed_interpreters(environment), own)
        lock, chosen = work.choose(packages, wanted)
    store.remember(key, lock, chosen.path)
    return lock


class Resolution:
    """One caller's way to uv."""

    def __init__(
        self,
        configuration: PipConfiguration,
        environment: Mapping[str, str],
        progress: uv.Progress | None,
        cancel: threading.Event | None,
    ) -> None:
        self._configuration = configuration
        self._environment = configuration.uv_environment(environment)
        self._progress = progress
        self._cancel = cancel

    def choose(self, packages: Sequence[str], wanted: Candidates) -> tuple[Lock, Interpreter]:
        """Try the candidates in order, with wheels alone; then the first with builds from source.

        Wheels first, because a build runs the package's code and needs compilers; an older version that has a
        wheel is taken before a newer one that has none.
        """
        first = wanted.interpreters[0]
        refusals: list[uv.Finished] = []
        for interpreter in wanted.interpreters:
            pins = self.pins(packages, _target(interpreter), wheels_only=True)
            if not isinstance(pins, uv.Finished):
                lock = self._mended(packages, pins, interpreter, True)
                return _warned(lock, _about_python(wanted, interpreter)), interpreter
            refusals.append(pins)
            if not clashes.is_about_python(pins.stderr):
                break
        refusal = refusals[0]
        if clashes.is_about_wheels(refusal.stderr):
            self._tell("some requirements have no wheel; allowing builds from source")
            pins = self.pins(packages, _target(first), wheels_only=False)
            if not isinstance(pins, uv.Finished):
                lock = self._mended(packages, pins, first, False)
                note = (
                    f"not every requirement has a wheel for Python {first.version}; "
                    "some are built from source on this machine, which runs their code"
                )
                return _warned(lock, [*_about_python(wanted, first), note]), first
            refusal = pins
        raise _clash(refusal, first)

    def extend(self, base: Lock, packages: Sequence[str], extra: Sequence[str], chosen: Interpreter) -> Lock:
        """``base`` and ``extra`` with all pins of ``base`` kept; else with as few changed as uv finds."""
        target = _target(chosen)
        pins = self.pins([*base.packages, *extra], target, wheels_only=True)
        if isinstance(pins, uv.Finished):
            pins = self.pins([*base.packages, *extra], target, wheels_only=False)
        if not isinstance(pins, uv.Finished):
            return Lock.of(base.python, pins, base.warnings)
        loose = self.pins([*packages, *extra], target, wheels_only=True, preferred=base.packages)
        if isinstance(loose, uv.Finished):
            raise _clash(pins, chosen)
        changed = sorted(set(base.packages) - set(loose))
        note = f"to add {', '.join(extra)}, other versions are used of: {', '.join(changed)}"
        return Lock.of(base.python, loose, [*base.warnings, note])

    def _mended(
        self, packages: Sequence[str], pins: list[str], chosen: Interpreter, wheels_only: bool
    ) -> Lock:
        pins, notes = self.mend(packages, pins, _target(chosen), wheels_only)
        return Lock.of(str(chosen.version), pins, notes)

    def mend(
        self, packages: Sequence[str], pins: list[str], target: Sequence[str], wheels_only: bool
    ) -> tuple[list[str], list[str]]:
        """Resolve again with what the packages forgot to declare (`undeclared`); gives pins and warnings."""
        broken = broken_bounds(pins)
        if not broken:
            return pins, []
        wanted = [*packages, *(bound.constraint for bound in broken)]
        mended = self.pins(wanted, target, wheels_only=wheels_only, preferred=pins)
        if isinstance(mended, uv.Finished):
            mended = self.pins(wanted, target, wheels_only=wheels_only)
        if not isinstance(mended, uv.Finished) and not broken_bounds(mended):
            return mended, []
        return pins, [
            f"{bound.package}{bound.versions} needs {bound.other}{bound.needed} and does not say so; "
            f"with these pins it may fail when imported - pin {bound.constraint}"
            for bound in broken
        ]

    def pins(
        self,
        packages: Sequence[str],
        target: Sequence[str],
        *,
        wheels_only: bool,
        preferred: Sequence[str] = (),
        constraints: Sequence[str] = (),
    ) -> list[str] | uv.Finished:
        """Run ``uv pip compile``: the pins, or how it ended when nothing fits.

        Args:
            target: uv's arguments about the Python to choose for.
            preferred: pins to keep where nothing speaks against it.
            constraints: what holds for packages that are needed anyway.
        Raises:
            UnavailableError, InvalidInputError, FailedError: it failed for another reason.
        """
        with tempfile.TemporaryDirectory(prefix="flops-lock-") as folder:
            wishes = Path(folder) / "requirements.in"
            result = Path(folder) / "lock.txt"
            wishes.write_text("\n".join(packages) + "\n", encoding="utf-8")
            # uv prefers the versions that an output file already holds
            result.write_text("".join(f"{pin}\n" for pin in preferred), encoding="utf-8")
            bounds = Path(folder) / "constraints.txt"
            bounds.write_text("".join(f"{bound}\n" for bound in constraints), encoding="utf-8")
            arguments = [
                *["pip", "compile", "--no-header", "--no-annotate"],
                *target,
                *(["--only-binary", ":all:"] if wheels_only else []),
                *self._configuration.uv_arguments(),
                *["--constraints", str(bounds), "--output-file", str(result), str(wishes)],
            ]
            finished = self._run(arguments)
            if finished.network_failed:
                # without a network, what uv remembers of the indexes may be enough
                offline = self._run([*arguments, "--offline"])
                finished = finished if offline.returncode else offline
            if finished.returncode == 0:
                return [
                    line
                    for line in result.read_text(encoding="utf-8").splitlines()
                    if line.strip() and not line.lstrip().startswith("#")
                ]
        if clashes.is_clash(finished.stderr) and not finished.network_failed:
            return finished
        raise uv.failure(finished, "resolving the requirements")

    def _run(self, arguments: Sequence[str]) -> uv.Finished:
        return uv.run(
            arguments,
            environment=self._environment,
            timeout_s=TIMEOUT_S,
            progress=self._progress,
            cancel=self._cancel,
        )

    def _tell(self, message: str) -> None:
        if self._progress is not None:
            self._progress(message)


def _target(interpreter: Interpreter) -> list[str]:
    return ["--python", str(interpreter.path)]


def _clash(refusal: uv.Finished, interpreter: Interpreter) -> InvalidInputError:
    return InvalidInputError(
        f"the requirements cannot be installed together on Python {interpreter.version}: "
        f"{clashes.explain(refusal.stderr)} - change one of these pins"
    )


def _about_python(wanted: Candidates, used: Interpreter) -> list[str]:
    if wanted.fits and used == wanted.interpreters[0]:
        return []
    if wanted.fits:
        return [
            f"the requirements have no wheels for Python {wanted.interpreters[0].version}; "
            f"{used.version} is used"
        ]
    return [f"Python {wanted.asked} is asked for and not installed on this machine; {used.version} is used"]


def _interpreter(version: str, environment: Mapping[str, str]) -> Interpreter:
    """The installed interpreter of exactly that version."""
    for found in installed_interpreters(environment):
        if str(found.version) == version:
            return found
    raise InvalidInputError(
        f"Python {version}, which a lock was made for, is not installed on this machine any more - "
        "resolve the requirements again"
    )


def _warned(lock: Lock, warnings: Sequence[str]) -> Lock:
    return Lock.of(lock.python, lock.packages, [*warnings, *lock.warnings])
