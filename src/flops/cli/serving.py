"""`flops deploy`, `flops undeploy` and `flops predict`: trained models that are served."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flops.cli.output import JsonFlag, clean, print_json, print_table, say
from flops.cli.session import ProjectArgument
from flops.core.errors import InvalidInputError

_PANEL = "Data and models"
_SHOWN = 20
"""Predictions that are printed; --json prints them all."""


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=_PANEL)(deploy)
    app.command(rich_help_panel=_PANEL)(undeploy)
    app.command(
        rich_help_panel=_PANEL,
        epilog="Examples:\n\n"
        "flops predict p-7k2mqd --data patients.csv\n\n"
        "flops predict p-7k2mqd --data request.json --json",
    )(predict)


def deploy(
    project: ProjectArgument,
    onnx: Annotated[
        bool,
        typer.Option("--onnx", help="Convert it first; only a conversion that answers alike is served."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Serve the model that a project trained last; returns once it predicts."""
    from flops.cli.session import manager

    with manager() as client:
        found = client.deploy_model(project, onnx=onnx)
    if as_json:
        print_json(found)
        return
    served = found["deployment"]
    assert served is not None
    form = " in ONNX" if served["kind"] == "onnx" else ""
    name = f"{clean(served['model'])}:{served['version']}"
    say((name, "bold"), f" is served{form} at {clean(served['url'] or '')}")
    say(("next     ", "default"), (f"flops predict {project} --data FILE", "cyan"))


def undeploy(project: ProjectArgument, as_json: JsonFlag = False) -> None:
    """Serve a project's model no longer; the model itself stays."""
    from flops.cli.session import manager

    with manager() as client:
        found = client.undeploy_model(project)
    if as_json:
        print_json(found)
        return
    say((project, "bold cyan"), " is served no longer")


def predict(
    project: ProjectArgument,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            "-d",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="What to predict: CSV or Parquet with a column for each input, or a JSON request in "
            "MLflow's form.",
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Ask the served model of a project."""
    from flops.cli.session import manager

    content_type, body = request_of(data)
    with manager() as client:
        answer = client.predict(project, body, content_type)
    if as_json:
        print_json(answer)
        return
    _print(answer.get("predictions"))


def request_of(file: Path) -> tuple[str, bytes]:
    """A file as a request in MLflow's scoring protocol: its content type and body.

    Raises:
        InvalidInputError: it is none of the forms that can be sent.
    """
    match file.suffix.lower():
        case ".csv":
            return "text/csv", file.read_bytes()
        case ".parquet":
            return "application/json", json.dumps({"dataframe_split": _split(file)}).encode()
        case ".json":
            content = file.read_bytes()
            try:
                parsed = json.loads(content)
            except ValueError as error:
                raise InvalidInputError(f"'{file}' is no JSON: {error}") from error
            if isinstance(parsed, list):  # rows alone
                whole = "dataframe_records" if parsed and isinstance(parsed[0], dict) else "inputs"
                return "application/json", json.dumps({whole: parsed}).encode()
            return "application/json", content
        case other:
            raise InvalidInputError(
                f"'{file}' is of no known kind ('{other}') - give a .csv, .parquet or .json file"
            )


def _split(file: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidInputError(f"'{file}' cannot be read as Parquet: {error}") from error
    columns = [column.to_pylist() for column in table.columns]
    try:
        rows = [list(row) for row in zip(*columns, strict=True)]
        json.dumps(rows[:1])
    except TypeError as error:
        raise InvalidInputError(
            f"'{file}' has columns that JSON cannot hold ({error}) - send a .json request instead"
        ) from error
    return {"columns": table.column_names, "data": rows}


def _print(predictions: Any) -> None:
    if not isinstance(predictions, list) or not predictions:
        say(clean(json.dumps(predictions)))
        return
    columns = list(predictions[0]) if isinstance(predictions[0], dict) else ["prediction"]
    print_table(
        ("#row", *columns),
        [
            (str(number), *(_short(row[name] if isinstance(row, dict) else row) for name in columns))
            for number, row in enumerate(predictions[:_SHOWN], start=1)
        ],
        "",
    )
    if len(predictions) > _SHOWN:
        say((f"{len(predictions)} predictions, the first {_SHOWN} are shown; --json prints all", "dim"))


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
