"""The `flops` command itself: what it is called, its panels of commands, and how errors leave it."""

import sys
from typing import NoReturn

import typer

from flops.cli import admin, data, identity, images, models, node, operate, projects, run, serving, top, web
from flops.cli.output import print_error
from flops.core.errors import FlopsError

app = typer.Typer(
    name="flops",
    help="Federated training from a link to a plain ML repository.",
    epilog="Start with:  flops run REPO --mock mnist",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
run.register(app)
projects.register(app)
top.register(app)
data.register(app)
node.register(app)
models.register(app)
serving.register(app)
images.register(app)
web.register(app)
identity.register(app)
operate.register(app)
admin.register(app)


def main() -> NoReturn:
    """Run the command line of this process; never returns."""
    try:
        app()
    except FlopsError as error:
        print_error(error, as_json="--json" in sys.argv[1:])
        sys.exit(1)
    sys.exit(0)
