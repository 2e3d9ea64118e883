"""Python interpreters of this machine, and which of them come into question for a project.

FLOps never downloads an interpreter; a version that is not here falls to the nearest compatible one.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from flops.core.errors import FailedError, InvalidInputError
from flops.images import uv
from flops.images.pip_configuration import PipConfiguration

OLDEST = Version("3.8")
"""What the worker program (`flops_worker`) needs."""
MAX_CANDIDATES = 4
_LIST_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Interpreter:
    """One installed CPython."""

    version: Version
    path: Path

    @property
    def minor(self) -> int:
        """2 for Python 3.2."""
        return self.version.release[1]


@dataclass(frozen=True)
class Candidates:
    """Interpreters to try, best first; ``fits`` is False when none of them is what was asked for."""

    interpreters: tuple[Interpreter, ...]
    fits: bool
    asked: str
    """The wish in words, such as ``3.10.14``; empty when there was none."""


def own_interpreter() -> Interpreter:
    """The interpreter below FLOps' own environment."""
    version = Version(".".join(map(str, sys.version_info[:3])))
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = Path(sys.base_exec_prefix) / "bin" / name
    return Interpreter(version, base if base.exists() else Path(sys.executable))


def installed_interpreters(environment: Mapping[str, str] = os.environ) -> tuple[Interpreter, ...]:
    """Every usable CPython (3.8 and newer, this machine's processor), own one first, one per version.

    uv looks on PATH and in its own folder; pyenv's are added, because its shims refuse all but the chosen
    versions.
    """
    variables = PipConfiguration().uv_environment(environment)
    variables["PATH"] = _with_pyenv(environment)
    finished = uv.run(
        ["python", "list", "--only-installed", "--output-format", "json"],
        environment=variables,
        timeout_s=_LIST_TIMEOUT_S,
    )
    if finished.returncode:
        raise uv.failure(finished, "looking for Python interpreters")
    try:
        found = json.loads(finished.stdout)
        listed = [
            Interpreter(Version(entry["version"]), Path(entry["path"]))
            for entry in found
            if entry["implementation"] == "cpython"
            and entry.get("variant", "default") == "default"
            and entry["arch"] == platform.machine()
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise FailedError("uv's list of Python interpreters cannot be read - install FLOps again") from error
    by_version: dict[Version, Interpreter] = {}
    for interpreter in (own_interpreter(), *listed):
        in_environment = (interpreter.path.parent.parent / "pyvenv.cfg").exists()
        if interpreter.version >= OLDEST and not interpreter.version.is_prerelease:
            known = by_version.get(interpreter.version)
            if known is None or (_in_environment(known) and not in_environment):
                by_version[interpreter.version] = interpreter
    return tuple(by_version.values())


def candidates(python: str | None, available: Sequence[Interpreter], own: Interpreter) -> Candidates:
    """Interpreters to try for a wish, best first, at most one per minor version and `MAX_CANDIDATES` in all.

    Args:
        python: PEP 440 specifiers such as ``==3.10.14`` or ``>=3.9,<3.12``; None: no wish.
        available: what this machine has; not empty.
        own: the one FLOps runs on; taken where nothing speaks against it.
    Raises:
        InvalidInputError: ``python`` is no specifier.
    """
    try:
        wish = SpecifierSet(python or "")
    except InvalidSpecifier as error:
        raise InvalidInputError(
            f"'{(python or '')[:60]}' is not a Python version - write it like 3.11 or >=3.10,<3.13"
        ) from error
    fitting = [found for found in available if wish.contains(found.version)]
    if fitting:
        ordered = sorted(
            fitting,
            key=lambda found: (
                abs(found.minor - own.minor),
                found.minor > own.minor,
                found.version != own.version,
                [-part for part in found.version.release],
            ),
        )
        return Candidates(_one_per_minor(ordered), True, _words(python))
    target = _target(wish) or own.version
    if target.major != own.version.major:
        raise InvalidInputError(
            f"Python {_words(python)} is asked for, which FLOps cannot run - "
            f"it runs Python {OLDEST} and newer"
        )
    minor = target.release[1] if len(target.release) > 1 else own.minor
    patch = target.release[2] if len(target.release) > 2 else 0

    def distance(found: Interpreter) -> tuple[int, int, int]:
        """Same minor by patch, then newer minors upwards, then older ones downwards, newest patches first."""
        away = found.minor - minor
        group = 0 if away == 0 else 1 if away > 0 else 2
        return group, abs(away), -found.version.micro if away else abs(found.version.micro - patch)

    return Candidates(_one_per_minor(sorted(available, key=distance)), False, _words(python))


def _one_per_minor(ordered: Sequence[Interpreter]) -> tuple[Interpreter, ...]:
    chosen: dict[int, Interpreter] = {}
    for interpreter in ordered:
        chosen.setdefault(interpreter.minor, interpreter)
    return tuple(chosen.values())[:MAX_CANDIDATES]


def _target(wish: SpecifierSet) -> Version | None:
    """The version that the wish is about: the pinned one, else the lower bound, else the upper."""
    order = ("===", "==", "~=", ">=", ">", "<=", "<")
    named = sorted((s for s in wish if s.operator in order), key=lambda s: order.index(s.operator))
    return Version(named[0].version.removesuffix(".*")) if named else None


def _words(python: str | None) -> str:
    if not python:
        return ""
    exact = python.removeprefix("==").removesuffix(".*")
    return exact if exact.replace(".", "").isdigit() else python


def _in_environment(interpreter: Interpreter) -> bool:
    return (interpreter.path.parent.parent / "pyvenv.cfg").exists()


def _with_pyenv(environment: Mapping[str, str]) -> str:
    """PATH with what pyenv holds instead of its shims, which may be another user's (sudo keeps PATH)."""
    home = environment.get("HOME")
    configured = environment.get("PYENV_ROOT")
    roots = [Path(configured)] if configured else [Path(home) / ".pyenv"] if home else []
    folders = []
    for folder in environment.get("PATH", os.defpath).split(os.pathsep):
        root = Path(folder).parent
        if Path(folder).name == "shims" and (root in roots or (root / "versions").is_dir()):
            roots.append(root)
        else:
            folders.append(folder)
    versions = [folder for root in dict.fromkeys(roots) for folder in sorted(root.glob("versions/*/bin"))]
    return os.pathsep.join([*folders, *map(str, versions)])
