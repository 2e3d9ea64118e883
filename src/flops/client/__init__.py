"""A client of the manager's REST API for Python programs, and for the ``flops`` command itself.

`Client` and `AsyncClient` have a method for each operation of the OpenAPI document, generated from it
together with the types of all answers (``operations.py``, ``shapes.py``); pages, event streams, idempotency
keys and repetition are written by hand around them. Errors are `flops.core.errors`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flops.client.aio import AsyncClient
    from flops.client.errors import ManagerAwayError
    from flops.client.events import ProjectEvent
    from flops.client.sync import Client

__all__ = ["AsyncClient", "Client", "ManagerAwayError", "ProjectEvent"]

_HOMES = {"AsyncClient": "aio", "Client": "sync", "ManagerAwayError": "errors", "ProjectEvent": "events"}


def __getattr__(name: str) -> Any:
    """Import on first use: whoever needs one client, or none yet, does not wait for the other."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
