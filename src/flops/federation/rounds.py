"""The round loop: one way through a training, from the first learner to the chosen model.

Every wait has a deadline and a quorum: a project with too few participants says so and fails, it never
hangs and never finishes on less than was asked for. A round is committed before it is announced, so a
killed aggregator goes on after the last committed round and arrives at the same bits.
"""

import logging
import math
import queue
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flops.core.clock import Clock
from flops.core.errors import FailedError
from flops.core.events import EventKind
from flops.federation.blocks import blocks
from flops.federation.checkpoint import Checkpoint, Committed
from flops.federation.collect import Collection, EvaluateCollection, TrainCollection
from flops.federation.config import Member, Plan
from flops.federation.flower import FlowerStrategy, layout_arrays
from flops.federation.hub import GlobalModel, Hub, Said
from flops.federation.mean import WeightedMean, weighted_metrics
from flops.federation.model_file import ModelFile, ModelWriter, as_dtype
from flops.federation.reports import Reporter
from flops.federation.strategies import NEEDS_LOSS_FIRST, Reduction
from flops.federation.updates import RefusedError, Spool, Update

log = logging.getLogger(__name__)

RECONNECT_S = 10.0
"""How long a round waits for a learner whose connection broke."""
_FIRST_ROUND_S = 3600.0
_SHORTEST_DEADLINE_S = 60.0
_TIMES_SLOWEST = 10.0
_WORTH_TELLING_S = 1.0  # single updates of quicker rounds are no news
# Without a deadline in the spec, the first round may take an hour; later ones ten times what the slowest
# accepted learner ever took, at least a minute: derived from what was measured, not another thing to set.


@dataclass(frozen=True)
class Outcome:
    """How a training ended well."""

    rounds: int
    best_round: int
    model_file: Path
    metrics: Mapping[str, float]


