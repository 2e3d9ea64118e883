"""From the command line of `flops run` to a checked spec."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flops.core.errors import InvalidInputError
from flops.core.source import is_folder, split_ref

if TYPE_CHECKING:
    from flops.core.spec import ProjectSpec


def read_spec(
    repo: str | None, spec_file: str | None, flags: Mapping[str, Any], parameters: Sequence[str]
) -> "ProjectSpec":
    """The spec of a file, of the command line, or of both: the command line wins.

    Args:
        repo: ``REPO[@REF]``.
        flags: values by dotted name; None where a flag was not given.
        parameters: strategy parameters as ``name=value``.
    Raises:
        InvalidInputError: the spec is wrong; lists every problem.
        typer.BadParameter: the command line is.
    """
    from flops.core.spec import merge, parse_spec, spec_from_mapping

    overrides = {name: value for name, value in flags.items() if value is not None}
    for parameter in parameters:
        name, value = _parameter(parameter)
        overrides[f"training.strategy.parameters.{name}"] = value
    if repo is not None:
        overrides |= _located(repo, Path.cwd())
    if spec_file is None:
        if repo is None:
            raise typer.BadParameter("name a repository, or a spec with --spec FILE", param_hint="REPO")
        return merge(spec_from_mapping({"repo": overrides["repo"]}), overrides)
    text, source, folder = _read(spec_file)
    spec = parse_spec(text, source=source, overrides=overrides)
    if repo is None and is_folder(spec.repo):
        located = _located(spec.repo, folder)
        spec = merge(spec, {"repo": located["repo"], "ref": spec.ref or located["ref"]})
    return spec


def _read(spec_file: str) -> tuple[str, str, Path]:
    if spec_file == "-":
        return sys.stdin.read(), "standard input", Path.cwd()
    path = Path(spec_file)
    try:
        return path.read_text(encoding="utf-8"), spec_file, path.absolute().parent
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"spec '{spec_file}' is no text in UTF-8") from error
    except OSError as error:
        raise InvalidInputError(f"spec '{spec_file}' cannot be read: {error.strerror}") from error


def _located(repo: str, start: Path) -> dict[str, str | None]:
    """A folder by its absolute path: the manager has another working directory."""
    if not is_folder(repo):
        return {"repo": repo}
    whole = start / Path(repo).expanduser()
    if whole.is_dir():
        path = str(whole.resolve())
        # the slash says that an @ in the folder's name starts no reference
        return {"repo": path + "/" if "@" in Path(path).name else path, "ref": None}
    bare, ref = split_ref(repo)
    folder = start / Path(bare).expanduser()
    if ref is None or not folder.is_dir():
        raise InvalidInputError(
            f"there is no folder '{folder}' - name an existing folder, or a git URL such as https://host/repo"
        )
    path = str(folder.resolve())
    return {"repo": path + "/" if "@" in Path(path).name else path, "ref": ref}


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"'{text}' is not NAME=VALUE", param_hint="--strategy-param")
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, value
    return name, parsed if isinstance(parsed, bool | int | float | str) else value
