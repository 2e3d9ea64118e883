"""How commands get their manager: the running one, started first where that makes sense.

Imports the HTTP client only when called, so that ``--help`` and completion stay quick.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from flops.cli.output import note

if TYPE_CHECKING:
    from flops.cli.client import ManagerClient

PROJECT_HELP = "A project's id, such as p-7k2mqd (see 'flops ls')."


def manager() -> "ManagerClient":
    """The manager of this FLOPS_HOME, started if none runs."""
    from flops.cli.launch import ensure, settings_here

    return ensure(settings_here(), announce=note)


def finder() -> "Callable[[], ManagerClient | None]":
    """Looks the running manager up anew at every call, and never starts one."""
    from flops.cli.launch import find, settings_here

    settings = settings_here()
    return lambda: find(settings)