class RoundLoop:
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
        self._project, self._plan, self._members = project, plan, members
        self._hub, self._checkpoint, self._reporter, self._clock = hub, checkpoint, reporter, clock
        self._strategy = FlowerStrategy(
            plan.strategy,
            plan.strategy_parameters,
            fraction_fit=plan.fraction_fit,
            fraction_evaluate=plan.fraction_evaluate,
            min_fit=plan.min_fit_learners,
            min_evaluate=plan.min_evaluate_learners,
            min_available=plan.min_available_learners,
        )
        self._slots = {learner: number for number, learner in enumerate(sorted(members), start=1)}
        self._learners = {number: learner for learner, number in self._slots.items()}
        self._ended: dict[str, str] = {}
        self._gone_since: dict[str, float] = {}
        self._never_seen = set(members)
        self._start_until = math.inf
        model = checkpoint.model()
        self._layout = model.layout
        self._blocks = blocks(model.layout)
        self._take_over(checkpoint.committed.round, model)
        self._spool = Spool(checkpoint.folder)
        self._mean: WeightedMean | None = None
        self._bytes_down = self._bytes_up = 0
        self._slowest_s = 0.0

    def run(self) -> Outcome:
        """Train to the last round.

        Raises:
            FailedError: a round fell below its quorum or could not be aggregated; says why.
        """
        committed = self._checkpoint.committed
        if self._reporter.last_round < committed.round:
            self._reporter.report(EventKind.ROUND_FINISHED, **committed.report)
        self._strategy.restore(self._checkpoint.strategy_state())
        self._start_until = self._clock.monotonic() + self._plan.start_deadline_s
        for round_number in range(committed.round + 1, self._plan.rounds + 1):
            self._round(round_number)
        committed = self._checkpoint.committed
        return Outcome(
            committed.round, committed.best_round, self._checkpoint.best_model(), committed.best_metrics
        )

    def close(self) -> None:
        """Give back files and memory."""
        self._spool.close()
        self._mean = None

    def _take_over(self, version: int, model: ModelFile) -> None:
        self._model = GlobalModel(version, model.body, self._blocks)
        model.close()

    # -- who is there

    def _needed(self) -> int:
        plan = self._plan
        evaluate = plan.min_evaluate_learners if plan.fraction_evaluate > 0 else 0
        return max(plan.min_available_learners, plan.min_fit_learners, evaluate, self._quorum())

    def _quorum(self) -> int:
        return self._plan.quorum or self._plan.min_fit_learners

    def _wait_for_learners(self, round_number: int, needed: int) -> list[str]:
        """Wait for every learner that may come; after the deadline go on with enough of them, or fail.

        Learners that never came are waited for until the start's deadline, those that lost their connection
        for `RECONNECT_S`: each absence costs its time once, not in every round.
        """
        begin = self._clock.monotonic()
        deadline_s = self._plan.start_deadline_s
        told = None
        while True:
            self._take_notes()
            ready = [learner for learner in self._hub.ready() if learner not in self._ended]
            expected = len(self._members) - len(self._ended)
            if len(ready) >= expected >= needed:
                return ready
            if expected < needed:
                raise FailedError(self._too_few(round_number, needed, len(ready)))
            enough = len(ready) >= needed
            until = self._worth_waiting_until() if enough else begin + deadline_s
            now = self._clock.monotonic()
            if now >= until:
                if enough:
                    return ready
                raise FailedError(self._too_few(round_number, needed, len(ready), f" after {deadline_s:g} s"))
            if told != len(ready):
                told = len(ready)
                self._reporter.report(
                    EventKind.TRAINING_WAITING,
                    round=round_number,
                    connected=len(ready),
                    needed=needed,
                    expected=expected,
                    deadline_s=deadline_s,
                )
            self._wait(until - now)

    def _worth_waiting_until(self) -> float:
        """Until when an absent learner may be expected, if there are enough others."""
        until = [since + RECONNECT_S for since in self._gone_since.values()]
        if self._never_seen - self._ended.keys():
            until.append(self._start_until)
        return max(until, default=-math.inf)

    def _too_few(self, round_number: int, needed: int, ready: int, when: str = "") -> str:
        text = (
            f"round {round_number} of project {self._project} needs {needed} "
            f"learner{'s' if needed > 1 else ''}, {ready} {'are' if ready != 1 else 'is'} connected{when}"
        )
        for learner, reason in sorted(self._ended.items())[:1]:
            more = f" (and {len(self._ended) - 1} more)" if len(self._ended) > 1 else ""
            return f"{text}; {learner} ended: {reason}{more}"
        return f"{text} - lower training.min_available_learners, or see 'flops logs {self._project}'"

    def _take_notes(self) -> None:
        while True:
            try:
                self._note(self._hub.inbox.get_nowait())
            except queue.Empty:
                return

    def _wait(self, timeout_s: float) -> Said | None:
        try:
            said = self._hub.inbox.get(timeout=max(0.0, min(timeout_s, 3600.0)))
        except queue.Empty:
            return None
        self._note(said)
        return said

    def _note(self, said: Said) -> None:
        """Keep the books of who is there."""
        if said.kind == "ready":
            self._gone_since.pop(said.learner, None)
            self._ended.pop(said.learner, None)
            self._never_seen.discard(said.learner)
            self._reporter.report(EventKind.LEARNER_CONNECTED, learner=said.learner)
        elif said.kind == "gone" and said.learner not in self._ended:
            self._gone_since[said.learner] = self._clock.monotonic()
            self._reporter.report(
                EventKind.LEARNER_LEFT, learner=said.learner, reason=said.header["reason"], final=False
            )
        elif said.kind == "failed":
            reason = str(said.header.get("message", "it gave no reason"))[:2000]
            again = said.learner in self._ended  # its last word, repeated after a cut
            self._ended[said.learner] = reason
            self._gone_since.pop(said.learner, None)
            self._hub.send(said.learner, {"t": "stop", "reason": "its part has ended"})
            if again:
                return
            self._reporter.report(
                EventKind.LEARNER_LEFT,
                learner=said.learner,
                reason=reason,
                where=str(said.header.get("where", ""))[:100],
                final=True,
            )

    # -- one round

    def _round(self, round_number: int) -> None:
        ready = self._wait_for_learners(round_number, self._needed())
        start = self._clock.monotonic()
        self._bytes_down = self._bytes_up = 0
        self._slowest_s = 0.0
        updates, collection, train_metrics = self._train(round_number, ready)
        self._take_over(round_number, self._aggregate(round_number, updates, train_metrics))
        evaluation = self._evaluate(round_number) if self._plan.fraction_evaluate > 0 else None
        metrics = weighted_metrics(evaluation.in_order()) if evaluation else {}
        before = self._checkpoint.committed
        better = self._is_better(metrics, before)
        left_out = {**collection.left_out, **(evaluation.left_out if evaluation else {})}
        data: dict[str, Any] = {
            "round": round_number,
            "rounds": self._plan.rounds,
            "participants": len(updates),
            "cohort": len(collection.cohort),
            "left_out": left_out,
            "fit_s": {update.learner: round(update.fit_s, 4) for update in updates},
            "train_metrics": train_metrics,
            "metrics": metrics,
            "best": better,
            "duration_s": self._clock.monotonic() - start,
            "bytes_down": self._bytes_down,
            "bytes_up": self._bytes_up,
        }
        shown = self._learner_metrics(updates, evaluation)
        if shown:
            data["learners"] = shown
        committed = Committed(
            round_number,
            metrics,
            best_round=round_number if better else before.best_round,
            best_metrics=metrics if better else before.best_metrics,
            slowest_s=max(self._slowest_s, before.slowest_s or 0.0),
            report=data,
        )
        self._checkpoint.commit(committed, self._strategy.state(), better)
        data["duration_s"] = self._clock.monotonic() - start
        self._reporter.report(EventKind.ROUND_FINISHED, **data)

    def _is_better(self, metrics: Mapping[str, float], before: Committed) -> bool:
        value = metrics.get(self._plan.selection_metric)
        best = before.best_metrics.get(self._plan.selection_metric)
        if value is None or best is None:
            return value is not None or best is None  # without evaluation the last round is the one to keep
        return value > best if self._plan.selection_best == "max" else value < best

    def _learner_metrics(
        self, updates: list[Update], evaluation: EvaluateCollection | None
    ) -> dict[str, dict[str, float]]:
        """What single learners measured: only where the spec asks for it and the data's owner allows it."""
        if not self._plan.learner_metrics:
            return {}
        shown: dict[str, dict[str, float]] = {}
        for update in updates:
            shown.setdefault(update.learner, {}).update(update.metrics)
        for learner, (_, metrics) in (evaluation.results if evaluation else {}).items():
            shown.setdefault(learner, {}).update(metrics)
        return {name: values for name, values in shown.items() if self._allows_metrics(name)}

    def _allows_metrics(self, learner: str) -> bool:
        session = self._hub.session(learner)
        return session is not None and session.allows_metrics

    def _configure(self, phase: str, round_number: int, ready: list[str]) -> dict[str, dict[str, Any]]:
        nodes = [self._slots[learner] for learner in ready]
        configured = self._strategy.configure(
            phase,
            round_number,
            self._plan.seed,
            nodes,
            lambda: layout_arrays(self._layout, self._model.body),
        )
        return {self._learners[node]: config for node, config in sorted(configured.items())}

    def _train(
        self, round_number: int, ready: list[str]
    ) -> tuple[list[Update], TrainCollection, dict[str, float]]:
        cohort = self._configure("train", round_number, ready)
        streamed = self._strategy.reduction in (Reduction.MEAN, Reduction.OPTIMISER)
        if streamed:
            if self._mean is None:
                self._mean = WeightedMean(self._blocks)
            self._mean.reset()
        updates: list[Update] = []
        start = self._clock.monotonic()

        def take(update: Update) -> None:
            updates.append(update)
            self._bytes_up += update.nbytes
            if self._clock.monotonic() - start > _WORTH_TELLING_S:
                self._reporter.report(
                    EventKind.UPDATE_RECEIVED,
                    round=round_number,
                    learner=update.learner,
                    bytes=update.nbytes,
                    fit_s=round(update.fit_s, 4),
                )
            if streamed and self._mean is not None:
                self._mean.fold(update.body, float(update.num_examples))
                update.body.release()

        collection = TrainCollection(
            f"train-{round_number}",
            list(cohort),
            layout=self._layout,
            blocks=self._blocks,
            spool=self._spool,
            post=self._hub,
            max_examples={name: member.max_examples for name, member in self._members.items()},
            take=take,
        )
        self._reporter.report(EventKind.ROUND_STARTED, round=round_number, cohort=len(cohort))
        try:
            self._collect("train", round_number, collection, cohort, self._quorum())
        except BaseException:
            collection.close()
            raise
        metrics = weighted_metrics([(float(update.num_examples), dict(update.metrics)) for update in updates])
        return updates, collection, metrics

    def _evaluate(self, round_number: int) -> EvaluateCollection:
        ready = self._wait_for_learners(round_number, self._plan.min_evaluate_learners)
        cohort = self._configure("evaluate", round_number, ready)
        collection = EvaluateCollection(f"evaluate-{round_number}", list(cohort))
        self._collect("evaluate", round_number, collection, cohort, self._plan.min_evaluate_learners)
        return collection

    def _ask(self, phase: str, round_number: int, learner: str, config: dict[str, Any]) -> None:
        if phase == "train" and self._strategy.name in NEEDS_LOSS_FIRST:
            config = {**config, "flops-evaluate-first": True}
        header = {
            "t": phase,
            "task": f"{phase}-{round_number}",
            "round": round_number,
            "version": self._model.version,
            "config": config,
            "seed": learner_seed(self._plan.seed, self._slots[learner], round_number),
        }
        if self._hub.send(learner, header, self._model):
            self._bytes_down += self._layout.nbytes

    def _deadline_s(self) -> float:
        if self._plan.round_deadline_s is not None:
            return self._plan.round_deadline_s
        slowest = self._checkpoint.committed.slowest_s
        return _FIRST_ROUND_S if slowest is None else max(_SHORTEST_DEADLINE_S, _TIMES_SLOWEST * slowest)

    def _collect(
        self,
        phase: str,
        round_number: int,
        collection: TrainCollection | EvaluateCollection,
        cohort: Mapping[str, dict[str, Any]],
        quorum: int,
    ) -> None:
        """Ask the cohort and wait until all have answered, or the deadline, or the quorum is out of reach."""
        for learner, config in cohort.items():
            self._ask(phase, round_number, learner, config)
        limit_s = self._deadline_s()
        start = self._clock.monotonic()
        deadline = start + limit_s
        while not collection.done and collection.can_reach(quorum):
            now = self._clock.monotonic()
            if now >= deadline:
                # An update that was announced in time may still travel: its learner kept the deadline.
                travelling = collection.announced if isinstance(collection, TrainCollection) else set()
                for learner in sorted(collection.outstanding - travelling):
                    collection.leave_out(learner, f"it did not answer within {limit_s:g} s")
                if now >= deadline + limit_s:
                    for learner in sorted(collection.outstanding):
                        collection.leave_out(learner, f"its update did not arrive within {2 * limit_s:g} s")
                wait_until = deadline + limit_s
            else:
                wait_until = deadline
            wait_until = min(wait_until, self._give_up_on_the_gone(collection))
            if isinstance(collection, TrainCollection):
                wait_until = min(wait_until, collection.hand_slots_on(now))
            if not collection.done:
                said = self._wait(wait_until - now)
                if said is not None:
                    answered = collection.answered
                    self._hear(phase, round_number, collection, cohort, said)
                    if collection.answered > answered:
                        self._slowest_s = max(self._slowest_s, self._clock.monotonic() - start)
        if collection.answered < quorum:
            raise FailedError(self._below_quorum(phase, round_number, collection, quorum))

    def _give_up_on_the_gone(self, collection: Collection) -> float:
        """Leave out who has been away for too long; returns when to look again."""
        now, next_look = self._clock.monotonic(), math.inf
        for learner in sorted(collection.outstanding):
            since = self._gone_since.get(learner)
            if since is None:
                continue
            if now - since >= RECONNECT_S:
                collection.leave_out(learner, f"its connection was lost for {RECONNECT_S:g} s")
            else:
                next_look = min(next_look, since + RECONNECT_S)
        return next_look

    def _hear(
        self,
        phase: str,
        round_number: int,
        collection: TrainCollection | EvaluateCollection,
        cohort: Mapping[str, dict[str, Any]],
        said: Said,
    ) -> None:
        learner = said.learner
        if said.kind in ("result", "evaluated"):
            try:
                collection.answer(said)
            except RefusedError as error:
                self._refuse(round_number, said, str(error))
        elif said.kind == "uploaded" and isinstance(collection, TrainCollection):
            if said.header["task"] == collection.task:
                collection.uploaded(learner)
        elif said.kind == "upload-refused" and said.header["task"] == collection.task:
            collection.leave_out(learner, str(said.header["reason"]))
            self._refuse(round_number, said, str(said.header["reason"]))
        elif said.kind == "failed":
            collection.leave_out(learner, self._ended[learner])
        elif said.kind == "ready" and learner in collection.outstanding:
            self._ask(phase, round_number, learner, cohort[learner])
        elif said.kind == "gone" and isinstance(collection, TrainCollection):
            collection.restart_upload(learner)

    def _refuse(self, round_number: int, said: Said, reason: str) -> None:
        task = str(said.header.get("task"))[:80]
        self._hub.send(said.learner, {"t": "refused", "task": task, "reason": reason})
        self._reporter.report(
            EventKind.UPDATE_REFUSED, round=round_number, learner=said.learner, task=task, reason=reason
        )

    def _below_quorum(self, phase: str, round_number: int, collection: Collection, quorum: int) -> str:
        what = "update" if phase == "train" else "evaluation"
        what = what if quorum == 1 else what + "s"
        text = (
            f"round {round_number} of project {self._project} needs {quorum} {what}, "
            f"{collection.answered} of {len(collection.cohort)} learners returned a usable one"
        )
        for learner, reason in sorted(collection.left_out.items())[:1]:
            more = f" (and {len(collection.left_out) - 1} more)" if len(collection.left_out) > 1 else ""
            text += f"; {learner}: {reason}{more}"
        return text

    def _aggregate(self, round_number: int, updates: list[Update], metrics: Mapping[str, float]) -> ModelFile:
        """The new global model, written where its commit will find it."""
        writer = ModelWriter(self._layout, self._checkpoint.model_path(round_number))
        try:
            self._write_model(round_number, updates, metrics, writer)
            return writer.finish()
        except BaseException:
            writer.discard()
            raise
        finally:
            for update in updates:
                update.body.release()

    def _write_model(
        self, round_number: int, updates: list[Update], metrics: Mapping[str, float], writer: ModelWriter
    ) -> None:
        reduction, strategy = self._strategy.reduction, self._strategy
        numbered = [(self._slots[update.learner], update) for update in updates]
        if reduction is Reduction.BLOCKS:
            for block, values in strategy.apply_blocks(round_number, self._blocks, numbered):
                writer.write(block.offset, _bytes_of(values, block.dtype))
            return
        if reduction is Reduction.ALL:
            keys = [tensor.key for tensor in self._layout.tensors]
            arrays = strategy.apply_all(round_number, keys, numbered)
        else:
            assert self._mean is not None
            if reduction is Reduction.MEAN:
                for block, values in self._mean.result():
                    writer.write(block.offset, _bytes_of(values, block.dtype))
                return
            flat = bytearray(self._layout.nbytes)
            for block, values in self._mean.result():
                flat[block.offset : block.end] = _bytes_of(values, block.dtype)
            mean = layout_arrays(self._layout, flat)
            arrays = strategy.apply_mean(round_number, mean, metrics, self._mean.total_weight)
        for tensor, array in zip(self._layout.tensors, arrays, strict=True):
            if array.shape != tensor.shape:
                raise FailedError(f"strategy {strategy.name} changed the shape of array {tensor.key}")
            if not np.isfinite(array).all():
                raise FailedError(
                    f"strategy {strategy.name} made a model with NaN or infinite values in round "
                    f"{round_number} - lower its learning rate"
                )
            if tensor.nbytes:
                writer.write(tensor.offset, _bytes_of(array, tensor.numpy_dtype))


def learner_seed(seed: int, slot: int, round_number: int) -> int:
    """The seed of one learner's round: the same after any restart, different for any two of them."""
    return int(np.random.SeedSequence([abs(seed), slot, round_number]).generate_state(1)[0])


def _bytes_of(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> Any:
    return as_dtype(values, dtype).reshape(-1).view(np.uint8).data
