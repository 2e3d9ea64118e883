"""The pool: requests that wait, the predictors that answer them, and the batches in between.

A free predictor takes whatever waits and fits together, and never waits for more: batches grow by themselves
while predictors are busy. A predictor that dies or hangs is replaced, after growing pauses.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from flops.core.errors import FlopsError
from flops.serving.config import Batching
from flops.serving.errors import ModelFailedError, PredictorAwayError, RefusedError, TooSlowError
from flops.serving.metrics import Metrics
from flops.serving.predictor import (
    Predictor,
    PredictorDiedError,
    PredictorHangsError,
    PredictorSettings,
)
from flops.serving.question import Answer, Question

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 30.0
_AWAY = "the model is being loaded - ask again in a moment"


class Pool:
    """Answers questions. All methods belong to one event loop."""

    def __init__(
        self,
        settings: PredictorSettings,
        *,
        predictors: int,
        batching: Batching,
        request_timeout_s: float,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._batching = batching
        self._timeout_s = request_timeout_s
        self._metrics = metrics
        self._queue = _Queue()
        self._wanted = predictors
        self._ready: dict[int, Predictor] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._together = batching.enabled

    @property
    def ready(self) -> int:
        """Predictors that hold the model."""
        return len(self._ready)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def about(self) -> Mapping[str, Any]:
        """Versions in the model's environment."""
        return next((predictor.about for predictor in self._ready.values()), {})

    async def start(self) -> None:
        """Load the model everywhere; return once all predictors hold it.

        Raises:
            FlopsError: the model cannot be loaded.
        """
        starting = [asyncio.ensure_future(Predictor.start(self._settings)) for _ in range(self._wanted)]
        started = await asyncio.gather(*starting, return_exceptions=True)
        failures = [one for one in started if isinstance(one, BaseException)]
        if failures:
            for one in started:
                if isinstance(one, Predictor):
                    await one.close()
            if isinstance(failures[0], PredictorDiedError | PredictorHangsError):
                raise ModelFailedError(
                    f"the model in '{self._settings.model}' cannot be loaded: {failures[0]}"
                ) from failures[0]
            raise failures[0]
        for number, one in enumerate(started):
            assert isinstance(one, Predictor)
            self._ready[number] = one
            self._tasks.append(asyncio.create_task(self._work(number, one)))

    async def close(self) -> None:
        """End all predictors; whoever still waits is told."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_waiting("the server is ending - ask another one")

    async def ask(self, question: Question) -> Answer:
        """The model's answer.

        Raises:
            PredictorAwayError, TooSlowError, ModelFailedError, RefusedError: see there.
        """
        if not self._ready:
            raise PredictorAwayError(_AWAY)
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.put(_Job(question, waiter))
        timer = asyncio.get_running_loop().call_later(self._timeout_s, self._give_up, waiter)
        try:
            return await waiter
        finally:
            timer.cancel()

    def _give_up(self, waiter: "asyncio.Future[Answer]") -> None:
        _fail(waiter, TooSlowError(f"no answer within {self._timeout_s:g} s - send fewer rows, or try later"))

    async def _work(self, number: int, predictor: Predictor) -> None:
        """Let a predictor answer for ever, and its successors after it."""
        failures = 0
        while True:
            try:
                reason = await self._serve(predictor)
            finally:
                self._ready.pop(number, None)
                await asyncio.shield(predictor.close())
            self._metrics.restarted(reason)
            if not self._ready:
                self._fail_waiting(_AWAY)
            failures = 0 if predictor.answered else failures + 1
            while True:
                await asyncio.sleep(_pause_s(failures))
                try:
                    predictor = await Predictor.start(self._settings)
                    break
                except (FlopsError, PredictorDiedError, PredictorHangsError) as error:
                    log.error("a predictor cannot be replaced, trying again: %s", error)
                    self._metrics.restarted("load")
                    failures += 1
            self._ready[number] = predictor
            log.info("predictor %d holds the model again", number)

    async def _serve(self, predictor: Predictor) -> str:
        """Answer until the predictor is of no use any more; returns why."""
        while True:
            batch = await self._queue.take(self._batching.max_rows if self._together else 0)
            try:
                await self._answer(predictor, batch)
            except PredictorHangsError as error:
                log.error("a predictor is replaced: %s", error)
                self._fail(batch, TooSlowError(f"the model gave no answer within {self._timeout_s:g} s"))
                return "timeout"
            except PredictorDiedError as error:
                log.error("a predictor is replaced: %s", error)
                self._fail(batch, PredictorAwayError("the model's process ended - ask again in a moment"))
                return "crash"
            except asyncio.CancelledError:
                self._fail(batch, PredictorAwayError("the server is ending - ask another one"))
                raise

    async def _answer(self, predictor: Predictor, batch: Sequence["_Job"]) -> None:
        questions = [job.question for job in batch]
        rows = [question.rows for question in questions]
        self._metrics.batch_requests.observe(len(batch))
        self._metrics.batch_rows.observe(sum(rows))
        error: Exception | None = None
        answers: Sequence[Answer] | None = None
        try:
            answer, seconds = await predictor.ask(questions, self._timeout_s)
            self._metrics.predict_seconds.observe(seconds)
            answers = [answer] if len(batch) == 1 else answer.split(rows)
        except (RefusedError, ModelFailedError) as failure:
            error = failure
        if answers is not None:
            for job, one in zip(batch, answers, strict=True):
                if not job.waiter.done():
                    job.waiter.set_result(one)
            return
        if len(batch) == 1:
            assert error is not None
            self._fail(batch, error)
            return
        if error is None and self._together:
            self._together = False
            log.warning("the model does not answer row by row: requests are not joined any more")
        # One of them is at fault, or the answer cannot be divided: each for itself.
        for job in batch:
            if not job.waiter.done():
                await self._answer(predictor, [job])

    def _fail_waiting(self, reason: str) -> None:
        while len(self._queue):
            self._fail(self._queue.pop(0), PredictorAwayError(reason))

    def _fail(self, batch: Sequence["_Job"], error: Exception) -> None:
        for job in batch:
            _fail(job.waiter, error)


class _Job:
    """A question and who waits for its answer."""

    __slots__ = ("question", "waiter")

    def __init__(self, question: Question, waiter: "asyncio.Future[Answer]") -> None:
        self.question = question
        self.waiter = waiter


class _Queue:
    """Jobs in order of arrival."""

    def __init__(self) -> None:
        self._jobs: deque[_Job] = deque()
        self._takers: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: _Job) -> None:
        self._jobs.append(job)
        self._wake()

    async def take(self, max_rows: int) -> list[_Job]:
        """Wait for a job; return it and those behind it that may go with it.

        The taker wakes in the event loop's next turn, so requests that arrive in one turn go together.
        """
        while True:
            batch = self.pop(max_rows)
            if batch:
                if self._jobs:
                    self._wake()
                return batch
            taker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._takers.append(taker)
            try:
                await taker
            except asyncio.CancelledError:
                with contextlib.suppress(ValueError):
                    self._takers.remove(taker)
                if taker.done() and not taker.cancelled():
                    self._wake()
                raise

    def pop(self, max_rows: int) -> list[_Job]:
        """The first jobs that fit together, of at most so many rows unless one alone has more."""
        jobs = self._jobs
        batch: list[_Job] = []
        rows = 0
        while jobs:
            job = jobs[0]
            if not job.waiter.done():
                question = job.question
                if batch and (
                    question.key is None
                    or question.key != batch[0].question.key
                    or rows + question.rows > max_rows
                ):
                    break
                batch.append(job)
                rows += question.rows
            jobs.popleft()
            if batch and batch[0].question.key is None:
                break
        return batch

    def _wake(self) -> None:
        while self._takers:
            taker = self._takers.popleft()
            if not taker.done():
                taker.set_result(None)
                return


def _fail(waiter: "asyncio.Future[Answer]", error: Exception) -> None:
    if not waiter.done():
        waiter.set_exception(error)


def _pause_s(failures: int) -> float:
    """Before the next start, after so many that came to nothing."""
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (failures - 1)) if failures else 0.0
