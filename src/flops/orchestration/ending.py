"""What the end of a service means: its next state, in the same words on every orchestrator."""

import signal
from dataclasses import dataclass

from flops.orchestration.port import ServiceSpec, ServiceState

SETTLED_S = 10.0
"""An attempt that lived this long did not fail at its start: pauses begin anew."""


@dataclass(frozen=True)
class Verdict:
    """The state after an end.

    Args:
        restart_in_s: pause before the next attempt; None: there will be none.
    """

    state: ServiceState
    reason: str
    restart_in_s: float | None = None


def describe_exit(exit_code: int) -> str:
    """An exit code in words: ``exit code 3`` or ``killed by SIGKILL``."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:  # real-time signals have no names
        return f"killed by signal {-exit_code}"


def restarted_after(exit_code: int | None) -> str:
    """The reason of a running service that ran before."""
    what = "an unknown end" if exit_code is None else describe_exit(exit_code)
    return f"restarted after {what}"


def pause_s(restarts: int, first_s: float, longest_s: float = 30.0) -> float:
    """How long to wait before attempt ``restarts + 1``: doubling, bounded."""
    return min(longest_s, first_s * 2.0 ** min(restarts, 30))


def judge(
    spec: ServiceSpec,
    exit_code: int | None,
    *,
    restarts: int,
    stopping: bool,
    backoff_s: float,
    quick_ends: int | None = None,
) -> Verdict:
    """Decide what a service that just ended is from now on.

    An end with an unknown code is never retried: it may have been a success, and only the caller knows
    what the service reported.

    Args:
        exit_code: None: nobody knows.
        restarts: attempts after the first, so far.
        stopping: the end was asked for.
        backoff_s: pause before the first restart.
        quick_ends: attempts before this one that ended soon after their start, in a row; None: all did.
    """
    if stopping:
        return Verdict("exited", "stopped")
    if exit_code is None:
        return Verdict("lost", "exit code unknown: it ended outside the sight of a manager")
    if exit_code == 0:
        return Verdict("exited", "")
    what = describe_exit(exit_code)
    if spec.restart == "never":
        return Verdict("failed", what)
    if restarts >= spec.max_restarts:
        return Verdict("failed", f"{what}; given up after {restarts} restarts")
    pause = pause_s(restarts if quick_ends is None else quick_ends, backoff_s)
    return Verdict("pending", f"{what}; restart {restarts + 1} of {spec.max_restarts} in {pause:g} s", pause)
