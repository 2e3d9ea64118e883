"""A cluster: an aggregator to its members and one member to the aggregator above it.

A task of the parent to train is a cycle: the cluster runs its own rounds on the model it was given, and
passes on the weighted sum of its last round and the number of examples behind it. A task to evaluate is
handed on to its members. Each of its rounds is committed, so a killed cluster goes on within its cycle; a
cycle that the parent no longer waits for is given up at once.
"""

import itertools
import logging
import os
from dataclasses import replace
from pathlib import Path

from flops.core.clock import Clock
from flops.core.errors import FailedError, FlopsError
from flops.core.events import EventKind
from flops.federation.checkpoint import Checkpoint, Committed
from flops.federation.config import AggregatorConfig
from flops.federation.conversation import Conversation, Declined, Evaluated, Task, Trained
from flops.federation.hub import Hub
from flops.federation.mean import sum_layout, weighted_metrics
from flops.federation.model_file import ModelFile
from flops.federation.reports import Reporter
from flops.federation.roster import InterruptedByTask, Roster
from flops.federation.rounds import Round, Rounds
from flops.federation.space import needing_space
from flops.federation.training import report_of
from flops.telemetry import about
from flops_worker.tensors import Layout

log = logging.getLogger(__name__)

_PATIENCE_S = 15.0
"""How long a cycle waits for members that are away, before the cluster declines it."""


