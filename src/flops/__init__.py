"""FLOps: from a link to a plain machine-learning repository to a federated, tracked, registered model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flops.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    """`Client` and `AsyncClient`, imported on first use: commands and services need neither."""
    if name not in ("AsyncClient", "Client"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flops import client

    return getattr(client, name)
