"""The manager: the life of projects, from a submitted spec to a registered model.

Owns the store, the state machine, the reconciler and the services of every project. Promises: a change of
state is a committed row, with its event, before it has an effect; whatever is killed, at whatever moment,
the next start goes on from there and does nothing twice that must happen once; a stopped project leaves no
process. What the floors below do runs in processes of their own (`flops.manager.steps`), so this one stays
small.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flops.manager.broadcast import Broadcast
    from flops.manager.figures import Figures
    from flops.manager.home import Home, TlsListener, claim_home
    from flops.manager.listing import Page, Sight, Wanted
    from flops.manager.manager import Manager
    from flops.manager.once import CarryOut, OnceRequest
    from flops.manager.reports import MAX_REPORTS, Report, parse_report
    from flops.manager.states import RESTING, TERMINAL, State

__all__ = [
    "MAX_REPORTS",
    "RESTING",
    "TERMINAL",
    "Broadcast",
    "CarryOut",
    "Figures",
    "Home",
    "Manager",
    "OnceRequest",
    "Page",
    "Report",
    "Sight",
    "State",
    "TlsListener",
    "Wanted",
    "claim_home",
    "parse_report",
]

_HOMES = {
    "Broadcast": "broadcast",
    "Figures": "figures",
    "Home": "home",
    "TlsListener": "home",
    "claim_home": "home",
    "Page": "listing",
    "Sight": "listing",
    "Wanted": "listing",
    "Manager": "manager",
    "CarryOut": "once",
    "OnceRequest": "once",
    "MAX_REPORTS": "reports",
    "Report": "reports",
    "parse_report": "reports",
    "RESTING": "states",
    "TERMINAL": "states",
    "State": "states",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the program of the steps needs nothing of the store (1 s of imports)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
