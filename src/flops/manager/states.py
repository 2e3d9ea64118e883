"""The life of a project as pure functions: which state follows from what has been seen.

```
submitted -> preparing -> deploying -> training -> packaging -> finished
     any of these -> failed                any of these -> stopping -> stopped
submitted .. training -> pausing -> paused -> stopping -> stopped
paused -> submitted, where it is to go on
finished -> submitted, where more rounds are asked for
failed | stopped -> submitted, where another attempt is asked for
```

Whatever runs was submitted just before, and has waited for its turn there; finished steps are not done again.

Nothing here does anything; the store commits what these functions answer, the reconciler acts on it
afterwards.
"""

from collections.abc import Iterable
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
    PAUSING = "pausing"
    PAUSED = "paused"


TERMINAL = frozenset({State.FINISHED, State.FAILED, State.STOPPED})
RETRIABLE = frozenset({State.FAILED, State.STOPPED})
RESTING = TERMINAL | {State.PAUSED}
"""Nothing of the project runs, and nothing happens to it by itself."""
PAUSABLE = frozenset({State.SUBMITTED, State.PREPARING, State.DEPLOYING, State.TRAINING})
ENDING = frozenset({State.STOPPING, State.PAUSING})
"""What is still under way is given up."""

LOCK = "lock"
ENVIRONMENT = "environment"
INITIAL_MODEL = "initial-model"
DATA = "data"
DATASET = "dataset"
"""What mock data are made of."""
CLUSTERS = "clusters"
IMAGES = "images"
AGGREGATOR_IMAGE = "aggregator-image"
"""The one image that holds the initial model."""
_PREPARING_STEPS = ("fetch", "check-contract", LOCK, ENVIRONMENT, INITIAL_MODEL, DATA)
EXPORT_ENVIRONMENT = "export-environment"
EXPORT = "export"
REGISTER = "register"
MODEL_IMAGE = "model-image"
RUNTIME_IMAGE = "runtime-image"
"""The image of FLOps' own programs, which all projects share."""
ONNX = "onnx"
"""The kind of a deployment, the step that converts its model, and the file that says where that is."""
DEPLOY = "deploy-model"
_POST_TRAINING = {"build_image_for_trained_model": MODEL_IMAGE, "deploy_trained_model_image": DEPLOY}
"""Names of the specification's steps here."""


def preparing_steps(mode: str, *, mock: bool = False, images: bool = False) -> dict[str, frozenset[str]]:
    """What a project of this training mode has to go through before it is deployed, and of each step which
    others come before it; what waits for nothing that is still to be done runs side by side.

    Args:
        mock: it trains on mock data.
        images: its services are images.
    """
    order = (*_PREPARING_STEPS, *((CLUSTERS,) if mode == "hierarchical" else ()))
    steps = {step: frozenset(order[:at]) for at, step in enumerate(order)}
    if images:
        steps[IMAGES] = steps[LOCK] | {LOCK}
        steps[AGGREGATOR_IMAGE] = frozenset({IMAGES, INITIAL_MODEL})
    if mock:
        steps[DATASET] = steps[LOCK]
        steps[DATA] |= {DATASET}
    return steps


def post_training_steps(wanted: Iterable[str]) -> tuple[str, ...]:
    """What is done with a registered model, in order; `wanted` in the specification's words."""
    asked = {_POST_TRAINING[name] for name in wanted}
    return tuple(step for step in _POST_TRAINING.values() if step in asked)


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
    pause_requested: bool = False
    resume_requested: bool = False
    extended: bool = False
    retry_requested: bool = False
    services_gone: bool = False


def next_state(state: State, seen: Observation) -> State:
    """The state that follows; the same one where nothing does.

    A stop wins over a failure, a failure over a pause, and a pause over progress: whoever asked for the stop
    is not told that it failed. At most one step is taken, so every state on the way is committed and seen.
    """
    if state is State.FINISHED and seen.extended:
        return State.SUBMITTED
    if state in RETRIABLE and seen.retry_requested:
        return State.SUBMITTED
    if state in TERMINAL:
        return state
    if state is State.STOPPING:
        return State.STOPPED if seen.services_gone else state
    if seen.stop_requested:
        return State.STOPPING
    if state is State.PAUSING:
        return State.PAUSED if seen.services_gone else state
    if state is State.PAUSED:
        return State.SUBMITTED if seen.resume_requested else state
    if seen.failed:
        return State.FAILED
    if seen.pause_requested and state in PAUSABLE:
        return State.PAUSING
    follower, reached = {
        State.SUBMITTED: (State.PREPARING, seen.begun),
        State.PREPARING: (State.DEPLOYING, seen.prepared),
        State.DEPLOYING: (State.TRAINING, seen.deployed),
        State.TRAINING: (State.PACKAGING, seen.trained),
        State.PACKAGING: (State.FINISHED, seen.packaged),
    }[state]
    return follower if reached else state
