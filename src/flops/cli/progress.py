"""What a project's events so far add up to; knows nothing of terminals."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flops.client.events import RESTING, ProjectEvent
from flops.core.events import EventKind

_QUICKER = "enough others were quicker"
"""Why a learner of an over-sampled round is left out, in the aggregator's words."""
_OF_ONE_AGGREGATOR = frozenset(
    {
        EventKind.TRAINING_WAITING,
        EventKind.ROUND_STARTED,
        EventKind.UPDATE_RECEIVED,
        EventKind.UPDATE_REFUSED,
        EventKind.ROUND_FINISHED,
        EventKind.LEARNER_CONNECTED,
        EventKind.LEARNER_LEFT,
    }
)


@dataclass
class Step:
    """One step of preparing or packaging."""

    name: str
    started: float
    message: str = ""


@dataclass(frozen=True)
class Round:
    """One finished round."""

    number: int
    metrics: Mapping[str, Any]
    participants: int
    cohort: int
    left_out: Mapping[str, str]
    """Why, by learner: it trained too slowly, failed, or its update was refused."""
    not_needed: int
    """Of an over-sampled round: those that others were quicker than."""
    duration_s: float
    bytes_down: int | None
    bytes_up: int | None
    version: int | None = None
    """Of an asynchronous training: changes of the global model so far."""
    staleness: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ClusterRound:
    """What a cluster of a hierarchy did last."""

    number: int
    rounds: int
    """Over all cycles."""
    participants: int
    cohort: int
    duration_s: float


