"""How commands get their manager: the running one, started first where that makes sense.

Imports the HTTP client only when called, so that ``--help`` and completion stay quick.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from flops.cli.output import note
from flops.core.errors import InvalidInputError
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
    """The manager that one is signed in to, else that of this FLOPS_HOME, started if none runs."""
    from flops.cli.launch import ensure, settings_here

    return ensure(settings_here(), announce=note)


def finder() -> "Callable[[], Client | None]":
    """Looks the running manager up anew at every call, and never starts one."""
    from flops.cli.launch import find, settings_here

    settings = settings_here()
    return lambda: find(settings)
