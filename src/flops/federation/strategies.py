"""Which strategies there are, and what each needs to see of the updates. Light: does not import flwr."""

import difflib
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

from flops.core.errors import InvalidInputError


class Reduction(Enum):
    """What a strategy's arithmetic needs, from the cheapest to the dearest."""

    MEAN = "the weighted mean is the new model: streamed, nothing of a learner is kept"
    OPTIMISER = "a server optimiser steps from the weighted mean: streamed"
    BLOCKS = "every parameter by itself: spooled updates, one block at a time"
    ALL = "learners compared with each other: all updates at once"


_STRATEGIES = {
    "FedAvg": Reduction.MEAN,
    "FedProx": Reduction.MEAN,
    "FedAvgM": Reduction.OPTIMISER,
    "FedAdagrad": Reduction.OPTIMISER,
    "FedAdam": Reduction.OPTIMISER,
    "FedYogi": Reduction.OPTIMISER,
    "FedMedian": Reduction.BLOCKS,
    "FedTrimmedAvg": Reduction.BLOCKS,
    "Krum": Reduction.ALL,
    "MultiKrum": Reduction.ALL,
    "Bulyan": Reduction.ALL,
    "QFedAvg": Reduction.ALL,
}

_NOT_YET = {
    "FedXgbBagging": "its model grows every round",
    "FedXgbCyclic": "its model grows every round",
    "DifferentialPrivacyClientSideAdaptiveClipping": "its learners need Flower's client mods",
    "DifferentialPrivacyClientSideFixedClipping": "its learners need Flower's client mods",
    "DifferentialPrivacyServerSideAdaptiveClipping": "it wraps another strategy",
    "DifferentialPrivacyServerSideFixedClipping": "it wraps another strategy",
}

# Set by fields of the spec (fraction_fit, min_fit_learners, ...), so that one thing has one name.
_FIELDS_OF_THE_SPEC = {
    "fraction_train": "fraction_fit",
    "fraction_evaluate": "fraction_evaluate",
    "min_train_nodes": "min_fit_learners",
    "min_evaluate_nodes": "min_evaluate_learners",
    "min_available_nodes": "min_available_learners",
}
_FIXED = {"weighted_by_key", "arrayrecord_key", "configrecord_key", "train_metrics_aggr_fn"}

NEEDS_LOSS_FIRST = {"QFedAvg"}
"""Strategies that weigh an update by the loss of the global model on the learner's data before training."""


def strategy_names() -> list[str]:
    """The strategies that can be named in a spec."""
    return list(_STRATEGIES)


def check_strategy(name: str, parameters: Mapping[str, Any]) -> Reduction:
    """Check a strategy's name, and its parameters as far as that needs no flwr.

    Raises:
        InvalidInputError: says what is wrong and what to write instead.
    """
    if name in _NOT_YET:
        raise InvalidInputError(
            f"strategy {name} cannot be used in this version: {_NOT_YET[name]} - choose one of "
            f"{', '.join(_STRATEGIES)}"
        )
    if name not in _STRATEGIES:
        near = difflib.get_close_matches(name, _STRATEGIES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(_STRATEGIES)}"
        raise InvalidInputError(f"strategy '{name[:60]}' is unknown - {hint}")
    for key, value in parameters.items():
        if key in _FIELDS_OF_THE_SPEC:
            raise InvalidInputError(
                f"strategy parameter {key} is set by training.{_FIELDS_OF_THE_SPEC[key]} - use that field"
            )
        if key in _FIXED:
            raise InvalidInputError(f"strategy parameter {key} is fixed by FLOps - leave it out")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInputError(f"strategy parameter {key} must be a finite number (is {value})")
    return _STRATEGIES[name]