@dataclass
class Progress:
    """A project as far as its events tell, in order.

    Args:
        mode: hierarchical: its rounds are the cycles of a root, whose members are clusters; asynchronous:
            nobody is waited for, a round is what lies between two commits of the global model; or classic.
    """

    rounds_total: int
    mode: str = "classic"
    clusters: dict[str, ClusterRound] = field(default_factory=dict)
    ejected: set[str] = field(default_factory=set)
    state: str = "submitted"
    reason: str | None = None
    started: float | None = None
    ended: float | None = None
    """When it came to rest."""
    rested_s: float = 0.0
    running: dict[str, Step] = field(default_factory=dict)
    connected: set[str] = field(default_factory=set)
    waiting_for: int | None = None
    deadline_s: float | None = None
    cohort: int = 0
    answered: int = 0
    refused: set[str] = field(default_factory=set)
    """Learners whose update of this round was refused."""
    round: int = 0
    round_started: float | None = None
    last_round: Round | None = None
    round_seconds: float = 0.0
    rounds_seen: int = 0
    training_over: bool = False
    best_round: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] | None = None

    @property
    def unit(self) -> str:
        return "cycle" if self.mode == "hierarchical" else "round"

    @property
    def members(self) -> str:
        return "clusters" if self.mode == "hierarchical" else "learners"

    def apply(self, event: ProjectEvent) -> None:
        """Take in the next event; kinds that are not known change nothing."""
        data = event.data
        if self.started is None:
            self.started = event.time
        if "cluster" in data and event.kind in _OF_ONE_AGGREGATOR:
            return  # inside a cluster; the root's own come without
        match event.kind:
            case EventKind.PROJECT_STATE:
                self.state, self.reason = str(data.get("state")), data.get("reason")
                self._rest(event.time)
                self.rounds_total = data.get("rounds_total") or self.rounds_total
                if self.state == "deploying":  # of a project that rested, too
                    self.connected.clear()
                    self.waiting_for = self.round_started = None
                    self.training_over = False
            case EventKind.STEP_STARTED:
                self.running[str(data["step"])] = Step(str(data["step"]), event.time)
            case EventKind.STEP_PROGRESS:
                step = self.running.setdefault(str(data["step"]), Step(str(data["step"]), event.time))
                step.message = str(data.get("message", ""))
            case EventKind.STEP_FINISHED:
                self.running.pop(str(data["step"]), None)
            case EventKind.LEARNER_CONNECTED:
                self.connected.add(str(data.get("learner")))
            case EventKind.LEARNER_LEFT:
                self.connected.discard(str(data.get("learner")))
            case EventKind.LEARNER_EJECTED:
                self.ejected.add(str(data.get("learner")))
                self.connected.discard(str(data.get("learner")))
            case EventKind.CLUSTER_CONNECTED:
                self.connected.add(str(data.get("cluster")))
            case EventKind.CLUSTER_LEFT:
                self.connected.discard(str(data.get("cluster")))
            case EventKind.CLUSTER_ROUND:
                self.clusters[str(data.get("cluster"))] = ClusterRound(
                    number=int(data.get("round", 0)),
                    rounds=int(data.get("rounds") or 0),
                    participants=how_many(data.get("participants")),
                    cohort=how_many(data.get("cohort")),
                    duration_s=float(data.get("duration_s") or 0.0),
                )
            case EventKind.TRAINING_WAITING:
                self.waiting_for = data.get("expected") or data.get("needed")
                self.deadline_s = data.get("deadline_s")
            case EventKind.ROUND_STARTED:
                self.round = int(data.get("round", 0))
                self.cohort, self.answered = how_many(data.get("cohort")), 0
                self.waiting_for, self.round_started = None, event.time
                self.refused = set()
            case EventKind.UPDATE_RECEIVED:  # of many learners, not every one is told
                counted = how_many(data.get("answered")) + len(self.refused)
                self.answered = max(self.answered + 1, counted)
            case EventKind.UPDATE_REFUSED if not data.get("late"):
                self.answered += 1
                self.refused.add(str(data.get("learner")))
            case EventKind.ROUND_FINISHED:
                self._finish_round(data)
            case EventKind.TRAINING_FINISHED:
                self.training_over, self.best_round = True, data.get("best_round")
                self.metrics = data.get("metrics") or self.metrics
            case EventKind.TRAINING_FAILED:
                self.training_over = True
            case EventKind.MODEL_REGISTERED:
                self.model = data

    def _rest(self, now: float) -> None:
        if self.ended is not None:
            self.rested_s += now - self.ended
        self.ended = now if self.state in RESTING else None
        if self.state in RESTING:
            self.running.clear()

    @property
    def took_s(self) -> float | None:
        """From the submission to the rest, without earlier rests; None while the project goes on."""
        if self.started is None or self.ended is None:
            return None
        return self.ended - self.started - self.rested_s

    def _finish_round(self, data: Mapping[str, Any]) -> None:
        left_out = {
            key: text for key, text in (data.get("left_out") or {}).items() if key not in self.refused
        }
        needed = {key: text for key, text in left_out.items() if text != _QUICKER}
        self.last_round = Round(
            number=int(data.get("round", 0)),
            metrics=data.get("metrics") or {},
            participants=how_many(data.get("participants")),
            cohort=how_many(data.get("cohort")) or self.cohort,
            left_out=needed,
            not_needed=len(left_out) - len(needed),
            duration_s=float(data.get("duration_s") or 0.0),
            bytes_down=data.get("bytes_down"),
            bytes_up=data.get("bytes_up"),
            version=data.get("version"),
            staleness=data.get("staleness") or {},
        )
        self.round, self.round_started = self.last_round.number, None
        self.metrics = self.last_round.metrics or self.metrics
        self.round_seconds += self.last_round.duration_s
        self.rounds_seen += 1

    @property
    def remaining_s(self) -> float | None:
        """What the rounds still to come will take at the pace so far."""
        if not self.rounds_seen or self.last_round is None:
            return None
        left = self.rounds_total - self.last_round.number
        return left * self.round_seconds / self.rounds_seen


def how_many(value: Any) -> int:
    """Events name things one by one or count them; both are fine here."""
    if isinstance(value, int):
        return value
    return len(value) if isinstance(value, list | dict) else 0
