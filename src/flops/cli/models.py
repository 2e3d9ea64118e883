"""`flops models` and `flops model get`: trained models, and how to take one home."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flops.cli.output import JsonFlag, age, clean, number, percent, print_json, print_table, say

_PANEL = "Data and models"


def register(app: typer.Typer) -> None:
    app.command("models", rich_help_panel=_PANEL)(list_models)
    group = typer.Typer(no_args_is_help=True, help="Download a trained model.")
    group.command(
        "get", epilog="Examples:\n\nflops model get mnist\n\nflops model get mnist:3 --out ./mnist"
    )(get)
    # one command only, yet it must stay a group: 'flops model get'
    group.callback()(lambda: None)
    app.add_typer(group, name="model", rich_help_panel=_PANEL)


def list_models(as_json: JsonFlag = False) -> None:
    """List registered models, by name and version."""
    from flops.cli.session import manager

    with manager() as client:
        found = list(client.iterate_models())
    if as_json:
        print_json(found)
        return
    found.sort(key=lambda model: (model["name"], -_order(model)))
    print_table(
        ("model", "project", "#round", "#accuracy", "#loss", "created"),
        [
            (
                f"{model['name']}:{model['version']}",
                model.get("project") or "",
                str(model.get("round") or "-"),
                percent((model.get("metrics") or {}).get("accuracy")),
                number((model.get("metrics") or {}).get("loss")),
                age(model.get("created")),
            )
            for model in found
        ],
        "no models yet - a project that finishes registers one",
    )


def get(
    model: Annotated[str, typer.Argument(metavar="NAME:VERSION", help="Without a version, the newest.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder; NAME-VERSION if not given.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Download a model: an MLflow model folder with its parameters as safetensors."""
    from flops.cli.archive import receive
    from flops.cli.session import manager

    name, _, version = model.partition(":")
    with manager() as client:
        version = version or _newest(list(client.iterate_models()), name)
        folder = (out or Path(f"{Path(name).name}-{version}")).absolute()
        files = receive(lambda into: client.get_model_archive(name, _number(version), into), folder)
    if as_json:
        print_json(
            {
                "name": name,
                "version": version,
                "folder": str(folder),
                "files": [str(file) for file in files],
            }
        )
        return
    say((f"{clean(name)}:{clean(version)}", "bold"), f" is in {folder}")
    for file in files:
        say((f"  {clean(file)}", "dim"))


def _newest(models: Sequence[Mapping[str, Any]], name: str) -> str:
    from flops.core.errors import NotFoundError

    found = [model for model in models if model["name"] == name]
    if not found:
        known = ", ".join(sorted({model["name"] for model in models})) or "none yet"
        raise NotFoundError(f"there is no model '{name}' - registered are: {known}")
    return str(max(found, key=_order)["version"])


def _number(version: str) -> int:
    from flops.core.errors import InvalidInputError

    if not version.isdecimal():
        raise InvalidInputError(f"'{clean(version)[:40]}' is no version - use a number, see 'flops models'")
    return int(version)


def _order(model: Mapping[str, Any]) -> int:
    version = str(model["version"])
    return int(version) if version.isdecimal() else 0
