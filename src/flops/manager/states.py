"""The life of a project as pure functions: which state follows from what has been seen.

```
submitted -> preparing -> deploying -> training -> packaging -> finished
     any of these -> failed                any of these -> stopping -> stopped
```

Nothing here does anything; the store commits what these functions answer, the reconciler acts on it
afterwards.
"""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    SUBMITTED = "submitted"
    PREPARING = "preparing"
    DEPLOYING = "deploying"
    TRAINING = "training"
    PACKAGING = "packaging"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


TERMINAL = frozenset({State.FINISHED, State.FAILED, State.STOPPED})

PREPARING_STEPS = ("fetch", "check-contract", "lock", "environment", "initial-model", "data")
EXPORT_ENVIRONMENT = "export-environment"
EXPORT = "export"
REGISTER = "register"


@dataclass(frozen=True)
class Observation:
    """What was seen of a project; more than one thing may be true at once."""

    begun: bool = False
    prepared: bool = False
    deployed: bool = False
    trained: bool = False
    packaged: bool = False
    failed: bool = False
    stop_requested: bool = False
    services_gone: bool = False


def next_state(state: State, seen: Observation) -> State:
    """The state that follows; the same one where nothing does.

    A stop wins over a failure, and a failure over progress: whoever asked for the stop is not told that it
    failed. At most one step is taken, so every state on the way is committed and seen.
    """
    if state in TERMINAL:
        return state
    if state is State.STOPPING:
        return State.STOPPED if seen.services_gone else state
    if seen.stop_requested:
        return State.STOPPING
    if seen.failed:
        return State.FAILED
    follower, reached = {
        State.SUBMITTED: (State.PREPARING, seen.begun),
        State.PREPARING: (State.DEPLOYING, seen.prepared),
        State.DEPLOYING: (State.TRAINING, seen.deployed),
        State.TRAINING: (State.PACKAGING, seen.trained),
        State.PACKAGING: (State.FINISHED, seen.packaged),
    }[state]
    return follower if reached else state
