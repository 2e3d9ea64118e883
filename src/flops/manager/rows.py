"""What the store gives out: frozen copies of rows, never live objects."""

from dataclasses import dataclass
from typing import Any

from flops.core.ids import LearnerId, ProjectId, ServiceName
from flops.manager.states import RESTING, TERMINAL, State


@dataclass(frozen=True)
class Project:
    """One row of ``projects``."""

    id: ProjectId
    name: str
    state: State
    reason: str | None
    spec: dict[str, Any]
    source: str
    created: float
    updated: float
    finished: float | None
    last_seq: int
    spooled_seq: int
    training: dict[str, Any] | None
    rounds_done: int
    rounds_total: int
    metrics: dict[str, float] | None
    best_round: int | None
    tracking: dict[str, Any] | None
    cleaned: bool
    owner: str
    team: str | None
    request: str | None = None
    """Id of the request that set it in motion last."""

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def resting(self) -> bool:
        return self.state in RESTING


VIRTUAL = "virtual-learners"
"""In place of a learner: the virtual ones that share an agent; in a hierarchy with their cluster's number."""


@dataclass(frozen=True)
class Service:
    """A component that the project wants, or wanted until ``over`` says why not."""

    name: ServiceName
    role: str
    learner: LearnerId | None
    restarts: int = 0
    over: str | None = None
    cluster: str | None = None
    """Whose aggregator it is; None: the root's, or no aggregator."""


@dataclass(frozen=True)
class Learner:
    """A learner and the site whose data it trains on; ``number`` counts from 1."""

    learner: LearnerId
    number: int
    site: str
    state: str = "waiting"
    reason: str | None = None
    cluster: str | None = None
    node: str = ""
    """The one that holds the site's data; empty: this machine."""


@dataclass(frozen=True)
class Cluster:
    """A cluster of a hierarchy, by its path; ``number`` counts from 1, outer ones before inner ones."""

    cluster: str
    number: int
    state: str = "waiting"
    reason: str | None = None
    rounds_done: int = 0
    """Over all cycles."""


@dataclass(frozen=True)
class Deployment:
    """A model version that is served, or was until ``stopped``."""

    project: ProjectId
    model: str
    version: int
    kind: str
    """How it is loaded: ``mlflow`` or ``onnx``."""
    image: str | None
    """What runs; None: a program of this machine."""
    created: float
    stopped: bool = False


@dataclass(frozen=True)
class Model:
    """A registered version of a model; ``folder`` holds our copy of it, where there is one."""

    name: str
    version: int
    project: ProjectId
    round: int | None
    metrics: dict[str, float]
    created: float
    uri: str
    folder: str | None
