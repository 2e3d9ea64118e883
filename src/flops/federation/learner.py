"""A learner: does its aggregator's tasks with the user's code, one after the other."""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

from flops.core.errors import FailedError, FlopsError
from flops.federation.conversation import Conversation, Evaluated, Task, Trained
from flops.guest import EvaluateResult, FitResult, GuestClosed, GuestError
from flops.telemetry import about, current_span, record, span, within

log = logging.getLogger(__name__)


class UserCode(Protocol):
    """What a learner needs of the user's code; `flops.guest.Guest` is it."""

    def load(self) -> Any: ...
    def load_data(self) -> None: ...
    def fit(self, model_fd: int, round_number: int, seed: int, config: Mapping[str, Any], /) -> FitResult: ...
    def evaluate(self, model_fd: int, round_number: int, config: Mapping[str, Any], /) -> EvaluateResult: ...


class Learner:
    """One learner's work; its methods are called by one thread at a time."""

    def __init__(self, name: str, conversation: Conversation, code: UserCode) -> None:
        self._name, self._conversation, self._code = name, conversation, code

    def work(self) -> None:
        """Load, then do the latest task, one by one, until something fails or the project is over."""
        if not self.prepare():
            return
        while (task := self._conversation.next_task()) is not None:
            if not self.do(task):
                return

    def prepare(self) -> bool:
        """Load code and data, and say so; False when this learner's part has failed."""
        with about(learner=self._name):
            return self._attempt(self._prepare)

    def do(self, task: Task) -> bool:
        """Do one task and answer it; False when this learner's part has failed."""
        with (
            about(learner=self._name, round=task.round, request=task.request),
            within(task.parent),
            span(f"task {task.kind}", learner=self._name, round=task.round),
        ):
            record("wait", task.came, time.time(), parent=current_span())
            return self._attempt(lambda: self._do(task))

    def _attempt(self, step: Any) -> bool:
        try:
            step()
        except GuestClosed:
            log.info("the worker was ended")  # by us, who have nothing more to say
        except GuestError as error:
            self._conversation.fail(error, error.where, "\n".join(error.traceback))
        except FlopsError as error:
            self._conversation.fail(error)
        except Exception as error:
            log.exception("the work of learner %s failed", self._name)
            self._conversation.fail(FailedError(f"the agent of learner {self._name} failed: {error!r}"))
        else:
            return True
        return False

    def _prepare(self) -> None:
        self._code.load()
        self._code.load_data()
        self._conversation.present()

    def _do(self, task: Task) -> None:
        try:
            result = self._result(task)
        except BaseException:
            os.close(task.model_fd)
            raise
        self._conversation.answer(task, result)

    def _result(self, task: Task) -> Trained | Evaluated:
        if task.kind == "evaluate":
            with span("compute"):
                judged = self._code.evaluate(task.model_fd, task.round, task.config)
            log.info("evaluated the model of round %s", task.round)
            return Evaluated(judged.loss, judged.accuracy, judged.num_examples, dict(judged.metrics))
        config = dict(task.config)
        metrics: dict[str, float] = {}
        if config.pop("flops-evaluate-first", False):
            # Strategies such as q-FedAvg weigh an update by the global model's loss before training.
            metrics["train_loss"] = self._code.evaluate(task.model_fd, task.round, config).loss
        with span("compute"):
            fit = self._code.fit(task.model_fd, task.round, task.seed, config)
        log.info("trained for round %s in %.3f s", task.round, fit.fit_s)
        return Trained(
            fit.num_examples,
            fit.layout,
            fit.update_fd,
            len(fit.layout.file_header()),
            {**metrics, **fit.metrics},
            fit.fit_s,
        )
