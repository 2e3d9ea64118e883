"""`flops data`: the data that learners of this machine train on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flops.cli.output import JsonFlag, age, print_json, print_table, say, size

_ALPHA, _SHARDS = 0.5, 2
FileArguments = Annotated[
    list[Path],
    typer.Argument(metavar="FILE...", exists=True, dir_okay=False, help="Parquet or CSV files."),
]
SiteOption = Annotated[str, typer.Option(help="The place whose data it is; each place is one learner.")]
MetricsOption = Annotated[
    bool, typer.Option("--allow-metrics", help="Let this data's own metrics be tracked and shown.")
]
LabelOptions = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="What is known of the place (repeatable)."),
]
TagOptions = Annotated[list[str] | None, typer.Option("--tag", "-t", help="A data tag (repeatable).")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Put, list and remove training data; mock some.")
    group.command("put", epilog="Example:\n\nflops data put patients.parquet --tag ward-7 --site clinic-a")(
        put
    )
    group.command("ls")(list_fragments)
    group.command("uses")(uses)
    group.command("rm")(remove)
    group.command(
        "mock", epilog="Example:\n\nflops data mock mnist --sites 5 --partition dirichlet --alpha 0.3"
    )(mock)
    app.add_typer(group, name="data", rich_help_panel="Data and models")


def put(
    files: FileArguments,
    tag: TagOptions = None,
    site: SiteOption = "local",
    allow_metrics: MetricsOption = False,
    label: LabelOptions = None,
    node: Annotated[
        str | None,
        typer.Option(help="Where an orchestrator of many nodes keeps it; where the site's data are already."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Store files as fragments, for learners to find by tag."""
    from flops.cli.parquet import parquet_file
    from flops.cli.session import manager

    if not tag:
        raise typer.BadParameter("name at least one: learners find data by tag", param_hint="--tag")
    fragments = []
    with manager() as client:
        for file in files:
            with parquet_file(file) as parquet:
                fragments.append(
                    client.put_fragment(
                        parquet, tag=tag, site=site, allow_metrics=allow_metrics, label=label, node=node
                    )
                )
    _print(fragments, as_json=as_json)


def list_fragments(
    tag: TagOptions = None,
    site: Annotated[str | None, typer.Option(help="Only of this place.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List fragments; with tags, those that carry any of them."""
    from flops.cli.session import manager

    with manager() as client:
        fragments = client.list_fragments(tag=tag, site=site)["fragments"]
    _print(fragments, as_json=as_json)


def remove(
    fragments: Annotated[list[str], typer.Argument(metavar="FRAGMENT...", help="Ids of fragments.")],
    as_json: JsonFlag = False,
) -> None:
    """Remove fragments."""
    from flops.cli.session import manager

    with manager() as client:
        for fragment in fragments:
            client.drop_fragment(fragment)
            if not as_json:
                say("removed ", (fragment, "bold cyan"))
    if as_json:
        print_json({"removed": fragments})


def mock(
    dataset: Annotated[str, typer.Argument(metavar="mnist|digits", help="The known data set.")],
    tag: TagOptions = None,
    sites: Annotated[int, typer.Option(min=1, help="Over how many places it is split.")] = 3,
    partition: Annotated[
        str | None,
        typer.Option(
            metavar="iid|dirichlet|shards",
            help="How it is split; dirichlet where --alpha is given, shards where --shards is.",
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Dirichlet concentration: smaller is more uneven.")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Of the examples sorted by label, pieces for each place.")
    ] = None,
    test_split: Annotated[
        bool, typer.Option("--test-split", help="Spread the test examples too, tagged TAG-test.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
    num_examples: Annotated[
        int | None, typer.Option(min=1, help="Examples in all; everything if not given.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Split a known data set over places, tagged with its name or your tags."""
    from flops.cli.session import manager

    request: dict[str, Any] = {
        "dataset": dataset,
        "tags": tag or [dataset],
        "sites": sites,
        "partition": partition
        or ("dirichlet" if alpha is not None else "shards" if shards is not None else "iid"),
        "alpha": _ALPHA if alpha is None else alpha,
        "shards_per_site": _SHARDS if shards is None else shards,
        "test_split": test_split,
        "seed": seed,
        "num_examples": num_examples,
    }
    with manager() as client:
        fragments = client.mock_data(**request)["fragments"]
    _print(fragments, as_json=as_json)


def uses(
    site: Annotated[str | None, typer.Option(help="Only of this site's data.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only of data under this tag.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List what ran on data: which code of whom, how many updates left the site, and their bytes."""
    from flops.cli.session import manager

    with manager() as client:
        found = client.list_data_uses(site=site, tag=tag)["uses"]
    if as_json:
        print_json(found)
        return
    print_table(
        ("site", "project", "owner", "state", "#updates", "#bytes out", "began", "commit", "source"),
        [
            (
                one["site"],
                one["project"],
                one["owner"],
                one["state"],
                str(one["updates"]),
                size(one["bytes_out"]),
                age(one["created"]),
                (one["commit"] or "-")[:12],
                one["source"],
            )
            for one in found
        ],
        "nothing has run on these data yet",
    )


def _print(fragments: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(fragments)
        return
    # Only orchestrators of many nodes say where something is.
    nodes = any(one.get("node") for one in fragments)
    print_table(
        ("fragment", "site", *(("node",) if nodes else ()), "#examples", "#size", "tags"),
        [
            (
                one["id"],
                one["site"],
                *((one["node"],) if nodes else ()),
                f"{one['num_examples']:,}",
                size(one["size_bytes"]),
                ", ".join(one["tags"]),
            )
            for one in fragments
        ],
        "no data - add some with 'flops data put FILE --tag TAG' or 'flops data mock mnist'",
    )
