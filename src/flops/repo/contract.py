"""Which contract a checkout keeps, found by reading it; nothing of it is run.

Running it once, in its own environment, is `flops.repo.check`'s part.
"""

import ast
import difflib
import os
import re
import sys
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet

from flops.core.errors import InvalidInputError
from flops.repo.pip_lines import MAX_FILE_BYTES
from flops.repo.requirements import Requirements, read_requirements

_MODULE = "model_manager.py"
_CLASS = "ModelManager"
_BLOCKS = "ml_repo_building_blocks"
_MAX_MODULES = 2000
_MOST_PATCHES = 40


@dataclass(frozen=True)
class Contract:
    """What a repository offers and needs."""

    kind: Literal["flops", "flower"]
    requirements: Requirements


def inspect(checkout: Path, *, source: str | None = None) -> Contract:
    """Find the contract of a checkout.

    Args:
        source: what to call the repository in errors.
    Raises:
        InvalidInputError: it keeps no contract that this version runs, or its dependencies cannot be read.
    """
    name = f"'{source}'" if source else "the repository"
    if not (checkout / _MODULE).is_file():
        _refuse_flower(checkout, name)
        raise InvalidInputError(
            f"{name} has no {_MODULE} at its root{_elsewhere(checkout)} - add one with a class {_CLASS}"
        )
    requirements = read_requirements(checkout, building_blocks=_uses_building_blocks(checkout), source=name)
    _check_module(checkout, name, requirements.python)
    return Contract("flops", requirements)


def _refuse_flower(checkout: Path, name: str) -> None:
    try:
        content = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return  # it is no Flower app then; what it lacks is said next
    tool = content.get("tool")
    flwr = tool.get("flwr") if isinstance(tool, dict) else None
    if isinstance(flwr, dict) and "app" in flwr:
        raise InvalidInputError(
            f"{name} is a Flower app, which this version does not run yet - "
            f"give it a {_MODULE} with a class {_CLASS}, or run it with Flower"
        )


def _elsewhere(checkout: Path) -> str:
    """Where such a module lies instead, at most two folders down."""
    found = sorted([*checkout.glob(f"*/{_MODULE}"), *checkout.glob(f"*/*/{_MODULE}")])
    return f" (there is {found[0].relative_to(checkout)})" if found else ""


def _check_module(checkout: Path, name: str, python: str | None) -> None:
    """The module must parse, and bind the class."""
    path = checkout / _MODULE
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidInputError(f"{_MODULE} of {name} is larger than {MAX_FILE_BYTES >> 10} KiB - shorten it")
    content = path.read_bytes()
    try:
        module = _parse(content)
    except SyntaxError as error:
        if not _is_own_grammar(python):
            # valid for the Python that was asked for, perhaps; running it will tell
            if not re.search(rb"^\s*class\s+ModelManager\b", content, re.MULTILINE):
                raise _no_class(name, ()) from error
            return
        line = "" if error.lineno is None else f" in line {error.lineno}"
        raise InvalidInputError(
            f"{_MODULE} of {name} has a syntax error{line}: {error.msg} - mend it"
        ) from error
    bound, open_ended = _bound_names(module.body)
    if _CLASS not in bound and not open_ended:
        raise _no_class(name, [node.name for node in ast.walk(module) if isinstance(node, ast.ClassDef)])


def _no_class(name: str, classes: Sequence[str]) -> InvalidInputError:
    near = difflib.get_close_matches(_CLASS, classes, n=1, cutoff=0.6)
    hint = f"rename {near[0]}" if near else "add it"
    return InvalidInputError(f"{_MODULE} of {name} has no class {_CLASS} - {hint}")


def _parse(content: bytes) -> ast.Module:
    """Parse a module.

    Raises:
        SyntaxError: also for what Python reports otherwise (null bytes, nesting without end).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a stranger's code; its author sees them
            return ast.parse(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error) or "it is nested too deeply") from error


def _bound_names(body: Sequence[ast.stmt]) -> tuple[set[str], bool]:
    """Names that running these statements may bind, and whether there may be others (``import *``)."""
    names: set[str] = set()
    open_ended = False
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in statement.names)
            open_ended |= any(alias.name == "*" for alias in statement.names)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            names.update(node.id for node in ast.walk(statement) if isinstance(node, ast.Name))
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            for inner in _blocks(statement):
                more, ends_open = _bound_names(inner)
                names |= more
                open_ended |= ends_open
    return names, open_ended


def _blocks(statement: ast.If | ast.Try | ast.With) -> Iterator[Sequence[ast.stmt]]:
    yield statement.body
    if isinstance(statement, ast.If | ast.Try):
        yield statement.orelse
    if isinstance(statement, ast.Try):
        yield statement.finalbody
        for handler in statement.handlers:
            yield handler.body


def _is_own_grammar(python: str | None) -> bool:
    """Whether the wanted Python is not newer than the one whose grammar is used here."""
    if python is None:
        return True
    wish = SpecifierSet(python)
    return any(
        wish.contains(f"3.{minor}.{patch}")
        for minor in range(sys.version_info.minor + 1)
        for patch in range(_MOST_PATCHES)
    )


def _uses_building_blocks(checkout: Path) -> bool:
    """Whether any module of the repository imports ``flops_utils.ml_repo_building_blocks``."""
    for number, path in enumerate(_modules(checkout)):
        if number >= _MAX_MODULES:
            return False
        content = path.read_bytes()[:MAX_FILE_BYTES]
        if _BLOCKS.encode() not in content:
            continue
        try:
            module = _parse(content)
        except SyntaxError:
            return True  # it names them, and may be valid for another Python
        if any(_imports_blocks(node) for node in ast.walk(module)):
            return True
    return False


def _modules(checkout: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(checkout):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent) / name
            if name.endswith(".py") and path.is_file():
                yield path


def _imports_blocks(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.startswith(f"flops_utils.{_BLOCKS}") for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module:
        named = any(alias.name == _BLOCKS for alias in node.names)
        return node.module.startswith(f"flops_utils.{_BLOCKS}") or (node.module == "flops_utils" and named)
    return False
