"""One synchronous round: ask a cohort, collect its updates with a deadline and a quorum, make the next model.

The same for a root and for a cluster. A round never waits without end and never counts on less than was asked
for; what it makes of the same cohort's updates does not depend on the order in which they arrive.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flops.core.clock import Clock
from flops.core.errors import FailedError
from flops.core.events import EventKind
from flops.federation.blocks import blocks
from flops.federation.cohorts import choose, cohort_size
from flops.federation.collect import Collection, EvaluateCollection, TrainCollection
from flops.federation.config import Plan
from flops.federation.flower import FlowerStrategy, layout_arrays
from flops.federation.hub import GlobalModel, Hub, Said
from flops.federation.intake import MAX_EXAMPLES, NormGate
from flops.federation.mean import WeightedMean, sum_layout, weighted_metrics
from flops.federation.model_file import ModelFile, ModelWriter, as_dtype
from flops.federation.reports import Reporter
from flops.federation.roster import MANY, Roster, first_of
from flops.federation.strategies import NEEDS_LOSS_FIRST, Reduction
from flops.federation.updates import LateError, RefusedError, Spool, Update
from flops_worker.tensors import Layout

_SHORTEST_DEADLINE_S = 60.0
_TIMES_SLOWEST = 10.0
_WORTH_TELLING_S = 1.0  # single updates of quicker rounds are no news
# Without a deadline in the spec, the first round may take an hour; later ones ten times what the slowest
# accepted learner ever took, at least a minute: derived from what was measured, not another thing to set.

_MOST_OF_A_CLUSTER = MAX_EXAMPLES * 10_000  # examples, where nobody knows how many its learners have
_REMEMBERED_TASKS = 8  # that a member was asked and never answered: late answers to them are no replays


@dataclass
class Round:
    """What a round has come to so far."""

    number: int
    updates: list[Update]
    collection: TrainCollection
    train_metrics: dict[str, float]
    slowest_s: float
    evaluation: EvaluateCollection | None = None

    @property
    def num_examples(self) -> int:
        return sum(update.num_examples for update in self.updates)

    @property
    def metrics(self) -> dict[str, float]:
        """Of the round's new model, weighted by the evaluated examples; empty where nobody evaluated."""
        return weighted_metrics(self.evaluation.in_order()) if self.evaluation else {}

    @property
    def left_out(self) -> dict[str, str]:
        return {**self.collection.left_out, **(self.evaluation.left_out if self.evaluation else {})}


