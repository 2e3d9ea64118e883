"""A synchronous training: round after round, from the first member to the chosen model.

What the root of a hierarchy does, or the only aggregator of a classic training. A round is committed before
it is announced, so a killed aggregator goes on after the last committed round and arrives at the same bits.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flops.core.clock import Clock
from flops.core.events import EventKind
from flops.federation.checkpoint import Checkpoint, Committed
from flops.federation.config import Member, Plan
from flops.federation.hub import Hub
from flops.federation.reports import Reporter
from flops.federation.roster import Roster
from flops.federation.rounds import Round, Rounds
from flops.telemetry import about, span

log = logging.getLogger(__name__)

_REASON = 300  # characters of why a member was left out that are reported


@dataclass(frozen=True)
class Outcome:
    """How a training ended well."""

    rounds: int
    best_round: int
    model_file: Path
    metrics: Mapping[str, float]


class SynchronousTraining:
    """Drives one training over a hub."""

    def __init__(
        self,
        project: str,
        plan: Plan,
        members: Mapping[str, Member],
        hub: Hub,
        checkpoint: Checkpoint,
        reporter: Reporter,
        clock: Clock,
    ) -> None:
        self._plan, self._hub, self._checkpoint = plan, hub, checkpoint
        self._reporter, self._clock = reporter, clock
        self._roster = Roster(project, plan, members, hub, reporter, clock)
        model = checkpoint.model()
        self._rounds = Rounds(
            project, plan, model.layout, checkpoint.folder, hub, self._roster, reporter, clock
        )
        self._rounds.take_over(checkpoint.committed.round, model)
        model.close()

    def run(self) -> Outcome:
        """Train to the last round.

        Raises:
            FailedError: a round fell below its quorum or could not be aggregated; says why.
        """
        committed = self._checkpoint.committed
        if self._reporter.last_round < committed.round:
            self._reporter.report(EventKind.ROUND_FINISHED, **committed.report)
        self._rounds.strategy.restore(self._checkpoint.strategy_state())
        self._rounds.slowest_s = committed.slowest_s
        self._roster.begin(committed.history, committed.ejected)
        for number in range(committed.round + 1, self._plan.rounds + 1):
            with about(round=number), span("round", round=number):
                self._round(number)
        committed = self._checkpoint.committed
        return Outcome(
            committed.round, committed.best_round, self._checkpoint.best_model(), committed.best_metrics
        )

    def close(self) -> None:
        """Give back files and memory."""
        self._rounds.close()

    def _round(self, number: int) -> None:
        rounds = self._rounds
        ready = self._roster.wait_for(number, rounds.needed)
        start = self._clock.monotonic()
        with span("fit", round=number):
            done = rounds.train(number, ready)
        with span("aggregate", round=number):
            model = rounds.aggregate(done, self._checkpoint.model_path(number))
        rounds.take_over(number, model)
        model.close()
        if self._plan.fraction_evaluate > 0:
            ready = self._roster.wait_for(number, self._plan.min_evaluate_learners)
            with span("evaluate", round=number):
                rounds.evaluate(done, ready, f"evaluate-{number}")
        before = self._checkpoint.committed
        metrics = done.metrics
        better = is_better(self._plan, metrics, before)
        data = report_of(done, rounds, self._plan, self._hub)
        data |= {"rounds": self._plan.rounds, "metrics": metrics, "best": better}
        absent = self._absent_clusters(done)
        data["left_out"] = {**absent, **data["left_out"]}
        data["duration_s"] = self._clock.monotonic() - start
        if any(member.kind == "cluster" for member in self._roster.members.values()):
            data |= {"cycle": number, "cycles": self._plan.rounds}
        committed = Committed(
            number,
            metrics,
            best_round=number if better else before.best_round,
            best_metrics=metrics if better else before.best_metrics,
            slowest_s=max(done.slowest_s, before.slowest_s or 0.0),
            history=self._roster.history.to_json(),
            ejected=self._roster.ejected,
            report=data,
        )
        self._checkpoint.commit(committed, rounds.strategy.state(), better)
        rounds.slowest_s = committed.slowest_s
        data["duration_s"] = self._clock.monotonic() - start
        self._reporter.report(EventKind.ROUND_FINISHED, **data)
        log.info("round %s is committed: %s updates, %.3f s", number, len(done.updates), data["duration_s"])

    def _absent_clusters(self, done: Round) -> dict[str, str]:
        """Clusters that were not asked, and why."""
        return {
            name: self._roster.ended.get(name) or self._roster.away.get(name) or "it never came"
            for name, member in self._roster.members.items()
            if member.kind == "cluster" and name not in done.collection.cohort
        }


def is_better(plan: Plan, metrics: Mapping[str, float], before: Committed) -> bool:
    """Whether a model with these metrics is to be kept instead of the best one so far."""
    value = metrics.get(plan.selection_metric)
    best = before.best_metrics.get(plan.selection_metric)
    if value is None or best is None:
        return value is not None or best is None  # without evaluation the last round is the one to keep
    return value > best if plan.selection_best == "max" else value < best


def report_of(done: Round, rounds: Rounds, plan: Plan, hub: Hub) -> dict[str, Any]:
    """What is told of any round."""
    data: dict[str, Any] = {
        "round": done.number,
        "participants": len(done.updates),
        "cohort": len(done.collection.cohort),
        "left_out": {name: reason[:_REASON] for name, reason in done.left_out.items()},
        "fit_s": {update.learner: round(update.fit_s, 4) for update in done.updates},
        "train_metrics": done.train_metrics,
        "bytes_down": rounds.bytes_down,
        "bytes_up": rounds.bytes_up,
    }
    if plan.learner_metrics:
        data["learners"] = _learner_metrics(done, hub)
    return data


def _learner_metrics(done: Round, hub: Hub) -> dict[str, dict[str, float]]:
    """What single learners measured: only where the spec asks for it and the data's owner allows it."""
    measured: dict[str, dict[str, float]] = {}
    for update in done.updates:
        measured.setdefault(update.learner, {}).update(update.metrics)
    for learner, (_, metrics) in (done.evaluation.results if done.evaluation else {}).items():
        measured.setdefault(learner, {}).update(metrics)

    def allows(learner: str) -> bool:
        session = hub.session(learner)
        return session is not None and session.allows_metrics

    return {learner: values for learner, values in measured.items() if allows(learner)}
