"""`flops run` and `flops attach`: start a project, watch one."""

from typing import Annotated

import typer

from flops.cli.output import JsonFlag, print_json, say
from flops.cli.session import ProjectArgument

_PANEL = "Federated training"
_SPEC, _DATA, _TRAINING, _AFTER = "What", "Data", "Training", "Afterwards"

_AFTERWARDS = ["build_image_for_trained_model", "deploy_trained_model_image"]


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=_PANEL,
        epilog="Examples:\n\n"
        "flops run https://host/me/repo@v1 --tag mnist --rounds 5\n\n"
        "flops run . --mock mnist --learners 3 --alpha 0.5\n\n"
        "flops run . --tag mnist --strategy FedProx --strategy-param proximal_mu=0.1\n\n"
        "flops run . --mock mnist --learners 9 --clusters 3 --cycles 5 --rounds 2\n\n"
        "flops run --spec sla.json --detach",
    )(run)
    app.command(rich_help_panel=_PANEL)(attach)


def run(
    repo: Annotated[
        str | None,
        typer.Argument(
            metavar="REPO",
            help="git URL or folder; REPO@REF picks a branch, tag or commit.",
            show_default=False,
        ),
    ] = None,
    spec: Annotated[
        str | None,
        typer.Option(
            "--spec",
            "-f",
            metavar="FILE",
            help="Project specification, YAML or JSON, ours or a thesis SLA; options win ('-': stdin).",
            rich_help_panel=_SPEC,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the project is called.", rich_help_panel=_SPEC)
    ] = None,
    flavor: Annotated[
        str | None,
        typer.Option(
            help="sklearn, pytorch, tensorflow, keras or xgboost; found out if not given.",
            rich_help_panel=_SPEC,
        ),
    ] = None,
    initial: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:VERSION",
            help="Start from a registered model's parameters ('flops models').",
            rich_help_panel=_SPEC,
        ),
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option("--tag", "-t", help="Train on data with this tag (repeatable).", rich_help_panel=_DATA),
    ] = None,
    mock: Annotated[
        str | None,
        typer.Option(
            metavar="mnist|digits", help="Split a known data set over fresh learners.", rich_help_panel=_DATA
        ),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(metavar="iid|dirichlet|shards", help="How --mock splits.", rich_help_panel=_DATA),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Dirichlet concentration: smaller is more uneven.", rich_help_panel=_DATA),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="Pieces of the examples sorted by label for each learner.", rich_help_panel=_DATA),
    ] = None,
    test_split: Annotated[
        bool | None,
        typer.Option(
            "--test-split",
            help="Give learners --mock's test examples too, for code that reads column 'split'.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    learners: Annotated[
        int | None,
        typer.Option("--learners", "-l", help="How many learners.", rich_help_panel=_TRAINING),
    ] = None,
    virtual: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="N learners that share a few processes: same results as N agents.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", "-r", help="How many rounds.", rich_help_panel=_TRAINING),
    ] = None,
    clusters: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Train in so many clusters, below one root.", rich_help_panel=_TRAINING
        ),
    ] = None,
    cycles: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How often the clusters meet; --rounds is what each does in between.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            "-s",
            help="A Flower strategy, such as FedAvg or FedAdam; FedBuff, FedAsync and FedAT wait for nobody.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    strategy_param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A parameter of it (repeatable).", rich_help_panel=_TRAINING),
    ] = None,
    fraction_fit: Annotated[
        float | None,
        typer.Option(help="Share of learners that train in a round.", rich_help_panel=_TRAINING),
    ] = None,
    cohort: Annotated[
        str | None,
        typer.Option(
            metavar="random|round-robin|data-size|availability",
            help="Who they are.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    over_sample: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR",
            help="Ask so many times the learners that are needed; the quickest count.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long a round waits for its learners; who is late is left out.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    min_learners: Annotated[
        int | None,
        typer.Option(help="Learners without which no round starts.", rich_help_panel=_TRAINING),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of training, and of --mock's split.", rich_help_panel=_TRAINING),
    ] = None,
    image: Annotated[
        bool, typer.Option("--image", help="Build an image of the trained model.", rich_help_panel=_AFTER)
    ] = False,
    deploy: Annotated[
        bool,
        typer.Option("--deploy", help="Build it and serve the trained model.", rich_help_panel=_AFTER),
    ] = False,
    team: Annotated[
        str | None,
        typer.Option(metavar="TEAM", help="One of your teams, whose members may see and change it too."),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Start it, print its id, and return.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a repository's model federated, and watch it.

    Ctrl-C leaves the project running; 'flops attach ID' comes back to it.
    """
    from flops.cli.live import watch
    from flops.cli.request import read_spec
    from flops.cli.session import finder, manager

    if mock is None and spec is None and {partition, alpha, shards, test_split} != {None}:
        raise typer.BadParameter("--partition, --alpha, --shards and --test-split need --mock")
    if virtual is not None and learners is not None:
        raise typer.BadParameter("--virtual says how many learners there are, so does --learners - use one")
    wanted = read_spec(
        repo,
        spec,
        {
            "name": name,
            "model.flavor": flavor,
            "model.initial": None if initial is None else "/".join(initial.rsplit(":", 1)),
            "data.tags": tag or None,
            "data.mock.dataset": mock,
            "data.mock.partition": partition,
            "data.mock.alpha": alpha,
            "data.mock.shards_per_learner": shards,
            "data.mock.test_split": test_split,
            "data.mock.seed": seed if mock is not None else None,
            "training.learners": virtual or learners,
            "training.virtual": True if virtual else None,
            "training.rounds": rounds,
            "training.mode": "hierarchical" if clusters or cycles else None,
            "training.clusters.count": clusters,
            "training.cycles": cycles,
            "training.strategy.name": strategy,
            "training.fraction_fit": fraction_fit,
            "training.cohort": cohort,
            "training.over_sample": over_sample,
            "training.round_deadline_s": deadline,
            "training.min_available_learners": min_learners,
            "training.min_fit_learners": min_learners,
            "training.seed": seed,
            "post_training_steps": _AFTERWARDS[: 2 if deploy else 1] if image or deploy else None,
        },
        strategy_param or [],
    )
    with manager() as client:
        project = client.submit_project(spec=wanted.to_json(), team=team)
    if not detach:
        raise typer.Exit(watch(project, finder(), as_json=as_json))
    if as_json:
        print_json(project)
    else:
        say((project["id"], "bold cyan"), f"  watch it with 'flops attach {project['id']}'")


def attach(
    project: ProjectArgument,
    as_json: JsonFlag = False,
) -> None:
    """Watch a project, from its beginning until its end.

    Ctrl-C leaves the project running.
    """
    from flops.cli.live import watch
    from flops.cli.session import finder, manager

    with manager() as client:
        found = client.get_project(project)
    raise typer.Exit(watch(found, finder(), as_json=as_json))
