"""Faults: what is done to a running project, one at a time, in an order that follows from a seed.

The seed decides kinds, targets and pauses; what it hits at which instant is up to the machine.
"""

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flops.core.errors import FlopsError
from tests.chaos.home import Home
from tests.chaos.processes import Process, connections, kill, processes, send

Action = Literal["kill", "cut", "freeze"]

_ACTIONS: dict[Action, float] = {"kill": 0.72, "cut": 0.18, "freeze": 0.10}
_WEIGHTS = {
    "manager": 1.0,
    "aggregator": 1.4,
    "cluster": 1.2,
    "agent": 1.2,
    "worker": 1.2,
    "data": 0.6,
    "recorder": 0.6,
    "step": 0.6,
    "step-child": 0.3,
}
_FROZEN_S = (0.2, 3.0)
_MANAGER_AWAY_S = (0.0, 1.5)
"""How long after its death the user's next command comes, which starts the manager again."""
_REPORTS_OPEN_S = 0.5
_ALONE, _LONGEST_RECOVERY_S = 0.8, 30.0
_FAULTS_BESIDE_TRAINING = 4
"""In each other state of a project."""


@dataclass
class Fault:
    """One fault that was inflicted."""

    number: int
    time: float
    project: str
    state: str
    rounds: int
    action: Action
    target: str
    service: str
    pid: int

    def __str__(self) -> str:
        where = f"{self.project} {self.state}, {self.rounds} rounds"
        return f"{self.number:4d}  {self.action:6s} {self.target:18s} {self.service:26s} {where}"


@dataclass
class Record:
    """Everything that was done, and how the manager came back."""

    faults: list[Fault] = field(default_factory=list)
    manager_starts_s: list[float] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(fault.action == "kill" for fault in self.faults)

    def counts(self) -> dict[str, Any]:
        by: dict[str, Counter[str]] = {"kill": Counter(), "cut": Counter(), "freeze": Counter()}
        states: Counter[str] = Counter()
        for fault in self.faults:
            by[fault.action][fault.target] += 1
            states[fault.state] += 1
        return {
            "kills": self.kills,
            "kills_by_kind": dict(sorted(by["kill"].items())),
            "cuts_by_kind": dict(sorted(by["cut"].items())),
            "freezes_by_kind": dict(sorted(by["freeze"].items())),
            "faults_by_state": dict(sorted(states.items())),
        }

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(fault) for fault in self.faults]


