"""The guest: the user's code in a process of its own, with its own interpreter and dependencies.

Owns how that process is started, locked in, spoken to and ended. Promises: whatever user code does (raise,
exit, crash, hang), the caller gets a `GuestError` and lives on; the process never outlives its parent, has no
network where the platform can cut it (`Guest.isolation` says), and none of FLOps's environment variables.
One thread at a time is served; `Guest.close` and `Guest.kill` may be called from any other.
"""

from flops.guest.errors import GuestClosed, GuestDied, GuestError, GuestTimeout
from flops.guest.guest import Guest
from flops.guest.process import Isolation
from flops.guest.results import EvaluateResult, ExportResult, FitResult, Loaded
from flops.guest.room import Room, guest_path

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
    "Loaded",
    "Room",
    "guest_path",
]