class Rounds:
    """Carries out rounds over a hub, with one strategy; used by one thread."""

    def __init__(
        self,
        project: str,
        plan: Plan,
        layout: Layout,
        folder: Path,
        hub: Hub,
        roster: Roster,
        reporter: Reporter,
        clock: Clock,
    ) -> None:
        self._project, self._plan, self._layout = project, plan, layout
        self._hub, self._roster, self._reporter, self._clock = hub, roster, reporter, clock
        self.strategy = FlowerStrategy(plan.strategy, plan.strategy_parameters)
        self._streamed = self.strategy.reduction in (Reduction.MEAN, Reduction.OPTIMISER)
        self._clusters = frozenset(
            name for name, member in roster.members.items() if member.kind == "cluster"
        )
        if self._clusters and not self._streamed:
            raise FailedError(
                f"strategy {plan.strategy} compares single learners - use it inside clusters, not above them"
            )
        self._members = {slot: name for name, slot in roster.slots.items()}
        self._blocks = blocks(layout)
        self._sum_layout = sum_layout(layout)
        self._sum_blocks = blocks(self._sum_layout)
        self._max_examples = {
            name: member.max_examples or (_MOST_OF_A_CLUSTER if member.kind == "cluster" else None)
            for name, member in roster.members.items()
        }
        self._spool = Spool(folder)
        self._mean: WeightedMean | None = None
        self.model: GlobalModel
        self.slowest_s: float | None = None
        """The longest that an accepted member ever took; deadlines derive from it."""
        self.bytes_down = self.bytes_up = 0
        self._unanswered: dict[str, deque[str]] = {}

    def close(self) -> None:
        """Give back files and memory."""
        self._spool.close()
        self._mean = None

    def take_over(self, version: int, model: ModelFile) -> None:
        """Make a model the global one; its file may be closed by the caller."""
        self.model = GlobalModel.of(version, model, self._blocks)

    @property
    def quorum(self) -> int:
        return self._plan.quorum or self._plan.min_fit_learners

    @property
    def needed(self) -> int:
        """Members that must be there before a round starts."""
        return members_needed(self._plan)

    # -- training

    def train(self, number: int, ready: list[str]) -> Round:
        """Have a cohort of the ready members train the global model, and collect its updates.

        Raises:
            FailedError: fewer updates than the quorum.
        """
        plan = self._plan
        least = max(plan.min_fit_learners, self.quorum)
        asked, needed = cohort_size(len(ready), plan.fraction_fit, least, plan.over_sample)
        chosen = choose(
            plan.cohort,
            round_number=number,
            seed=plan.seed,
            ready=ready,
            target=asked,
            history=self._roster.history,
            max_examples=self._max_examples,
        )
        cohort = self._configure("train", number, chosen)
        self._roster.history.ask(cohort, number)
        self.bytes_down = self.bytes_up = 0
        updates: list[Update] = []
        start = self._clock.monotonic()
        if self._streamed:
            if self._mean is None:
                self._mean = WeightedMean(self._blocks)
            self._mean.reset()

        told = start

        def take(update: Update) -> None:
            nonlocal told
            updates.append(update)
            self.bytes_up += update.nbytes
            now = self._clock.monotonic()
            if now - told > _WORTH_TELLING_S:
                told = now if len(cohort) > MANY else told
                self._reporter.report(
                    EventKind.UPDATE_RECEIVED,
                    round=number,
                    learner=update.learner,
                    bytes=update.nbytes,
                    fit_s=round(update.fit_s, 4),
                    answered=len(updates),
                )
            if self._streamed and self._mean is not None:
                if update.learner in self._clusters:
                    self._mean.fold_sum(update.body, self._sum_blocks, float(update.num_examples))
                else:
                    self._mean.fold(update.body, float(update.num_examples))
                update.body.release()

        collection = TrainCollection(
            f"train-{number}",
            list(cohort),
            version=self.model.version,
            layout=self._layout,
            layouts=dict.fromkeys(self._clusters, self._sum_layout),
            spool=self._spool,
            post=self._hub,
            max_examples=self._max_examples,
            take=take,
            gate=NormGate.of(self.model.body, plan.max_update_norm),
            needs_loss=self.strategy.name in NEEDS_LOSS_FIRST,
        )
        self._reporter.report(EventKind.ROUND_STARTED, round=number, cohort=len(cohort))
        try:
            slowest_s = self._collect("train", number, collection, cohort, self.quorum, needed)
        except BaseException:
            collection.close()
            for update in updates:
                update.body.release()
            raise
        metrics = weighted_metrics([(float(update.num_examples), dict(update.metrics)) for update in updates])
        return Round(number, updates, collection, metrics, slowest_s)

    def evaluate(self, done: Round, ready: list[str], task: str) -> None:
        """Have a share of the ready members judge the global model; what they say becomes part of the round.

        Raises:
            FailedError: too few evaluations.
        """
        done.evaluation, slowest_s = self.judge(done.number, ready, task)
        done.slowest_s = max(done.slowest_s, slowest_s)

    def judge(self, number: int, ready: list[str], task: str) -> tuple[EvaluateCollection, float]:
        """What members say of the global model, and how long the slowest of them took; see `evaluate`."""
        plan = self._plan
        asked, _ = cohort_size(len(ready), plan.fraction_evaluate, plan.min_evaluate_learners)
        chosen = choose(
            "random",
            round_number=number,
            seed=plan.seed + 1,  # not those who train, over and over
            ready=ready,
            target=asked,
            history=self._roster.history,
            max_examples={},
        )
        cohort = self._configure("evaluate", number, chosen)
        collection = EvaluateCollection(task, list(cohort), self._max_examples)
        slowest_s = self._collect("evaluate", number, collection, cohort, plan.min_evaluate_learners)
        return collection, slowest_s

    def _configure(self, phase: str, number: int, chosen: list[str]) -> dict[str, dict[str, Any]]:
        configured = self.strategy.configure(
            phase,
            number,
            self._plan.seed,
            [self._roster.slots[name] for name in chosen],
            lambda: layout_arrays(self._layout, self.model.body),
        )
        return {self._members[node]: config for node, config in sorted(configured.items())}

    def _ask(
        self, phase: str, number: int, collection: Collection, member: str, config: dict[str, Any]
    ) -> None:
        if phase == "train" and self.strategy.name in NEEDS_LOSS_FIRST:
            config = {**config, "flops-evaluate-first": True}
        header = {
            "t": phase,
            "task": collection.task,
            "round": number,
            "version": self.model.version,
            "config": config,
            "seed": learner_seed(self._plan.seed, self._roster.slots[member], number),
        }
        if self._hub.send(member, header, self.model):
            self.bytes_down += self._layout.nbytes
            tasks = self._unanswered.setdefault(member, deque(maxlen=_REMEMBERED_TASKS))
            if collection.task not in tasks:
                tasks.append(collection.task)

    def _collect(
        self,
        phase: str,
        number: int,
        collection: TrainCollection | EvaluateCollection,
        cohort: Mapping[str, dict[str, Any]],
        quorum: int,
        enough: int | None = None,
    ) -> float:
        """Ask the cohort and wait until all (or ``enough``) have answered, or the deadline, or the quorum is
        out of reach; returns how long the slowest that counts took."""
        for member, config in cohort.items():
            self._ask(phase, number, collection, member, config)
        limit_s = answer_deadline_s(self._plan, self.slowest_s)
        start = self._clock.monotonic()
        deadline = start + limit_s
        slowest_s = 0.0
        while not collection.done and collection.can_reach(quorum):
            now = self._clock.monotonic()
            if enough is not None and collection.answered >= enough:
                collection.leave_all_out(collection.outstanding, "enough others were quicker")
                break
            if now >= deadline:
                # An update that was announced in time may still travel: its learner kept the deadline.
                travelling = collection.announced if isinstance(collection, TrainCollection) else set()
                late = collection.outstanding - travelling
                self._miss(collection, late, limit_s, f"it did not answer within {limit_s:g} s")
                if now >= deadline + limit_s:
                    reason = f"its update did not arrive within {2 * limit_s:g} s"
                    self._miss(collection, collection.outstanding, limit_s, reason)
                wait_until = deadline + limit_s
            else:
                wait_until = deadline
            wait_until = min(wait_until, self._give_up_on_the_gone(collection, quorum))
            if isinstance(collection, TrainCollection):
                wait_until = min(wait_until, collection.hand_slots_on(now))
            if not collection.outstanding:
                break
            said = self._roster.hear(wait_until - now)
            if said is not None:
                answered = collection.answered
                self._hear(phase, number, collection, cohort, said)
                if collection.answered > answered:
                    slowest_s = self._clock.monotonic() - start
                    if phase == "train":
                        self._roster.counts(said.learner, slowest_s)
        if collection.answered < quorum:
            raise FailedError(self._below_quorum(phase, number, collection, quorum))
        return slowest_s

    def _miss(self, collection: Collection, members: Iterable[str], waited_s: float, reason: str) -> None:
        members = list(members)
        collection.leave_all_out(members, reason)
        for member in members:
            self._roster.history.miss(member, waited_s)

    def _give_up_on_the_gone(self, collection: Collection, quorum: int) -> float:
        """Leave out who has been away for too long; returns when to look again.

        Those without whom the quorum is out of reach are waited for until the deadline.
        """
        now, next_look = self._clock.monotonic(), math.inf
        for member in sorted(collection.outstanding & self._roster.absent):
            until = self._roster.expected_until(member)
            if member in self._roster.ended:
                collection.leave_out(member, self._roster.ended[member])
            elif until is None:
                continue
            elif now >= until:
                if not collection.can_reach(quorum + 1):
                    continue
                why = self._roster.away.get(member, "its connection was lost")
                collection.leave_out(member, f"it went and did not come back in time: {why}")
            else:
                next_look = min(next_look, until)
        return next_look

    def _hear(
        self,
        phase: str,
        number: int,
        collection: TrainCollection | EvaluateCollection,
        cohort: Mapping[str, dict[str, Any]],
        said: Said,
    ) -> None:
        member = said.learner
        task = str(said.header.get("task"))
        if said.kind in ("result", "evaluated"):
            asked = self._unanswered.get(member, ())
            try:
                collection.answer(said)
            except RefusedError as error:
                late = isinstance(error, LateError) and task in asked  # else it is a replay
                self._roster.refuse(number, said, str(error), harmless=late)
            if task in asked:
                self._unanswered[member].remove(task)
        elif said.kind == "declined" and task == collection.task:
            collection.leave_out(member, str(said.header.get("reason"))[:2000])
        elif said.kind == "uploaded" and isinstance(collection, TrainCollection) and task == collection.task:
            try:
                collection.uploaded(member)
            except RefusedError as error:
                self._roster.refuse(number, said, str(error))
        elif said.kind == "upload-refused" and task == collection.task:
            collection.leave_out(member, str(said.header["reason"]))
            ours = said.header.get("ours") is True  # the fault is this side's, not the member's
            self._roster.refuse(number, said, str(said.header["reason"]), harmless=ours)
        elif said.kind == "failed":
            collection.leave_out(member, self._roster.ended[member])
        elif said.kind == "ready" and member in collection.outstanding:
            self._ask(phase, number, collection, member, cohort[member])
        elif said.kind == "gone" and isinstance(collection, TrainCollection):
            collection.restart_upload(member)

    def _below_quorum(self, phase: str, number: int, collection: Collection, quorum: int) -> str:
        what = "update" if phase == "train" else "evaluation"
        what = what if quorum == 1 else what + "s"
        text = (
            f"round {number} of project {self._project} needs {quorum} {what}, "
            f"{collection.answered} of {len(collection.cohort)} "
            f"{'clusters' if self._clusters else 'learners'} returned a usable one"
        )
        return text + first_of(collection.left_out)

    # -- the next model

    def aggregate(self, done: Round, path: Path) -> ModelFile:
        """Make the round's updates the new global model, written where its commit will find it."""
        return self._written(self._layout, path, lambda writer: self._write_model(done, writer), done)

    def write_sum(self, done: Round, model: ModelFile, path: Path) -> ModelFile:
        """What a cluster passes on: its model times the examples behind it, in float64; where the model is
        the mean of the updates, their weighted sum as it was before it was rounded.

        Args:
            model: what `aggregate` made of this round.
        """
        return self._written(
            self._sum_layout, path, lambda writer: self._write_sum(done, writer, model), done
        )

    def _written(
        self, layout: Layout, path: Path, write: Callable[[ModelWriter], None], done: Round
    ) -> ModelFile:
        writer = ModelWriter(layout, path)
        try:
            write(writer)
            return writer.finish()
        except BaseException:
            writer.discard()
            raise
        finally:
            for update in done.updates:
                update.body.release()

    def _write_sum(self, done: Round, writer: ModelWriter, model: ModelFile) -> None:
        if self.strategy.reduction is Reduction.MEAN:
            assert self._mean is not None
            for start, total in self._mean.sums():
                writer.write(start * total.itemsize, total.view(np.uint8).data)
            return
        for block in self._blocks:
            values = block.view(model.body[block.offset : block.end]).astype(np.float64) * done.num_examples
            writer.write(block.start * values.itemsize, values.view(np.uint8).data)

    def _write_model(self, done: Round, writer: ModelWriter) -> None:
        reduction, strategy = self.strategy.reduction, self.strategy
        numbered = [(self._roster.slots[update.learner], update) for update in done.updates]
        if reduction is Reduction.BLOCKS:
            for block, values in strategy.apply_blocks(done.number, self._blocks, numbered):
                writer.write(block.offset, _bytes_of(values, block.dtype))
            return
        if reduction is Reduction.ALL:
            keys = [tensor.key for tensor in self._layout.tensors]
            arrays = strategy.apply_all(done.number, keys, numbered)
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
            arrays = strategy.apply_mean(done.number, mean, done.train_metrics, self._mean.total_weight)
        for tensor, array in zip(self._layout.tensors, arrays, strict=True):
            if array.shape != tensor.shape:
                raise FailedError(f"strategy {strategy.name} changed the shape of array {tensor.key}")
            if not np.isfinite(array).all():
                raise FailedError(
                    f"strategy {strategy.name} made a model with NaN or infinite values in round "
                    f"{done.number} - lower its learning rate"
                )
            if tensor.nbytes:
                writer.write(tensor.offset, _bytes_of(array, tensor.numpy_dtype))


def members_needed(plan: Plan) -> int:
    """Members that must be there before work is given out."""
    evaluate = plan.min_evaluate_learners if plan.fraction_evaluate > 0 else 0
    return max(plan.min_available_learners, plan.min_fit_learners, evaluate, plan.quorum or 0)


def answer_deadline_s(plan: Plan, slowest_s: float | None) -> float:
    """How long a member has for an answer.

    Args:
        slowest_s: the longest that an accepted one ever took; None: there was none.
    """
    if plan.round_deadline_s is not None:
        return plan.round_deadline_s
    if slowest_s is None:
        return plan.first_deadline_s
    # Capped, or a member that always answers at the last moment would move it on and on.
    return min(max(_SHORTEST_DEADLINE_S, _TIMES_SLOWEST * slowest_s), plan.first_deadline_s)


def learner_seed(seed: int, slot: int, round_number: int) -> int:
    """The seed of one learner's round: the same after any restart, different for any two of them."""
    return int(np.random.SeedSequence([abs(seed), slot, round_number]).generate_state(1)[0])


def _bytes_of(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> Any:
    return as_dtype(values, dtype).reshape(-1).view(np.uint8).data
