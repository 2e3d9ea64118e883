"""A project as far as its events tell: stages, steps, rounds, what each learner and cluster did.

Pictures are kept between requests and take in new events only, so a page costs the same after ten rounds as
after ten thousand. They are shared by viewers; whether somebody may see one is asked of the API each time.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flops.core.events import EventKind
from flops.web.call import Api
from flops.web.words import how_many

RESTING = frozenset({"finished", "failed", "stopped", "paused"})
STAGES = ("submitted", "preparing", "deploying", "training", "packaging", "finished")
_QUICKER = "enough others were quicker"
_BATCH = 5000
_MOST_EVENTS = 2000
_MOST_ROUNDS = 20_000
_MOST_PICTURES = 64


@dataclass
class Step:
    """One step of preparing or packaging."""

    name: str
    started: float
    message: str = ""
    duration_s: float | None = None
    """None: it is under way, or was given up."""


@dataclass(frozen=True)
class Round:
    """One finished round of the project's root; of a hierarchy: a cycle."""

    number: int
    time: float
    metrics: Mapping[str, Any]
    participants: int
    cohort: int
    left_out: Mapping[str, str]
    duration_s: float
    bytes_down: int
    bytes_up: int
    version: int | None
    staleness: Mapping[str, Any]


@dataclass
class Member:
    """What a learner or a cluster did so far."""

    took_part: int = 0
    left_out: int = 0
    refused: int = 0
    remark: str = ""
    """Why it was left out or refused last."""
    fit_s: float | None = None
    connected_at: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    round: int = 0
    duration_s: float | None = None


