"""Which contract a repository keeps, found by reading it: nothing of it is executed here."""

import ast
import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flops.core.errors import InvalidInputError
from flops.repo.requirements import Requirements, read_requirements

_MANAGER_FILE = "model_manager.py"
_MANAGER_CLASS = "ModelManager"


@dataclass(frozen=True)
class Contract:
    """What a repository offers, and what it needs."""

    kind: Literal["flops", "flower"]
    requirements: Requirements


def inspect(checkout: Path) -> Contract:
    """Find and check a repository's contract.

    Raises:
        InvalidInputError: it keeps none that this version runs; says what is missing.
    """
    manager = checkout / _MANAGER_FILE
    if not manager.is_file():
        if _is_flower_app(checkout):
            raise InvalidInputError(
                "the repository is a Flower app, which this version does not run yet - it runs repositories "
                f"with a {_MANAGER_FILE}"
            )
        raise InvalidInputError(
            f"the repository has no {_MANAGER_FILE} at its root - add one with a class {_MANAGER_CLASS}"
        )
    _check_manager(manager)
    return Contract("flops", read_requirements(checkout))


def _check_manager(path: Path) -> None:
    try:
        tree = ast.parse(path.read_bytes(), filename=path.name)
    except SyntaxError as error:
        raise InvalidInputError(
            f"{path.name} line {error.lineno} is not Python: {error.msg} - mend the line"
        ) from error
    except ValueError as error:
        raise InvalidInputError(f"{path.name} is not Python: {error} - is it the right file?") from error
    names = _top_level_names(tree)
    if _MANAGER_CLASS in names:
        return
    near = difflib.get_close_matches(_MANAGER_CLASS, sorted(names), n=1, cutoff=0.6)
    hint = f"rename {near[0]} to {_MANAGER_CLASS}" if near else f"add a class {_MANAGER_CLASS}"
    raise InvalidInputError(f"{path.name} has no class {_MANAGER_CLASS} - {hint}")


def _top_level_names(tree: ast.Module) -> set[str]:
    """Classes, and names that are imported or assigned: all that may turn out to be the class."""
    names: set[str] = set()
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            pending += [
                child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node
            ]
    return names


def _is_flower_app(checkout: Path) -> bool:
    path = checkout / "pyproject.toml"
    if not path.is_file():
        return False
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    tool = document.get("tool", {})
    return isinstance(tool, dict) and "app" in (tool.get("flwr") or {})
