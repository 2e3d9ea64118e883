"""How commands get their manager: the running one, started first where that makes sense.

Imports the HTTP client only when called, so that ``--help`` and completion stay quick.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from flops.cli.output import note
from flops.core.errors import ConflictError, InvalidInputError
from flops.core.ids import project_id

if TYPE_CHECKING:
    from flops.client import Client


def _checked(given: str | list[str]) -> str | list[str]:
    for text in [given] if isinstance(given, str) else given:
        try:
            project_id(text)
        except InvalidInputError as error:
            raise typer.BadParameter(str(error)) from error
    return given


_HELP = "A project's id, such as p-7k2mqd (see 'flops ls')."
ProjectArgument = Annotated[str, typer.Argument(metavar="ID", help=_HELP, callback=_checked)]
ProjectArguments = Annotated[list[str], typer.Argument(metavar="ID...", help=_HELP, callback=_checked)]


def manager() -> "Client":
    """The manager that one is signed in to, else that of this FLOPS_HOME, started if none runs.

    Raises:
        ConflictError: none runs, none ever did, and this machine is a node of another one: whoever asks here
            hardly wants a manager of their own.
    """
    from flops.cli.launch import ensure, find, settings_here
    from flops.node.home import NodeHome

    settings = settings_here()
    if running := find(settings):
        return running
    joined = NodeHome(settings.home).membership()
    if joined is not None and not settings.token_file.exists():
        raise ConflictError(
            f"this machine is node {joined.node} of {joined.url}, and runs no manager - sign in there with "
            f"'flops login {joined.url}', or start one of your own with 'flops up'"
        )
    return ensure(settings, announce=note)


def finder() -> "Callable[[], Client | None]":
    """Looks the running manager up anew at every call, and never starts one."""
    from flops.cli.launch import find, settings_here

    settings = settings_here()
    return lambda: find(settings)
