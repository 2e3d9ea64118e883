"""The guest: the user's code in a process of its own, with its own interpreter and dependencies.

Owns how that process is started, locked in, spoken to and ended. Promises: whatever user code does (raise,
exit, crash, hang), the caller gets a `GuestError` and lives on; the process never outlives its parent, has no
network where the platform can cut it (`Guest.isolation` says), and none of FLOps's environment variables.
Where the user's code has a container of its own (`Guest.attach`), that container takes care of the latter.
One process serves one learner, or many (`Guest.seat`), one request at a time; requests and `Guest.close` and
`Guest.kill` may come from any thread.
"""

from flops.guest.errors import GuestClosed, GuestDied, GuestError, GuestTimeout
from flops.guest.guest import Guest
from flops.guest.process import Isolation
from flops.guest.results import EvaluateResult, ExportResult, FitResult, Loaded
from flops.guest.room import Room, guest_path
from flops.guest.seat import Seat
from flops.guest.worker import LastingSeat, Worker

__all__ = [
    "EvaluateResult",
    "ExportResult",
    "FitResult",
    "Guest",
    "GuestClosed",
    "GuestDied",
    "GuestError",
    "GuestTimeout",
    "Isolation",
    "LastingSeat",
    "Loaded",
    "Room",
    "Seat",
    "Worker",
    "guest_path",
]