@dataclass
class Picture:
    """Takes in events in order, each once."""

    seq: int = 0
    state: str = "submitted"
    reason: str | None = None
    turns: list[tuple[str, float]] = field(default_factory=list)
    """States with the time of their beginning."""
    steps: dict[str, Step] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    members: dict[str, Member] = field(default_factory=dict)
    waiting: Mapping[str, Any] | None = None
    round: int = 0
    round_started: float | None = None
    cohort: int = 0
    answered: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    warnings: list[str] = field(default_factory=list)
    formed: Mapping[str, Any] = field(default_factory=dict)
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_MOST_EVENTS))
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def refresh(self, api: Api, project: str) -> None:
        """Take in what has happened since."""
        async with self.lock:
            while True:
                found = await api.get("projects", project, "events", after=self.seq, limit=_BATCH)
                for event in found["events"]:
                    self.apply(event)
                if len(found["events"]) < _BATCH:
                    return

    def member(self, name: object) -> Member:
        return self.members.setdefault(str(name), Member())

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in one event; kinds that are not known are kept for the list and change nothing."""
        if event["seq"] <= self.seq:
            return
        self.seq = event["seq"]
        self.events.append(dict(event))
        data, moment, kind = event["data"], float(event["time"]), event["kind"]
        inner = "cluster" in data
        match kind:
            case EventKind.PROJECT_STATE:
                self._turn(str(data.get("state")), data.get("reason"), moment)
            case EventKind.STEP_STARTED:
                self.steps[str(data["step"])] = Step(str(data["step"]), moment)
            case EventKind.STEP_PROGRESS:
                self._step(data, moment).message = str(data.get("message", ""))[:300]
            case EventKind.STEP_FINISHED:
                self._step(data, moment).duration_s = float(data.get("duration_s") or 0.0)
            case EventKind.WARNING:
                self.warnings = [*self.warnings[-19:], str(data.get("message", ""))]
            case EventKind.CLUSTERS_FORMED:
                self.formed = data
            case EventKind.LEARNER_CONNECTED:
                self.member(data.get("learner")).connected_at = moment
            case EventKind.CLUSTER_CONNECTED:
                self.member(data.get("cluster")).connected_at = moment
            case EventKind.LEARNER_LEFT | EventKind.LEARNER_EJECTED:
                self.member(data.get("learner")).connected_at = None
            case EventKind.TRAINING_WAITING if not inner:
                self.waiting = data
            case EventKind.ROUND_STARTED if not inner:
                self.round, self.round_started = int(data.get("round", 0)), moment
                self.cohort, self.answered, self.waiting = how_many(data.get("cohort")), 0, None
            case EventKind.UPDATE_RECEIVED if not inner:
                self.answered = max(self.answered + 1, how_many(data.get("answered")))
            case EventKind.UPDATE_REFUSED:
                refused = self.member(data.get("learner"))
                refused.refused += 1
                refused.remark = str(data.get("reason", ""))[:300]
            case EventKind.ROUND_FINISHED if not inner:
                self._finish_round(data, moment)
            case EventKind.CLUSTER_ROUND:
                self._cluster_round(data)

    def _turn(self, state: str, reason: Any, moment: float) -> None:
        self.state, self.reason = state, None if reason is None else str(reason)
        self.turns = [*self.turns[-99:], (state, moment)]
        self.round_started = self.waiting = None

    def _step(self, data: Mapping[str, Any], moment: float) -> Step:
        name = str(data["step"])
        return self.steps.setdefault(name, Step(name, moment))

    def _finish_round(self, data: Mapping[str, Any], moment: float) -> None:
        done = Round(
            number=int(data.get("round", 0)),
            time=moment,
            metrics=data.get("metrics") or {},
            participants=how_many(data.get("participants")),
            cohort=how_many(data.get("cohort")) or self.cohort,
            left_out={
                str(name): str(text)
                for name, text in (data.get("left_out") or {}).items()
                if text != _QUICKER
            },
            duration_s=float(data.get("duration_s") or 0.0),
            bytes_down=int(data.get("bytes_down") or 0),
            bytes_up=int(data.get("bytes_up") or 0),
            version=data.get("version"),
            staleness=data.get("staleness") or {},
        )
        # A round that was lost with its aggregator is done again.
        while self.rounds and self.rounds[-1].number >= done.number:
            self.rounds.pop()
        self.rounds.append(done)
        del self.rounds[:-_MOST_ROUNDS]
        self.round, self.round_started = done.number, None
        self.bytes_down += done.bytes_down
        self.bytes_up += done.bytes_up
        self._took_part(data)

    def _cluster_round(self, data: Mapping[str, Any]) -> None:
        cluster = self.member(data.get("cluster"))
        cluster.round = int(data.get("round", 0))
        cluster.duration_s = float(data.get("duration_s") or 0.0)
        down, up = int(data.get("bytes_down") or 0), int(data.get("bytes_up") or 0)
        cluster.bytes_down += down
        cluster.bytes_up += up
        self.bytes_down += down
        self.bytes_up += up
        self._took_part(data)

    def _took_part(self, data: Mapping[str, Any]) -> None:
        for name, seconds in (data.get("fit_s") or {}).items():
            member = self.member(name)
            member.took_part += 1
            member.fit_s = float(seconds)
        for name, text in (data.get("left_out") or {}).items():
            if text != _QUICKER:
                member = self.member(name)
                member.left_out += 1
                member.remark = str(text)[:300]

    @property
    def last_round(self) -> Round | None:
        return self.rounds[-1] if self.rounds else None

    def remaining_s(self, rounds_total: int) -> float | None:
        """What the rounds still to come will take at the pace of the last ones."""
        recent = self.rounds[-10:]
        if not recent or self.state != "training":
            return None
        pace = sum(done.duration_s for done in recent) / len(recent)
        return max(0, rounds_total - recent[-1].number) * pace

    def stages(self, now: float) -> list[dict[str, Any]]:
        """The way from submission to the end: each stage with its state and the time spent in it."""
        spent: dict[str, float] = {}
        for (state, begun), (_, ended) in zip(self.turns, [*self.turns[1:], ("", now)], strict=False):
            spent[state] = spent.get(state, 0.0) + ended - begun
        passed = [state for state, _ in self.turns if state in STAGES]
        last = passed[-1] if passed else "submitted"
        at = STAGES.index(last)
        found = []
        for index, name in enumerate(STAGES):
            if index < at or self.state == "finished":
                state = "done"
            elif index > at:
                state = "pending"
            else:
                state = {"failed": "failed", "stopped": "stopped", "stopping": "stopped"}.get(self.state, "")
                state = state or ("paused" if self.state in ("paused", "pausing") else "current")
            length = spent.get(name) if name != "finished" else None
            found.append({"name": name, "state": state, "spent_s": length})
        return found

    @property
    def took_s(self) -> float | None:
        """From the submission to the rest, without the rests before; None while it goes on."""
        if not self.turns or self.state not in RESTING:
            return None
        spans = zip(self.turns, self.turns[1:], strict=False)
        return sum(ended - begun for (state, begun), (_, ended) in spans if state not in RESTING)


class Pictures:
    """The pictures of the projects looked at last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Picture] = OrderedDict()

    async def of(self, api: Api, project: str) -> Picture:
        """Up to date. Raises: RefusedError: there is no such project for this person."""
        picture = self._kept.get(project) or Picture()
        await picture.refresh(api, project)
        self._kept[project] = picture
        self._kept.move_to_end(project)
        while len(self._kept) > _MOST_PICTURES:
            self._kept.popitem(last=False)
        return picture
