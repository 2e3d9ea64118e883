"""What a repository says it needs: ``conda.yaml`` and ``requirements.txt`` as one list of requirements."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from flops.core.errors import InvalidInputError
from flops.repo import conda

_MAX_FILE_BYTES = 1 << 20
_MAX_INCLUDES = 20
_BUILDING_BLOCKS = "flops_utils.ml_repo_building_blocks"
_FOR_BUILDING_BLOCKS = ("datasets<4", "pillow")


@dataclass(frozen=True)
class Requirements:
    """Everything that the user's environment must hold."""

    python: str | None
    """PEP 440 specifiers, such as ``==3.10.14``; None: any."""
    packages: tuple[str, ...]
    """PEP 508 requirements, sorted."""
    warnings: tuple[str, ...]
    building_blocks: bool
    """The repository loads data by ``load_dataset``, which needs the datasets library."""


def read_requirements(checkout: Path) -> Requirements:
    """Read the dependency files at the root of a checkout; nothing is executed.

    Raises:
        InvalidInputError: there are none, or a line cannot be understood; names file and line.
    """
    conda_file, pip_file = checkout / "conda.yaml", checkout / "requirements.txt"
    if not conda_file.is_file() and (checkout / "conda.yml").is_file():
        conda_file = checkout / "conda.yml"
    if not conda_file.is_file() and not pip_file.is_file():
        raise InvalidInputError(
            "the repository has neither conda.yaml nor requirements.txt at its root - add one that lists "
            "what model_manager.py imports"
        )
    found = _Found()
    if conda_file.is_file():
        found.read_conda(conda_file)
    if pip_file.is_file():
        found.read_pip(pip_file, pip_file.name)
    blocks = uses_building_blocks(checkout)
    if blocks:
        for requirement in _FOR_BUILDING_BLOCKS:
            found.add(requirement)
    found.add_if_missing("numpy")
    return Requirements(found.python, tuple(sorted(set(found.packages))), tuple(found.warnings), blocks)


def uses_building_blocks(checkout: Path) -> bool:
    """Whether some Python file of the repository imports FLOps's building blocks."""
    for path in sorted(checkout.rglob("*.py")):
        if path.is_symlink() or path.stat().st_size > _MAX_FILE_BYTES:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # only model_manager.py must be sound, and that is checked where it counts
        if any(module.startswith(_BUILDING_BLOCKS) for module in _imports(tree)):
            return True
    return False


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


class _Found:
    """What was read so far."""

    def __init__(self) -> None:
        self.python: str | None = None
        self.packages: list[str] = []
        self.warnings: list[str] = []
        self._includes = 0

    def add(self, requirement: str) -> None:
        self.packages.append(str(Requirement(requirement)))

    def add_if_missing(self, name: str) -> None:
        if name not in {canonicalize_name(Requirement(package).name) for package in self.packages}:
            self.add(name)

    def read_conda(self, path: Path) -> None:
        try:
            document = yaml.safe_load(_text(path))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" (line {mark.line + 1})" if mark is not None else ""
            problem = getattr(error, "problem", None) or "it cannot be parsed"
            raise InvalidInputError(f"{path.name} is not YAML{where}: {problem} - mend the file") from error
        dependencies = document.get("dependencies") if isinstance(document, dict) else None
        if not isinstance(dependencies, list):
            raise InvalidInputError(
                f"{path.name} has no list 'dependencies' - write it like 'dependencies: [numpy=1.26.4]'"
            )
        for entry in dependencies:
            self._conda_entry(entry, path)

    def _conda_entry(self, entry: Any, path: Path) -> None:
        if isinstance(entry, dict) and set(entry) == {"pip"} and isinstance(entry["pip"], list):
            for line in entry["pip"]:
                self.pip_line(str(line), path.parent, f"{path.name}, pip section")
        elif isinstance(entry, str):
            translated = conda.translate(entry)
            if translated.note:
                self.warnings.append(translated.note)
            if translated.python is not None:
                self.python = translated.python
            if translated.requirement is not None:
                self.add(translated.requirement)
        else:
            raise InvalidInputError(
                f"{path.name}: the dependency '{str(entry)[:100]}' cannot be read - write it like "
                "numpy=1.26.4"
            )

    def read_pip(self, path: Path, name: str) -> None:
        self._includes += 1
        if self._includes > _MAX_INCLUDES:
            raise InvalidInputError(
                f"{name}: requirement files include each other without end - remove a '-r'"
            )
        for line in _text(path).replace("\\\n", " ").splitlines():
            self.pip_line(line, path.parent, name)

    def pip_line(self, line: str, folder: Path, name: str) -> None:
        """One line of a requirements file, or of a conda file's pip section."""
        text = line.split(" #", 1)[0].strip()
        if not text or text.startswith("#"):
            return
        if text.startswith(("-r ", "--requirement ", "-r", "--requirement=")):
            included = (
                text.removeprefix("--requirement=").removeprefix("--requirement").removeprefix("-r").strip()
            )
            path = (folder / included).resolve()
            if not path.is_file() or not path.is_relative_to(folder.resolve()):
                raise InvalidInputError(f"{name}: '{text[:100]}' names no file of the repository - add it")
            self.read_pip(path, included)
            return
        if text.startswith("-"):
            option = text.split()[0].split("=")[0]
            self.warnings.append(
                f"{name}: option {option} is ignored - indexes come from this machine's pip configuration"
            )
            return
        requirement = text.split(" --", 1)[0].strip()  # --hash and other options of one line
        try:
            parsed = Requirement(requirement)
        except InvalidRequirement as error:
            raise InvalidInputError(
                f"{name}: the line '{text[:100]}' is no requirement - write it like numpy==1.26.4"
            ) from error
        canonical = canonicalize_name(parsed.name)
        if canonical in {canonicalize_name(never) for never in conda.NEVER_INSTALLED}:
            self.warnings.append(f"{canonical} is left out: learners do not need it")
        elif canonical not in ("pip", "wheel"):
            self.packages.append(str(parsed))


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise InvalidInputError(
            f"{path.name} is larger than {_MAX_FILE_BYTES >> 20} MiB - is it the right file?"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path.name} is no text in UTF-8 - save it as UTF-8") from error
