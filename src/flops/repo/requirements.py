"""What a repository needs to run: read from its ``conda.yaml`` and ``requirements.txt``, in PEP 508."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flops.core.errors import InvalidInputError
from flops.repo import conda, pip_lines

CONDA_FILES = ("conda.yaml", "conda.yml")
PIP_FILE = "requirements.txt"
BUILDING_BLOCKS = ("datasets<4", "pillow")
"""What ``flops_utils.ml_repo_building_blocks`` needs in the user's environment."""

_TRACKER = frozenset({"mlflow", "mlflow-skinny", "mlflow-tracing"})
_OURS = frozenset({"flops-utils", "flops"})
_INSTALLERS = frozenset({"pip", "conda", "mamba", "uv"})


@dataclass(frozen=True)
class Requirements:
    """Everything to install, complete: with numpy, and with what the building blocks need."""

    python: str | None
    """PEP 440 specifiers; None: any."""
    packages: tuple[str, ...]
    """PEP 508."""
    warnings: tuple[str, ...] = ()
    building_blocks: bool = False


def read_requirements(checkout: Path, *, building_blocks: bool, source: str) -> Requirements:
    """Read the dependency files of a checkout; ``conda.yaml`` wins where both name a package.

    Raises:
        InvalidInputError: there is neither file, or one of them is broken.
    """
    conda_file = next((name for name in CONDA_FILES if (checkout / name).is_file()), None)
    has_pip = (checkout / PIP_FILE).is_file()
    if conda_file is None and not has_pip:
        raise InvalidInputError(
            f"{source} has neither conda.yaml nor requirements.txt - add one that lists its dependencies"
        )
    python: str | None = None
    found = pip_lines.Lines()
    if conda_file is not None:
        python = _read_conda(checkout, conda_file, found)
    if has_pip:
        second = pip_lines.Lines()
        pip_lines.read_file(checkout, PIP_FILE, second)
        _merge(found, second, conda_file)
    kept, dropped = _without_foreign(found.requirements)
    warnings = tuple(dict.fromkeys([*found.warnings, *dropped]))
    return Requirements(python or None, _with_own(kept, building_blocks), warnings, building_blocks)


def _read_conda(checkout: Path, name: str, into: pip_lines.Lines) -> str | None:
    """Add the content of conda.yaml; gives the wish for a Python."""
    python: str | None = None
    native = []
    for entry in _entries(checkout, name):
        if isinstance(entry, dict):
            pip_lines.read_lines(_pip_part(entry, name), name, checkout, into)
            continue
        translated = conda.translate(_as_line(entry, name), name)
        if translated.python is not None:
            python = translated.python
        if translated.requirement is not None:
            into.requirements.append(translated.requirement)
        elif translated.python is None:
            native.append(translated.name)
        if translated.warning is not None:
            into.warnings.append(translated.warning)
    if native:
        into.warnings.append(f"{name}: left out, as they are no Python packages: {', '.join(native)}")
    return python


def _entries(checkout: Path, name: str) -> Sequence[Any]:
    text = pip_lines.read_text(checkout / name, name)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark is not None else ""
        depth = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        problem = getattr(error, "problem", None) or depth
        raise InvalidInputError(f"{name} is no YAML{place}: {problem} - mend it") from error
    if not isinstance(content, dict) or not isinstance(content.get("dependencies") or [], list):
        raise InvalidInputError(
            f"{name} has no list 'dependencies' - write one entry a line, such as '- numpy=1.26.4'"
        )
    entries: list[Any] = content.get("dependencies") or []
    return entries


def _pip_part(entry: dict[Any, Any], name: str) -> list[str]:
    lines = entry.get("pip")
    if set(entry) != {"pip"} or not isinstance(lines, list | None):
        raise InvalidInputError(
            f"{name}: the entry {pip_lines.shown(entry)} of 'dependencies' cannot be used - "
            "write a name with a version, or '- pip:' with a list"
        )
    return [_as_line(line, name) for line in lines or []]


def _as_line(entry: object, name: str) -> str:
    if not isinstance(entry, str):
        raise InvalidInputError(
            f"{name}: the entry {pip_lines.shown(entry)} of 'dependencies' cannot be used - "
            "write a name with a version, such as 'numpy=1.26.4'"
        )
    return entry


def _merge(first: pip_lines.Lines, second: pip_lines.Lines, first_name: str | None) -> None:
    """Add what only requirements.txt names; say where the two differ."""
    known: dict[str, list[str]] = {}
    for line in first.requirements:
        known.setdefault(canonicalize_name(Requirement(line).name), []).append(line)
    for line in second.requirements:
        others = known.get(canonicalize_name(Requirement(line).name))
        if others is None or first_name is None:
            first.requirements.append(line)
        elif not any(_same(line, other) for other in others):
            first.warnings.append(
                f"{PIP_FILE} asks for '{line}', {first_name} for '{others[0]}'; that one is taken"
            )
    first.warnings.extend(second.warnings)


def _same(line: str, other: str) -> bool:
    one, two = Requirement(line), Requirement(other)
    versions = [str(wish.specifier).replace(".*", "") for wish in (one, two)]
    return versions[0] == versions[1] and one.url == two.url


def _without_foreign(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Drop what never belongs into a learner's environment."""
    kept, warnings = [], []
    for line in lines:
        name = canonicalize_name(Requirement(line).name)
        if name in _TRACKER:
            warnings.append(f"'{name}' is not installed for learners; FLOps tracks the run itself")
        elif name not in _OURS and name not in _INSTALLERS:
            kept.append(line)
    return kept, warnings


def _with_own(lines: list[str], building_blocks: bool) -> tuple[str, ...]:
    names = {canonicalize_name(Requirement(line).name) for line in lines}
    added = [] if "numpy" in names else ["numpy"]
    if building_blocks:
        added += [line for line in BUILDING_BLOCKS if "<" in line or Requirement(line).name not in names]
    return tuple(dict.fromkeys([*lines, *added]))