class Cluster:
    """Does the tasks of its parent with a hub full of members; `work` is its one thread."""

    def __init__(
        self, config: AggregatorConfig, hub: Hub, checkpoint: Checkpoint, reporter: Reporter, clock: Clock
    ) -> None:
        assert config.parent is not None
        self._plan, self._hub, self._checkpoint = config.plan, hub, checkpoint
        self._reporter, self._clock = reporter, clock
        model = checkpoint.model()
        self._layout = model.layout
        model.close()
        self.conversation = Conversation(
            replace(config.parent, placed=False),
            on_task=hub.wake,
            expected=sum_layout,
            check_layout=self._check_layout,
        )
        self._roster = Roster(
            config.project,
            config.plan,
            config.members,
            hub,
            reporter,
            clock,
            interrupted=lambda: self.conversation.has_newer_task,
        )
        self._rounds = Rounds(
            config.project, config.plan, self._layout, checkpoint.folder, hub, self._roster, reporter, clock
        )
        self._name = config.parent.member
        self._update: ModelFile | None = None
        self._tasks = itertools.count(1)
        self._told_ended = 0

    def work(self) -> None:
        """Do what the parent asks for, until the project is over."""
        try:
            with needing_space(self._checkpoint.folder, f"cluster {self._name}"):
                self._work()
        except FlopsError as error:
            self.conversation.fail(error)
        except Exception as error:
            log.exception("the cluster cannot go on")
            self.conversation.fail(FailedError(f"cluster {self._name} cannot go on: {error!r}"))

    def close(self) -> None:
        """Give back files and memory."""
        self._rounds.close()
        if self._update is not None:
            self._update.close()

    def _work(self) -> None:
        committed = self._checkpoint.committed
        self._rounds.slowest_s = committed.slowest_s
        self._rounds.strategy.restore(self._checkpoint.strategy_state())
        if self._reporter.last_round < committed.round:
            self._reporter.report(EventKind.CLUSTER_ROUND, **committed.report)
        self._roster.begin(committed.history, committed.ejected)
        while not self.conversation.over:
            self._roster.take_notes()
            self._tell_presence()
            task = self.conversation.next_task(timeout_s=0)
            if task is not None:
                with about(request=task.request):
                    self._do(task)
                continue
            try:
                self._roster.hear(60.0)
            except InterruptedByTask:
                continue

    def _wait_for(self, number: int, needed: int) -> list[str]:
        ready = self._roster.wait_for(number, needed, _PATIENCE_S)
        self._tell_presence()  # it may have been absent when this task came
        return ready

    def _tell_presence(self) -> None:
        """The parent is to ask only when enough members are there."""
        ready, needed = len(self._roster.ready()), self._rounds.needed
        if ready >= needed:
            self.conversation.present()
        else:
            reason = f"{ready} of its {self._roster.expected} members are connected, it needs {needed}"
            ended = sorted(self._roster.ended.items())
            told, self._told_ended = self._told_ended, len(ended)
            reason += f"; {ended[0][0]}: {ended[0][1]}" if ended else ""
            self.conversation.absent(reason, news=len(ended) > told)

    def _do(self, task: Task) -> None:
        result: Trained | Evaluated | Declined
        try:
            result = self._evaluate(task) if task.kind == "evaluate" else self._train(task)
        except InterruptedByTask:
            self.conversation.give_up(task)
            log.info("%s is given up: its aggregator wants something newer", task.name)
            return
        except FailedError as error:
            log.warning("%s is declined: %s", task.name, error)
            result = Declined(str(error))
        self.conversation.answer(task, result)

    def _take_over(self, task: Task) -> None:
        model = ModelFile(os.dup(task.model_fd), task.name)
        self._rounds.take_over(task.version, model)
        model.close()

    # -- a cycle

    def _train(self, task: Task) -> Trained:
        """Run the rounds of one cycle, from where an earlier life was killed in it."""
        cycle, rounds = task.round, self._plan.rounds
        committed = self._checkpoint.committed
        if committed.cycle == cycle and committed.model_of == task.version:
            first = committed.round + 1
            model = self._checkpoint.model()
            self._rounds.take_over(committed.round, model)
            model.close()
        else:
            first = (cycle - 1) * rounds + 1
            self._take_over(task)
        for number in range(first, cycle * rounds + 1):
            self._round(task, number)
        return self._answer(task)

    def _round(self, task: Task, number: int) -> None:
        rounds, cycle = self._rounds, task.round
        ready = self._wait_for(number, rounds.needed)
        start = self._clock.monotonic()
        done = rounds.train(number, ready)
        model = rounds.aggregate(done, self._checkpoint.model_path(number))
        update = None
        if number == cycle * self._plan.rounds:
            update = self._update_path(cycle)
            rounds.write_sum(done, model, update).close()
        rounds.take_over(number, model)
        model.close()
        if self._plan.evaluate_every_round:
            ready = self._wait_for(number, self._plan.min_evaluate_learners)
            rounds.evaluate(done, ready, f"evaluate-own-{number}")
        data = report_of(done, rounds, self._plan, self._hub)
        data |= {
            "cycle": cycle,
            "rounds": self._plan.rounds * self._plan.cycles,
            "metrics": done.metrics,
            "duration_s": self._clock.monotonic() - start,
        }
        before = self._checkpoint.committed
        self._checkpoint.commit(
            Committed(
                number,
                done.metrics,
                slowest_s=max(done.slowest_s, before.slowest_s or 0.0),
                history=self._roster.history.to_json(),
                ejected=self._roster.ejected,
                report=data,
                cycle=cycle,
                model_of=task.version,
                update=_passed_on(done),
            ),
            rounds.strategy.state(),
            is_best=False,
            keep=update,
        )
        rounds.slowest_s = self._checkpoint.committed.slowest_s
        self._reporter.report(EventKind.CLUSTER_ROUND, **data)

    def _answer(self, task: Task) -> Trained:
        """The update of the cycle that was committed last."""
        if self._update is not None:
            self._update.close()
        self._update = update = ModelFile.open(self._update_path(task.round))
        passed_on = self._checkpoint.committed.update
        return Trained(
            passed_on["num_examples"],
            update.layout,
            update.fd,
            update.body_offset,
            passed_on["metrics"],
            passed_on["fit_s"],
        )

    def _update_path(self, cycle: int) -> Path:
        return self._checkpoint.folder / f"update-{cycle}.safetensors"

    # -- evaluation

    def _evaluate(self, task: Task) -> Evaluated:
        """Have the members judge the parent's model."""
        self._take_over(task)
        number = task.round * self._plan.rounds
        ready = self._wait_for(number, self._plan.min_evaluate_learners)
        # A name of its own each time: the parent may ask again with another model after it was killed.
        collection, _ = self._rounds.judge(number, ready, f"evaluate-{number}-{next(self._tasks)}")
        metrics = weighted_metrics(collection.in_order())
        return Evaluated(
            metrics.pop("loss"),
            metrics.pop("accuracy"),
            sum(num_examples for num_examples, _ in collection.results.values()),
            metrics,
        )

    def _check_layout(self, layout: Layout) -> None:
        difference = self._layout.difference(layout)
        if difference:
            raise FailedError(f"the aggregator's model has {difference}")


def _passed_on(done: Round) -> dict[str, object]:
    return {
        "num_examples": done.num_examples,
        "metrics": done.train_metrics,
        "fit_s": max((update.fit_s for update in done.updates), default=0.0),
    }
