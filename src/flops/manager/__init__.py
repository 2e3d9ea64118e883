"""The manager: the life of projects, from a submitted spec to a registered model.

Owns the store, the state machine, the reconciler and the services of every project. Promises: a change of
state is a committed row, with its event, before it has an effect; whatever is killed, at whatever moment,
the next start goes on from there and does nothing twice that must happen once; a stopped project leaves no
process. What the floors below do runs in processes of their own (`flops.manager.steps`), so this one stays
small.
"""

from flops.manager.home import Home, claim_home
from flops.manager.manager import Manager
from flops.manager.reports import MAX_REPORTS, Report, parse_report
from flops.manager.states import TERMINAL, State

__all__ = [
    "MAX_REPORTS",
    "TERMINAL",
    "Home",
    "Manager",
    "Report",
    "State",
    "claim_home",
    "parse_report",
]
