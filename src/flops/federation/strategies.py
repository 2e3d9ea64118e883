"""Which strategies there are, and what each needs to see of the updates. Light: does not import flwr."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flops.core.errors import InvalidInputError


class Reduction(Enum):
    """What a strategy's arithmetic needs, from the cheapest to the dearest."""

    MEAN = "the weighted mean is the new model: streamed, nothing of a learner is kept"
    OPTIMISER = "a server optimiser steps from the weighted mean: streamed"
    BLOCKS = "every parameter by itself: spooled updates, one block at a time"
    ALL = "learners compared with each other: all updates at once"
    ONE_BY_ONE = "asynchronous: each update on its arrival, whatever the others do"


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
    "FedAsync": Reduction.ONE_BY_ONE,
    "FedBuff": Reduction.ONE_BY_ONE,
    "FedAT": Reduction.ONE_BY_ONE,
}


@dataclass(frozen=True)
class Parameter:
    """What a parameter of a strategy of our own may be: one of some words, or a number within bounds."""

    kind: type
    default: int | float | str | None
    """None: it follows from other things, or has no bound."""
    low: float = 0.0
    high: float = math.inf
    words: tuple[str, ...] = ()
    above_low: bool = False
    """The lower bound itself is excluded."""

    def problem(self, value: Any) -> str | None:
        """What a value should be instead; None for one that can be."""
        if self.words:
            return None if value in self.words else f"must be one of {', '.join(self.words)}"
        whole = self.kind is int
        fits = type(value) is int or (not whole and type(value) is float)
        if fits and self.low <= value <= self.high and not (self.above_low and value == self.low):
            return None
        first = f"above {self.low:g} and at most" if self.above_low else f"from {self.low:g} to"
        return f"must be a {'whole ' if whole else ''}number {first} {self.high:.10g}"


_MAX_STALENESS = Parameter(int, None, 0, 1_000_000)
_PROXIMAL_MU = Parameter(float, 0.0, 0.0, 1e6)
_STALENESS = {
    "staleness": Parameter(str, "polynomial", words=("constant", "hinge", "polynomial")),
    "a": Parameter(float, None, 0.0, 1000.0),
    "b": Parameter(float, 4, 0.0, 1_000_000),
    "max_staleness": _MAX_STALENESS,
    "proximal_mu": _PROXIMAL_MU,
}
ASYNCHRONOUS: Mapping[str, Mapping[str, Parameter]] = {
    "FedAsync": {
        "alpha": Parameter(float, 0.6, 0.0, 1.0, above_low=True),
        "updates_per_round": Parameter(int, None, 1, 10_000),
        **_STALENESS,
    },
    "FedBuff": {
        "buffer_size": Parameter(int, None, 1, 10_000),
        "server_learning_rate": Parameter(float, 1.0, 0.0, 100.0, above_low=True),
        **_STALENESS,
    },
    "FedAT": {
        "tiers": Parameter(int, 3, 2, 20),
        "max_staleness": _MAX_STALENESS,
        "proximal_mu": _PROXIMAL_MU,
    },
}
"""The strategies of `flops.federation.asynchronous`, and their parameters."""

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


def flower_strategy_names() -> list[str]:
    """Those of them that are Flower's."""
    return [name for name in _STRATEGIES if name not in ASYNCHRONOUS]


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
        if name in ASYNCHRONOUS:
            _check_own(name, key, value)
    return _STRATEGIES[name]


def asynchronous_parameters(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of an asynchronous strategy: those that were given, and the defaults of the others.

    Raises:
        InvalidInputError: as `check_strategy`.
    """
    check_strategy(name, given)
    return {key: parameter.default for key, parameter in ASYNCHRONOUS[name].items()} | dict(given)


def _check_own(name: str, key: str, value: Any) -> None:
    parameter = ASYNCHRONOUS[name].get(key)
    if parameter is None:
        near = difflib.get_close_matches(key, ASYNCHRONOUS[name], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(ASYNCHRONOUS[name])}"
        raise InvalidInputError(f"strategy {name} has no parameter {key} - {hint}")
    problem = parameter.problem(value)
    if problem is not None:
        raise InvalidInputError(f"strategy parameter {key} of {name} {problem} (is {str(value)[:40]})")
