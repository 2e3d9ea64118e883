"""An asynchronous training: every learner works at its own pace, and nobody is waited for.

Each idle learner is given the newest model; each accepted update goes into the strategy's mixing
(`flops.federation.mixing`), which makes the next version of the model whenever it is due. A round ends when
the mixing says so: its model is committed before anybody hears of it, and evaluated by each learner before
its next training, until all have answered or the next commit is there; so the report of a round may come one
commit later. A killed aggregator goes on after the last commit; updates on their way are lost with it. What
comes out depends on who was quicker, and is not the same twice.
"""

import itertools
import math
import secrets
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flops.core.clock import Clock
from flops.core.errors import FailedError
from flops.core.events import EventKind
from flops.federation.blocks import all_usable, blocks
from flops.federation.checkpoint import Checkpoint, Committed
from flops.federation.cohorts import choose, cohort_size
from flops.federation.collect import evaluation_of
from flops.federation.config import Member, Plan
from flops.federation.evaluation import Evaluation
from flops.federation.hub import GlobalModel, Hub, Said
from flops.federation.intake import Intake, NormGate
from flops.federation.mixing import make_mixing
from flops.federation.model_file import ModelFile, ModelWriter
from flops.federation.reports import Reporter
from flops.federation.roster import MANY, Roster
from flops.federation.rounds import answer_deadline_s, learner_seed, members_needed
from flops.federation.training import Outcome, is_better
from flops.federation.updates import LateError, RefusedError, Spool, Update
from flops.federation.window import Window

_WORTH_TELLING_S = 1.0  # single updates that come quicker are no news
_PATIENCE_S = 5.0  # for evaluations that are under way, where rounds are quicker than that
_GATHER_S = 2.0  # for those who come last, where the first are quick
_LAST_WORDS_S = 1.0  # for those who still train when the last commit is there
_REMEMBERED_TASKS = 8  # that a learner was given and that are not waited for any more


@dataclass
class _Task:
    """What a learner was asked and has not answered yet."""

    header: dict[str, Any]
    model: GlobalModel
    since: float
    until: float
    """When it is not waited for any more."""
    announced: bool = False
    """Its update is ready, and only waits for its way here."""
    overdue: bool = False
    """It took too long; its answer still counts if it comes."""

    @property
    def name(self) -> str:
        return str(self.header["task"])

    @property
    def trains(self) -> bool:
        return bool(self.header["t"] == "train")


