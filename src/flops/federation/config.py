"""What the manager hands to an aggregator and to an agent: one JSON file each, mode 600.

Secrets travel in these files only, never in arguments or environments, where other processes could read them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from flops.core.errors import InvalidInputError
from flops.telemetry import NOBODYS, Traced


class _JsonFile:
    """Reading and writing of a flat dataclass as a private JSON file."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises InvalidInputError when the file is missing or does not fit."""
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InvalidInputError(
                f"the configuration '{path}' cannot be used: {error} - it is written by the manager"
            ) from error

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)

    def write(self, path: Path) -> None:
        """Write the file atomically, readable by its owner only."""
        temporary = path.with_name(path.name + ".new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(asdict(self), file)  # type: ignore[call-overload]
        temporary.rename(path)


@dataclass(frozen=True)
class Tls:
    """PEM files of one end. A server needs ``cert`` and ``key``, and with ``ca`` lets nobody in whose
    certificate that authority has not signed; a client needs ``ca``, and the others for such a server.
    """

    cert: str | None = None
    key: str | None = None
    ca: str | None = None


@dataclass(frozen=True)
class Member:
    """A learner that may take part, and how it proves that it is this learner."""

    token: str
    max_examples: int | None = None
    """The most training examples it can claim for an update: the rows of its fragments. None: not known."""
    slot: int = 0
    """Its place among all learners of the project, from 1: decides seeds and the order of summation. 0: by
    name."""
    kind: Literal["learner", "cluster"] = "learner"
    """A cluster returns the weighted sum of its learners, in float64, instead of one learner's model."""


@dataclass(frozen=True)
class ReportTo:
    """Where an aggregator reports: the manager's Unix socket, or its URL, and the token of the project."""

    token: str
    url_path: str
    socket: str | None = None
    url: str | None = None
    """Such as ``https://10.0.0.1:40123``, from another machine; without a socket."""
    ca: str | None = None
    """File of the authority (PEM) that the manager's certificate must be signed by; with a URL."""
    upload: bool = False
    """Send the trained model along: it lies where the manager cannot read it."""

    def __post_init__(self) -> None:
        if (self.socket is None) == (self.url is None):
            raise InvalidInputError("reports go to a socket or to a URL - name one of them")
        if self.url is not None and not (self.ca and self.url.startswith("https://")):
            raise InvalidInputError(
                f"reports to '{self.url}' would not be safe - use https:// and name the manager's authority"
            )


@dataclass(frozen=True)
class Plan:
    """How to train: the part of the specification that the aggregator carries out."""

    rounds: int = 3
    strategy: str = "FedAvg"
    strategy_parameters: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    fraction_fit: float = 1.0
    fraction_evaluate: float = 1.0
    min_available_learners: int = 1
    min_fit_learners: int = 1
    min_evaluate_learners: int = 1
    quorum: int | None = None
    start_deadline_s: float = 120.0
    round_deadline_s: float | None = None
    seed: int = 0
    selection_metric: str = "loss"
    selection_best: str = "min"
    learner_metrics: bool = False
    cohort: str = "random"
    over_sample: float = 1.0
    eject_after: int = 3
    max_update_norm: float | None = None
    first_deadline_s: float = 3600.0
    """For answers, while it is not known how long they take, and the longest there is; ``round_deadline_s``
    wins."""
    cycles: int = 1
    """Of a hierarchy: what the root counts as rounds; ``rounds`` are those inside a cluster, per cycle."""
    evaluate_every_round: bool = False
    """Of a cluster: let its members also judge the model of each of its own rounds."""


@dataclass(frozen=True)
class Link:
    """Where a member of a federation connects, and as whom."""

    aggregator: str
    member: str
    """Its name among the members there."""
    token: str
    tls: Tls | None = None
    placed: bool = False
    """The aggregator is a root that measures its learners and says where each of them connects."""


@dataclass(frozen=True)
class AggregatorConfig(_JsonFile):
    """Everything one aggregator process needs to know."""

    project: str
    listen: str
    """``grpc+unix:///path`` or ``grpc+tls://host:port``."""
    members: Mapping[str, Member]
    initial_model: str
    """Path of the initial parameters (safetensors)."""
    state_dir: str
    plan: Plan = field(default_factory=Plan)
    tls: Tls | None = None
    report: ReportTo | None = None
    parent: Link | None = None
    """None: this is the root. A parent that has ``placed`` learners says which of the members are here."""
    newcomers: Mapping[str, Member] = field(default_factory=dict)
    """Learners that this root measures and places in its clusters."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """Where the clusters listen in which newcomers are placed."""
    traced: Traced = NOBODYS
    """The request that it trains for."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        parent = data.get("parent")
        return cls(
            **{
                **data,
                "parent": Link(**{**parent, "tls": Tls(**parent["tls"]) if parent.get("tls") else None})
                if parent
                else None,
                "members": {name: Member(**member) for name, member in data["members"].items()},
                "newcomers": {name: Member(**member) for name, member in data.get("newcomers", {}).items()},
                "plan": Plan(**data.get("plan", {})),
                "tls": Tls(**data["tls"]) if data.get("tls") else None,
                "report": ReportTo(**data["report"]) if data.get("report") else None,
                "traced": Traced.from_json(data.get("traced")),
            }
        )


@dataclass(frozen=True)
class DataAccess:
    """Which local data a learner trains on, and where its node serves them."""

    location: str
    token: str
    tags: tuple[str, ...]
    site: str = ""


@dataclass(frozen=True)
class VirtualLearner:
    """One of many learners that share an agent."""

    learner: str
    token: str
    seed: int = 0
    site: str = ""
    """Whose fragments are its data."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig(_JsonFile):
    """Everything one agent process needs to know."""

    project: str
    learner: str = ""
    token: str = ""
    aggregator: str
    python: str = ""
    """Interpreter of the user's environment."""
    code: str = ""
    """The checkout."""
    worker_socket: str | None = None
    """Where the learner's worker comes in from a container of its own; no interpreter is started then."""
    data: DataAccess | None = None
    tls: Tls | None = None
    threads: int | None = None
    memory_mb: int | None = None
    """Limit of the private memory of one learner's code."""
    seed: int = 0
    log: str | None = None
    """Where the user's code prints; of several workers each has its number in the name."""
    isolate: bool = True
    insist: bool = False
    """Rather no learner than one whose code has a network."""
    tally: str | None = None
    """Where what this learner did and sent is counted (`flops.federation.tally`); of one learner only."""
    placed: bool = False
    """See `Link.placed`."""
    virtual: tuple[VirtualLearner, ...] = ()
    """The learners of this agent; ``learner``, ``token``, ``seed`` and ``data.site`` say nothing then."""
    workers: int = 1
    """Processes that these learners share."""
    traced: Traced = NOBODYS
    """The request that it trains for, until a task names another."""

    def __post_init__(self) -> None:
        if self.worker_socket and (self.virtual or self.python or self.code):
            raise InvalidInputError(
                "an agent whose worker has a container of its own starts no interpreter, and has one learner"
                " - leave out virtual learners, python and code, or the worker's socket"
            )

    def learners(self) -> tuple[VirtualLearner, ...]:
        """Who takes part through this agent: the virtual learners, or the one that it is."""
        site = self.data.site if self.data else ""
        return self.virtual or (VirtualLearner(self.learner, self.token, self.seed, site),)

    def link(self, learner: VirtualLearner) -> Link:
        """Where one of the learners connects."""
        return Link(self.aggregator, learner.learner, learner.token, self.tls, self.placed)

    def of(self, learner: VirtualLearner) -> Self:
        """This configuration, for an agent of that learner alone."""
        access = replace(self.data, site=learner.site) if self.data else None
        return replace(self, learner=learner.learner, token=learner.token, seed=learner.seed, data=access)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        access = data.get("data")
        return cls(
            **{
                **data,
                "data": DataAccess(**{**access, "tags": tuple(access["tags"])}) if access else None,
                "tls": Tls(**data["tls"]) if data.get("tls") else None,
                "virtual": tuple(VirtualLearner(**learner) for learner in data.get("virtual", ())),
                "traced": Traced.from_json(data.get("traced")),
            }
        )