class Chaos:
    """Disturbs one project until it is over, or until enough was killed.

    Args:
        pause_s: mean of the exponentially distributed pauses between two faults.
        say: is given one line for each fault.
    """

    def __init__(
        self, home: Home, record: Record, rng: random.Random, pause_s: float, say: Callable[[str], None]
    ) -> None:
        self._home, self._record, self._rng, self._pause_s, self._say = home, record, rng, pause_s, say
        self._coming: threading.Thread | None = None

    def disturb(self, project: str, *, kills: int, timeout_s: float) -> None:
        """Inflict faults until ``kills`` processes of this project were killed, then let it come to its end.

        Raises:
            TimeoutError: it does not end.
        """
        deadline = time.monotonic() + timeout_s
        until = self._record.kills + kills
        try:
            self._disturb(project, until, deadline, timeout_s)
        finally:
            if self._coming is not None:
                self._coming.join()

    def _disturb(self, project: str, until: int, deadline: float, timeout_s: float) -> None:
        while not self._home.over(project):
            if time.monotonic() > deadline:
                raise TimeoutError(f"project {project} is {self._home.state(project)} after {timeout_s:g} s")
            if self._rng.random() < _ALONE:
                self._wait_for_a_round(project)
            time.sleep(min(5.0, self._rng.expovariate(1 / self._pause_s)))
            state = self._home.state(project)[0]
            if self._record.kills < until and self._patience(project, state):
                self._inflict(project)
            if self._home.manager_pid() is None and (self._coming is None or not self._coming.is_alive()):
                # Others may die while the manager is away.
                self._coming = threading.Thread(target=self._start_manager)
                self._coming.start()

    def _wait_for_a_round(self, project: str) -> None:
        """Most faults come alone: what was hit has come back, and rounds go on."""
        if self._home.state(project)[0] != "training" or not self._record.faults:
            return
        last = self._record.faults[-1].time
        until = time.monotonic() + _LONGEST_RECOVERY_S
        while time.monotonic() < until and self._home.manager_pid() is not None:
            sql = "select max(time) from events where project = ? and kind = 'round.finished'"
            ((when,),) = self._home.query(sql, project)
            if (when or 0.0) > last or self._home.over(project):
                return
            time.sleep(0.1)

    def _patience(self, project: str, state: str) -> bool:
        """Steps begin again from their start, and would never come to their end at the pace of rounds."""
        before = sum((fault.project, fault.state) == (project, state) for fault in self._record.faults)
        return state == "training" or before < _FAULTS_BESIDE_TRAINING

    def _start_manager(self) -> None:
        time.sleep(random.uniform(*_MANAGER_AWAY_S))
        self._home.reap()
        start = time.monotonic()
        try:
            self._home.client().close()
        except FlopsError:  # it was killed again before it answered: the user's next command tries again
            return
        self._record.manager_starts_s.append(time.monotonic() - start)

    def _inflict(self, project: str) -> None:
        action = self._choose(_ACTIONS)
        running = processes(self._home)
        if action == "cut":
            self._cut(project, running)
            return
        by_kind: dict[str, list[Process]] = {}
        for process in running:
            by_kind.setdefault(process.kind, []).append(process)
        # What was hit least comes first, so that few kills too reach every kind.
        hit = Counter(fault.target for fault in self._record.faults if fault.action == "kill")
        weights = {kind: _WEIGHTS[kind] / (1 + hit[kind]) ** 3 for kind in by_kind if kind in _WEIGHTS}
        if not weights or self._home.over(project):
            return
        victim = self._rng.choice(sorted(by_kind[self._choose(weights)], key=lambda one: one.pid))
        fault = self._fault(project, action, victim.kind, victim)
        if action == "kill":
            done = kill(victim)
        else:
            done = send(victim, signal.SIGSTOP)
            if done:
                time.sleep(self._rng.uniform(*_FROZEN_S))
                send(victim, signal.SIGCONT)
        if done:
            self._note(fault)

    def _cut(self, project: str, running: list[Process]) -> None:
        end = time.monotonic() + _REPORTS_OPEN_S
        wanted = self._rng.choice(("agent-aggregator", "agent-data", "aggregator-manager", "agent-worker"))
        while True:  # some connections are short: look for one that is open now
            late = time.monotonic() > end
            found = [one for one in connections(self._home, running) if late or one.kind == wanted]
            if found:
                found.sort(key=lambda one: (one.process.pid, one.fd))
                target = self._rng.choice(found)
                fault = self._fault(project, "cut", target.kind, target.process)
                if target.cut():
                    self._note(fault)
                    return
            if late:
                return
            time.sleep(0.002)

    def _fault(self, project: str, action: Action, target: str, process: Process) -> Fault:
        state, _ = self._home.state(project)
        ((rounds,),) = self._home.query("select rounds_done from projects where id = ?", project)
        return Fault(
            number=len(self._record.faults) + 1,
            time=time.time(),
            project=project,
            state=state,
            rounds=rounds,
            action=action,
            target=target,
            service=process.service,
            pid=process.pid,
        )

    def _note(self, fault: Fault) -> None:
        self._record.faults.append(fault)
        self._say(str(fault))

    def _choose(self, weights: dict[Any, float]) -> Any:
        kinds = sorted(weights)
        return self._rng.choices(kinds, [weights[kind] for kind in kinds])[0]


def recoveries(home: Home, record: Record, project: str) -> Iterator[tuple[float, bool]]:
    """For each kill of the aggregator while it trained: seconds until the next round was begun or finished,
    and whether nothing else was done meanwhile.
    """
    events = home.events(project, "round.started", "round.finished")
    rounds = [event["time"] for event in events if not event.get("cluster")]
    mine = [fault for fault in record.faults if fault.project == project]
    for number, fault in enumerate(mine):
        if (fault.action, fault.target, fault.state) != ("kill", "aggregator", "training"):
            continue
        following = min((when for when in rounds if when > fault.time), default=None)
        if following is not None:
            alone = all(other.time > following for other in mine[number + 1 :]) and (
                number == 0 or fault.time - mine[number - 1].time > 3.0
            )
            yield following - fault.time, alone