class AsynchronousTraining:
    """Drives one training over a hub; used by one thread."""

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
        """Raises InvalidInputError: a parameter that the strategy does not take."""
        self._project, self._plan, self._hub, self._checkpoint = project, plan, hub, checkpoint
        self._reporter, self._clock = reporter, clock
        self._roster = Roster(project, plan, members, hub, reporter, clock)
        self._max_examples = {name: member.max_examples for name, member in members.items()}
        model = checkpoint.model()
        self._layout, self._blocks = model.layout, blocks(model.layout)
        self._model = self._global_model(0, model)
        self._mixing = make_mixing(
            plan.strategy,
            plan.strategy_parameters,
            self._blocks,
            lambda learner: self._roster.history.of(learner).answer_s,
        )
        self._spool = Spool(checkpoint.folder)
        self._intake = Intake(
            layout=self._layout,
            spool=self._spool,
            post=hub,
            max_examples=self._max_examples,
            order=self._roster.slots.__getitem__,
        )
        # What an earlier life asked must not be taken for what this one asks.
        self._life = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._tasks: dict[str, _Task] = {}
        self._given_up: dict[str, deque[str]] = {}
        self._evaluation: Evaluation | None = None
        self._window = Window(clock.monotonic())
        self._slowest_s: float | None = None
        self._short_since: float | None = None
        self._told: int | None = None
        self._least_pause_s = 1.0 if len(members) > MANY else 0.0
        self._told_of_waiting = self._told_of_update = -math.inf

    def run(self) -> Outcome:
        """Train to the last commit, and have it evaluated.

        Raises:
            FailedError: too few learners for too long, or a model that cannot be; says why.
        """
        committed = self._checkpoint.committed
        state = self._checkpoint.strategy_state()
        if "version" in state:
            self._model = replace(self._model, version=int(state.pop("version")[0]))
        self._mixing.restore(state)
        self._slowest_s = committed.slowest_s
        self._roster.begin(committed.history, committed.ejected)
        if self._reporter.last_round < committed.round:
            if "metrics" in committed.report:
                self._reporter.report(EventKind.ROUND_FINISHED, **committed.report)
            else:
                self._open_evaluation()
        if committed.round == 0:
            self._gather()
        while self._rounds < self._plan.rounds or self._evaluation is not None:
            now = self._clock.monotonic()
            self._give_up_on_the_late(now)
            if self._enough_are_there(now):
                self._give_work(now)
            if self._evaluation is not None and self._judged():
                self._close_evaluation()
                continue
            said = self._roster.hear(self._look_again(now) - now)
            if said is not None:
                self._hear(said)
            while self._rounds < self._plan.rounds and self._mixing.due(now := self._clock.monotonic()):
                if self._holds_back(now) and self._mixing.can_wait:
                    break
                self._step(commits=self._mixing.ends_round and not self._holds_back(now))
        committed = self._checkpoint.committed
        return Outcome(
            committed.round, committed.best_round, self._checkpoint.best_model(), committed.best_metrics
        )

    def _gather(self) -> None:
        """Let those begin together who come at about the same time: the first one alone would spend rounds.

        Once enough are there, the others have as long again as that took, at least `_GATHER_S`.
        """
        begin, until = self._clock.monotonic(), math.inf
        while True:
            self._roster.take_notes()
            ready, now = len(self._roster.ready()), self._clock.monotonic()
            if ready >= members_needed(self._plan):
                until = min(until, now + max(_GATHER_S, now - begin))
            if ready >= self._roster.expected or now >= min(until, begin + self._plan.start_deadline_s):
                return
            self._roster.hear(min(until, begin + self._plan.start_deadline_s) - now)

    def close(self) -> None:
        """Give back files and memory."""
        self._intake.close()
        self._mixing.close()
        self._spool.close()
        self._tasks.clear()

    @property
    def _rounds(self) -> int:
        """Commits so far."""
        return self._checkpoint.committed.round

    @property
    def _round(self) -> int:
        """The round that is under way."""
        return min(self._rounds + 1, self._plan.rounds)

    def _global_model(self, version: int, file: ModelFile) -> GlobalModel:
        model = GlobalModel.of(version, file, self._blocks)
        file.close()
        return model

    # -- who is there

    def _present(self) -> list[str]:
        """Learners that can be asked or are at work, without those that are overdue."""
        return [
            name for name in self._roster.ready() if not (name in self._tasks and self._tasks[name].overdue)
        ]

    def _enough_are_there(self, now: float) -> bool:
        """Whether work may be given out.

        Raises:
            FailedError: too few learners for `start_deadline_s`, or no more can come.
        """
        plan, present, limit_s = self._plan, len(self._present()), self._plan.start_deadline_s
        needed = members_needed(plan) if self._rounds < plan.rounds else plan.min_evaluate_learners
        if present >= needed:
            self._short_since = self._told = None
            return True
        if self._roster.expected < needed:
            raise FailedError(self._roster.too_few(self._round, needed, present))
        if self._short_since is None:
            self._short_since = now
        if now >= self._short_since + limit_s:
            raise FailedError(self._roster.too_few(self._round, needed, present, f" after {limit_s:g} s"))
        if self._told != present and now - self._told_of_waiting >= self._least_pause_s:
            self._told, self._told_of_waiting = present, now
            self._reporter.report(
                EventKind.TRAINING_WAITING,
                round=self._round,
                connected=present,
                needed=needed,
                expected=self._roster.expected,
                deadline_s=limit_s,
            )
        return False

    def _look_again(self, now: float) -> float:
        """When something has to be done, should nobody say anything."""
        held = self._window.due_since is not None and self._holds_back(now)
        times = [self._held_until if held else self._mixing.look_again(now), self._intake.hand_slots_on(now)]
        if self._short_since is not None:
            times.append(self._short_since + self._plan.start_deadline_s)
        times += [task.until for task in self._tasks.values() if task.announced or not task.overdue]
        if self._evaluation is not None and self._evaluation.until > now:
            times.append(self._evaluation.until)
        concerned = self._tasks.keys() | (self._evaluation.outstanding if self._evaluation else set())
        ends = (self._roster.expected_until(learner) for learner in concerned)
        times += [until for until in ends if until is not None and until > now]
        return max(now, min(times))

    def _may_come_back(self, learner: str, now: float) -> bool:
        until = self._roster.expected_until(learner)
        return until is not None and now < until

    def _give_up_on_the_late(self, now: float) -> None:
        """Wait no longer for who is over its deadline, or was away for too long."""
        for learner, task in list(self._tasks.items()):
            if learner in self._roster.ended:
                self._drop(learner, self._roster.ended[learner])
            elif learner in self._roster.away and not self._may_come_back(learner, now):
                why = self._roster.away[learner]
                self._drop(learner, f"it went and did not come back in time: {why}")
            elif now >= task.until and task.announced:
                self._drop(learner, f"its update did not arrive within {now - task.since:.0f} s")
            elif now >= task.until and not task.overdue:
                task.overdue = True
                self._roster.history.miss(learner, now - task.since)
                self._leave_out(learner, task, f"it did not answer within {task.until - task.since:g} s")

    def _leave_out(self, learner: str, task: _Task, reason: str) -> None:
        if task.trains:
            self._window.left_out[learner] = reason
            self._mixing.lost(learner)
        elif self._evaluation is not None and task.name == self._evaluation.task:
            self._evaluation.left_out[learner] = reason

    def _drop(self, learner: str, reason: str, *, answered: bool = False) -> None:
        """Forget what a learner was asked; it may be given other work."""
        task = self._tasks.pop(learner)
        self._intake.cancel(learner)
        self._intake.ask_for_more()
        if not answered:
            self._given_up.setdefault(learner, deque(maxlen=_REMEMBERED_TASKS)).append(task.name)
        self._leave_out(learner, task, reason)

    # -- giving work

    def _give_work(self, now: float) -> None:
        """Ask whoever is idle: first for the evaluation of the last commit, then for an update."""
        ready = self._roster.ready()
        evaluation = self._evaluation
        if evaluation is not None:
            self._choose_judges(evaluation, ready, now)
            outstanding = evaluation.outstanding - self._tasks.keys()
            for learner in ready:
                if learner in outstanding:
                    self._ask(learner, self._evaluate_header(evaluation), evaluation.model, now)
        if self._rounds >= self._plan.rounds:
            return
        present, plan = self._present(), self._plan
        at_once, _ = cohort_size(len(present), plan.fraction_fit, plan.min_fit_learners)
        self._mixing.at_once = max(1, at_once)
        at_work = sum(task.trains and not task.overdue for task in self._tasks.values())
        idle = [learner for learner in ready if learner not in self._tasks]
        chosen = choose(
            plan.cohort,
            round_number=next(self._numbers),
            seed=plan.seed,
            ready=self._mixing.may_ask(idle),
            target=at_once - at_work,
            history=self._roster.history,
            max_examples=self._max_examples,
        )
        if chosen and not self._window.announced:
            self._window.announced = True
            self._reporter.report(EventKind.ROUND_STARTED, round=self._round, cohort=at_once)
            if self._rounds == 0:
                self._window.since = now  # the wait for learners is none of the round
        for learner in chosen:
            self._roster.history.ask([learner], self._round)
            if self._ask(learner, self._train_header(learner), self._model, now):
                self._mixing.asked(learner, now)

    def _choose_judges(self, evaluation: Evaluation, ready: list[str], now: float) -> None:
        """Choose as many as are wanted, and others for those that will not answer any more."""
        wanted, _ = cohort_size(len(ready), self._plan.fraction_evaluate, self._plan.min_evaluate_learners)
        present = self._present()
        lost = {
            name for name in evaluation.outstanding.difference(present) if not self._may_come_back(name, now)
        }
        evaluation.chosen.update(
            choose(
                "random",
                round_number=self._rounds,
                seed=self._plan.seed + 1,
                ready=[learner for learner in present if learner not in evaluation.chosen],
                target=wanted - len(evaluation.chosen - evaluation.left_out.keys() - lost),
                history=self._roster.history,
                max_examples={},
            )
        )

    def _ask(self, learner: str, header: dict[str, Any], model: GlobalModel, now: float) -> bool:
        if not self._hub.send(learner, header, model):
            return False
        limit_s = answer_deadline_s(self._plan, self._slowest_s)
        self._tasks[learner] = _Task(header, model, now, now + limit_s)
        self._window.bytes_down += self._layout.nbytes
        return True

    def _train_header(self, learner: str) -> dict[str, Any]:
        config: dict[str, Any] = {"server-round": self._round}
        if self._mixing.parameters["proximal_mu"]:
            config["proximal-mu"] = float(self._mixing.parameters["proximal_mu"])
        times = self._roster.history.of(learner).asked  # a learner may train the same version twice
        return {
            "t": "train",
            "task": f"train-{self._life}-{next(self._numbers)}",
            "round": self._round,
            "version": self._model.version,
            "config": config,
            "seed": learner_seed(self._plan.seed, self._roster.slots[learner], times),
        }

    def _evaluate_header(self, evaluation: Evaluation) -> dict[str, Any]:
        return {
            "t": "evaluate",
            "task": evaluation.task,
            "round": self._rounds,
            "version": evaluation.model.version,
            "config": {"server-round": self._rounds},
            "seed": 0,
        }

    # -- hearing

    def _hear(self, said: Said) -> None:
        learner, kind = said.learner, said.kind
        task = self._tasks.get(learner)
        if kind in ("result", "evaluated", "declined", "uploaded", "upload-refused"):
            try:
                self._hear_answer(said, task)
            except RefusedError as error:
                if task is not None and said.header.get("task") == task.name:
                    self._drop(learner, str(error), answered=True)
                self._roster.refuse(self._round, said, str(error), harmless=isinstance(error, LateError))
        elif task is not None and kind == "gone":
            task.announced = False
            self._intake.cancel(learner)  # its announcement comes again when it is back
            self._intake.ask_for_more()
        elif task is not None and kind == "ready":
            self._hub.send(learner, task.header, task.model)  # nothing, where this session has it already

    def _hear_answer(self, said: Said, task: _Task | None) -> None:
        """Take an answer.

        Raises:
            LateError: nobody waits for it any more.
            RefusedError: it does not count, and should not have been sent.
        """
        learner, kind = said.learner, said.kind
        name = str(said.header.get("task"))[:80]
        if task is None or name != task.name:
            if kind in ("uploaded", "upload-refused"):
                return
            given_up = self._given_up.get(learner, deque())
            if name in given_up:
                given_up.remove(name)
                raise LateError(f"it answers {name}, which is not waited for any more")
            raise RefusedError(f"it answers {name}, which it was not asked or has answered already")
        if kind == "upload-refused":
            raise RefusedError(str(said.header["reason"]))
        if kind == "declined":
            raise RefusedError("it declines to work")
        if (kind == "evaluated") == task.trains:
            raise RefusedError(f"its answer to {name} is of another kind")
        if kind == "evaluated":
            self._take_evaluation(said, task)
        elif self._rounds >= self._plan.rounds:
            self._drop(learner, "the training is over", answered=True)
        elif kind == "result":
            self._take_announcement(said, task)
        else:
            update = self._intake.uploaded(learner, self._gate(task))
            if update is not None:
                self._take_update(update, task)

    def _take_announcement(self, said: Said, task: _Task) -> None:
        if task.announced:
            raise RefusedError(f"it has answered {task.name} already")
        version = said.header.get("version")
        if type(version) is not int or version != task.model.version:
            raise RefusedError(
                f"it was made from version {str(version)[:40]} of the model, not from {task.model.version}"
            )
        self._check_staleness(task)
        update = self._intake.announce(said, self._gate(task))
        if update is None:
            now = self._clock.monotonic()
            task.announced, task.until = True, now + answer_deadline_s(self._plan, self._slowest_s)
        else:
            self._take_update(update, task)

    def _gate(self, task: _Task) -> NormGate | None:
        return NormGate.of(task.model.body, self._plan.max_update_norm)

    def _check_staleness(self, task: _Task) -> int:
        """How many versions ago the model was that a learner was given.

        Raises:
            LateError: too many.
        """
        staleness = self._model.version - task.model.version
        most = self._mixing.parameters["max_staleness"]
        if most is not None and staleness > most:
            raise LateError(
                f"it was made from version {task.model.version} of the model, {staleness} versions ago "
                f"(max_staleness is {most})"
            )
        return staleness

    def _take_update(self, update: Update, task: _Task) -> None:
        learner, window = update.learner, self._window
        try:
            staleness = self._check_staleness(task)
        except LateError:
            update.body.release()
            raise
        took_s = self._clock.monotonic() - task.since
        del self._tasks[learner]
        self._roster.counts(learner, took_s)
        self._slowest_s = max(self._slowest_s or 0.0, took_s)
        share = self._mixing.take(update, task.model, staleness, took_s)
        window.take(update, staleness, share)
        now = self._clock.monotonic()
        if took_s > _WORTH_TELLING_S and now - self._told_of_update >= self._least_pause_s:
            self._told_of_update = now
            self._reporter.report(
                EventKind.UPDATE_RECEIVED,
                round=self._round,
                learner=learner,
                bytes=update.nbytes,
                fit_s=round(update.fit_s, 4),
                answered=len(window.updates),
                version=task.model.version,
                staleness=staleness,
            )

    def _take_evaluation(self, said: Said, task: _Task) -> None:
        result = evaluation_of(said, self._max_examples.get(said.learner))
        del self._tasks[said.learner]
        evaluation = self._evaluation
        if evaluation is not None and evaluation.task == task.name:  # else it came after the next commit
            evaluation.left_out.pop(said.learner, None)
            evaluation.results[said.learner] = result

    # -- the next model

    def _holds_back(self, now: float) -> bool:
        """Whether a commit should wait until the one before it has enough evaluations.

        It waits at most as long again as its round took (at least `_PATIENCE_S`), and not at all for
        learners that will train for longer than the round took.
        """
        evaluation, window = self._evaluation, self._window
        if evaluation is None or not evaluation.missing or not self._mixing.ends_round:
            return False
        if window.due_since is None:
            window.due_since = now
        if now >= self._held_until:
            return False
        judges = evaluation.outstanding if evaluation.chosen else self._roster.members.keys()
        free_by = 2 * window.due_since - window.since
        able = [
            name for name in self._present() if name in judges and self._will_judge(name, evaluation, free_by)
        ]
        return len(able) >= evaluation.missing

    def _will_judge(self, learner: str, evaluation: Evaluation, free_by: float) -> bool:
        """Whether a learner evaluates, or is free to, or will probably be by then."""
        task = self._tasks.get(learner)
        if task is None or not task.trains:
            return task is None or task.name == evaluation.task
        takes_s = self._roster.history.of(learner).answer_s
        return takes_s is not None and task.since + takes_s <= free_by

    @property
    def _held_until(self) -> float:
        due, since = self._window.due_since, self._window.since
        return math.inf if due is None else due + max(_PATIENCE_S, due - since)

    def _step(self, commits: bool) -> None:
        """Make the next version of the model, and commit it where that ends a round."""
        version = self._model.version + 1
        if commits and self._evaluation is not None:
            self._close_evaluation()
        path = (
            self._checkpoint.model_path(self._rounds + 1)
            if commits
            else self._checkpoint.folder / "version-next.safetensors"
        )
        writer = ModelWriter(self._layout, path)
        try:
            for block, values in self._mixing.step(self._model):
                if not all_usable(values):
                    raise FailedError(
                        f"strategy {self._plan.strategy} made a model with NaN or infinite values in round "
                        f"{self._round} of project {self._project} - set training.max_update_norm, or lower "
                        "the learning rate"
                    )
                writer.write(block.offset, values.view(np.uint8).data)
            file = writer.finish()
        except BaseException:
            writer.discard()
            raise
        self._model = self._global_model(version, file)
        if commits:
            self._mixing.round_ended()
            self._commit()
        else:
            path.unlink()  # it lives as long as somebody works on it

    def _commit(self) -> None:
        before, window = self._checkpoint.committed, self._window
        evaluates = self._plan.fraction_evaluate > 0
        report: dict[str, Any] = {
            "round": before.round + 1,
            "rounds": self._plan.rounds,
            "cohort": self._mixing.at_once,
            "version": self._model.version,
            **window.report(self._clock.monotonic()),
        }
        if self._plan.learner_metrics:
            report["learners"] = self._shown(window.learner_metrics)
        if not evaluates:
            report |= {"metrics": {}, "best": True}
        committed = Committed(
            before.round + 1,
            best_round=before.best_round if evaluates else before.round + 1,
            best_metrics=before.best_metrics,
            slowest_s=self._slowest_s,
            history=self._roster.history.to_json(),
            ejected=self._roster.ejected,
            report=report,
        )
        state = {**self._mixing.state(), "version": np.array([self._model.version])}
        self._checkpoint.commit(committed, state, is_best=not evaluates)
        if evaluates:
            self._open_evaluation()
        else:
            self._reporter.report(EventKind.ROUND_FINISHED, **report)
        self._window = Window(self._clock.monotonic())

    def _shown(self, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Single learners' metrics of those whose data's owner allows it."""
        sessions = {learner: self._hub.session(learner) for learner in metrics}
        return {
            learner: dict(values)
            for learner, values in metrics.items()
            if (session := sessions[learner]) is not None and session.allows_metrics
        }

    # -- what the committed model is worth

    def _open_evaluation(self) -> None:
        now = self._clock.monotonic()
        until = now + max(_LAST_WORDS_S, now - self._window.since)
        self._evaluation = Evaluation(
            f"evaluate-{self._life}-{self._rounds}", self._model, self._plan.min_evaluate_learners, until
        )

    def _judged(self) -> bool:
        """Whether the evaluation of the last commit has all the answers that it waits for.

        Raises:
            FailedError: it is the last one, and will never have enough.
        """
        evaluation = self._evaluation
        assert evaluation is not None
        last = self._rounds >= self._plan.rounds
        enough = not evaluation.missing
        present, now = set(self._present()), self._clock.monotonic()
        outstanding = {
            name for name in evaluation.outstanding if name in present or self._may_come_back(name, now)
        }
        if last and enough and now >= evaluation.until:  # those that still train, or are away, are not needed
            outstanding = {name for name in outstanding & present if not self._trains(name)}
        if outstanding or not evaluation.chosen:
            return False
        if last and not enough and self._short_since is None:
            raise FailedError(evaluation.too_few(self._rounds, self._project))
        return enough

    def _trains(self, learner: str) -> bool:
        return learner in self._tasks and self._tasks[learner].trains

    def _close_evaluation(self) -> None:
        """Complete the report of the last commit with what was said of its model."""
        evaluation, before = self._evaluation, self._checkpoint.committed
        assert evaluation is not None
        self._evaluation = None
        metrics = evaluation.metrics(self._roster.slots)
        better = is_better(self._plan, metrics, before)
        report = {**before.report, "metrics": metrics, "best": better, "evaluated": len(evaluation.results)}
        report["left_out"] = {**report["left_out"], **evaluation.left_out}
        if self._plan.learner_metrics:
            shown = self._shown({name: values for name, (_, values) in evaluation.results.items()})
            learners = report["learners"]
            report["learners"] = {
                name: {**learners.get(name, {}), **shown.get(name, {})} for name in [*learners, *shown]
            }
        committed = replace(
            before,
            metrics=metrics,
            best_round=before.round if better else before.best_round,
            best_metrics=metrics if better else before.best_metrics,
            report=report,
        )
        self._checkpoint.commit(committed, {}, better)
        self._reporter.report(EventKind.ROUND_FINISHED, **report)
