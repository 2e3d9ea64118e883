"""The roster: who takes part, who is there, who is away and since when, and who has lost the right to.

It hears everything that members say (`Roster.hear`) and keeps the books; the training that owns it decides.
"""

import logging
import math
import queue
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from flops.core.clock import Clock
from flops.core.errors import FailedError
from flops.core.events import EventKind
from flops.federation.cohorts import History
from flops.federation.config import Member, Plan
from flops.federation.hub import Hub, Said
from flops.federation.intake import finite
from flops.federation.reports import Reporter

log = logging.getLogger(__name__)

MANY = 50
"""Of more members than these, what each of them does is told once a second at most."""
RECONNECT_S = 10.0
"""How long a round waits for a member whose connection broke; longer for one that takes long to start."""
_TIMES_START, _LONGEST_RECONNECT_S, _FREE_ABSENCES = 3.0, 180.0, 3
_REASON = 500  # characters of a member's words that are kept
_FLOOD_SESSIONS, _FLOOD_S = 100, 60.0


class InterruptedByTask(Exception):
    """What is being waited for is not wanted any more."""


class Roster:
    """The members of one aggregator; used by one thread.

    Args:
        interrupted: asked while waiting; true ends the wait with `InterruptedByTask`.
    """

    def __init__(
        self,
        project: str,
        plan: Plan,
        members: Mapping[str, Member],
        hub: Hub,
        reporter: Reporter,
        clock: Clock,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._project, self._plan, self.members = project, plan, members
        self._hub, self._reporter, self._clock = hub, reporter, clock
        self._interrupted = interrupted
        self.slots = slots_of(members)
        """Each member's place among all learners: decides seeds and the order of summation."""
        self.ended: dict[str, str] = {}
        """Members whose part is over, and why; one that comes back as a new process is a member again."""
        self.away: dict[str, str] = {}
        """Members that were here and are not, and why."""
        self.history = History(members)
        self.ejected: dict[str, str] = {}
        self._gone_since: dict[str, float] = {}
        self._start_s: dict[str, float] = {}
        self._absences: dict[str, int] = {}
        self._never_seen = set(members)
        self._ends: dict[str, deque[float]] = {}
        self._start_until = math.inf

    def begin(self, history: Mapping[str, Any], ejected: Mapping[str, str]) -> None:
        """Start waiting for members; what was known of them in an earlier life still holds."""
        self._start_until = self._clock.monotonic() + self._plan.start_deadline_s
        self.history = History.from_json(self.members, history)
        for member, reason in ejected.items():
            self._eject(member, reason)

    def ready(self) -> list[str]:
        """Who can be asked now, in slot order."""
        return sorted(
            (name for name in self._hub.ready() if name not in self.ended), key=self.slots.__getitem__
        )

    @property
    def expected(self) -> int:
        """How many members may still come."""
        return len(self.members) - len(self.ended)

    def wait_for(self, round_number: int, needed: int, deadline_s: float | None = None) -> list[str]:
        """Wait for every member that may come; after the deadline go on with enough of them, or fail.

        Members that never came are waited for until the start's deadline, those that lost their connection
        for `RECONNECT_S` or longer: each absence costs its time once, not in every round.

        Raises:
            FailedError: fewer than needed.
            InterruptedByTask: see the constructor.
        """
        begin = self._clock.monotonic()
        deadline_s = self._plan.start_deadline_s if deadline_s is None else deadline_s
        told, told_at = None, -math.inf
        while True:
            self.take_notes()
            ready = self.ready()
            if len(ready) >= self.expected >= needed:
                return ready
            if self.expected < needed:
                raise FailedError(self.too_few(round_number, needed, len(ready)))
            enough = len(ready) >= needed
            until = self._worth_waiting_until()
            if not enough:
                until = max(until, begin + deadline_s)
            now = self._clock.monotonic()
            if now >= until:
                if enough:
                    return ready
                raise FailedError(self.too_few(round_number, needed, len(ready), f" after {deadline_s:g} s"))
            if told != len(ready) and (len(self.members) <= MANY or now - told_at >= 1.0):
                told, told_at = len(ready), now
                self._reporter.report(
                    EventKind.TRAINING_WAITING,
                    round=round_number,
                    connected=len(ready),
                    needed=needed,
                    expected=self.expected,
                    deadline_s=deadline_s,
                )
            self.hear(until - now)

    def _worth_waiting_until(self) -> float:
        """Until when an absent member may be expected, if there are enough others."""
        until = [since + self._patience_s(member) for member, since in self._gone_since.items()]
        if self._never_seen - self.ended.keys():
            until.append(self._start_until)
        return max(until, default=-math.inf)

    def too_few(self, round_number: int, needed: int, ready: int, when: str = "") -> str:
        """Why a round cannot go on, and what to do."""
        kinds = {member.kind for member in self.members.values()}
        what = kinds.pop() if len(kinds) == 1 else "member"
        text = (
            f"round {round_number} of project {self._project} needs {needed} "
            f"{what}{'s' if needed > 1 else ''}, {ready} {'are' if ready != 1 else 'is'} connected{when}"
        )
        why = first_of(self.ended, " ended") or first_of(self.away)
        if why:
            return text + why
        return f"{text} - lower training.min_available_learners, or see 'flops logs {self._project}'"

    @property
    def absent(self) -> set[str]:
        """Members that lost their connection, or whose part has ended."""
        return self._gone_since.keys() | self.ended.keys()

    def expected_until(self, member: str) -> float | None:
        """Until when a member that lost its connection is waited for (the clock's monotonic seconds); None
        while it is there."""
        since = self._gone_since.get(member)
        return None if since is None else since + self._patience_s(member)

    def _patience_s(self, member: str) -> float:
        # It may have been killed, and then has to start as it did before: environment, code, data. Less and
        # less, where it goes again and again without having been of use.
        start_s = min(_TIMES_START * self._start_s.get(member, 0.0), _LONGEST_RECONNECT_S)
        return max(RECONNECT_S, start_s / 2.0 ** max(0, self._absences.get(member, 0) - _FREE_ABSENCES))

    def counts(self, member: str, took_s: float) -> None:
        """An update of a member counted, so long after it was asked."""
        self.history.answer(member, took_s)
        self._absences.pop(member, None)

    # -- hearing

    def take_notes(self) -> None:
        """Hear everything that has been said already."""
        while True:
            try:
                self._note(self._hub.inbox.get_nowait())
            except queue.Empty:
                return

    def hear(self, timeout_s: float) -> Said | None:
        """Wait for the next thing that is said; None when nothing was.

        Raises:
            InterruptedByTask: see the constructor.
        """
        if self._interrupted():  # what woke us may have been heard already
            raise InterruptedByTask
        try:
            said = self._hub.inbox.get(timeout=max(0.0, min(timeout_s, 3600.0)))
        except queue.Empty:
            said = None
        if self._interrupted():
            if said is not None:
                self._note(said)
            raise InterruptedByTask
        if said is None or not said.learner:
            return None
        self._note(said)
        return said

    def _note(self, said: Said) -> None:
        member, kind = said.learner, said.kind
        if member in self.ejected or not member:
            return
        if kind == "gone":
            self._absences[member] = self._absences.get(member, 0) + 1
            if said.header.get("protocol") is True:
                self._strike(member, str(said.header.get("reason"))[:_REASON])
            self._watch_for_flood(member)
            if member in self.ejected:
                return
        if kind == "ready":
            self._gone_since.pop(member, None)
            self.ended.pop(member, None)
            self.away.pop(member, None)
            self._never_seen.discard(member)
            self._start_s[member] = finite(said.header.get("start_s")) or 0.0
            self._tell(EventKind.LEARNER_CONNECTED, EventKind.CLUSTER_CONNECTED, member)
        elif kind in ("gone", "unready") and member not in self.ended:
            reason = str(said.header.get("reason", "it gave no reason"))[:_REASON]
            self.away[member] = reason
            if kind == "gone" or member not in self._never_seen:
                self._gone_since[member] = self._clock.monotonic()
                self._tell(EventKind.LEARNER_LEFT, EventKind.CLUSTER_LEFT, member, reason=reason, final=False)
        elif kind == "failed":
            reason = str(said.header.get("message", "it gave no reason"))[:_REASON]
            again = member in self.ended  # its last word, repeated after a cut
            self.ended[member] = reason
            self._gone_since.pop(member, None)
            self._hub.send(member, {"t": "stop", "reason": "its part has ended"})
            if not again:
                where = str(said.header.get("where", ""))[:100]
                self._tell(
                    EventKind.LEARNER_LEFT,
                    EventKind.CLUSTER_LEFT,
                    member,
                    reason=reason,
                    where=where,
                    final=True,
                )

    def _tell(self, of_learner: EventKind, of_cluster: EventKind, member: str, **data: Any) -> None:
        if self.members[member].kind == "cluster":
            self._reporter.report(of_cluster, **{**data, "cluster": member})
        else:
            self._reporter.report(of_learner, **{**data, "learner": member})

    # -- what is refused

    def refuse(self, round_number: int, said: Said, reason: str, *, harmless: bool = False) -> None:
        """Tell a member that its answer does not count, and why.

        Args:
            harmless: it only came too late; only other refusals lead to ejection.
        """
        task = str(said.header.get("task"))[:80]
        self._hub.send(said.learner, {"t": "refused", "task": task, "reason": reason})
        self._reporter.report(
            EventKind.UPDATE_REFUSED,
            round=round_number,
            learner=said.learner,
            task=task,
            reason=reason,
            late=harmless,
        )
        if not harmless:
            self._strike(said.learner, reason)

    def _strike(self, member: str, reason: str) -> None:
        count = self.history.refuse(member)
        if count >= self._plan.eject_after and member not in self.ejected:
            self._eject_now(member, f"{count} of its answers were refused, the last because {reason}")

    def _watch_for_flood(self, member: str) -> None:
        ends = self._ends.setdefault(member, deque(maxlen=_FLOOD_SESSIONS))
        ends.append(self._clock.monotonic())
        if len(ends) == _FLOOD_SESSIONS and ends[-1] - ends[0] < _FLOOD_S and member not in self.ejected:
            self._eject_now(member, f"it connected {_FLOOD_SESSIONS} times in {ends[-1] - ends[0]:.0f} s")

    def _eject_now(self, member: str, reason: str) -> None:
        self._eject(member, reason)
        self._reporter.report(
            EventKind.LEARNER_EJECTED,
            learner=member,
            refusals=self.history.of(member).refusals,
            reason=reason,
        )

    def _eject(self, member: str, reason: str) -> None:
        self.ejected[member] = reason
        self.ended[member] = f"it was ejected: {reason}"
        self._gone_since.pop(member, None)
        self._hub.eject(member, reason)


def first_of(reasons: Mapping[str, str], did: str = "") -> str:
    """The first of several members' reasons, to be added to an error; empty where there are none."""
    if not reasons:
        return ""
    member, reason = min(reasons.items())
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return f"; {member}{did}: {reason}{more}"


def slots_of(members: Mapping[str, Member]) -> dict[str, int]:
    """Each member's slot: as configured, or its place by name."""
    if all(member.slot for member in members.values()):
        return {name: member.slot for name, member in members.items()}
    return {name: number for number, name in enumerate(sorted(members), start=1)}
