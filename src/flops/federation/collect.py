"""Collecting the answers of one phase: who was asked, who answered, what is refused, and why.

A collection decides; it never waits. The round loop feeds it what learners say, and it asks for the large
updates (a few at a time), checks everything, and hands complete updates on in slot order.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from flops.federation.blocks import Block
from flops.federation.hub import Said
from flops.federation.model_file import layout_digest
from flops.federation.updates import Body, MemoryBody, RefusedError, Spool, SpooledBody, Update
from flops_worker.tensors import Layout, LayoutError

MAX_EXAMPLES = 1 << 40
MAX_METRICS = 100
PARALLEL_UPLOADS = 3
SLOW_UPLOAD_S = 5.0
SLOW_UPLOAD_BYTES_PER_S = 20e6
# An upload that takes longer than this no longer keeps others waiting: a learner that drips its bytes costs a
# few seconds, not the round. Its spool file is all it holds.


class Post(Protocol):
    """How a collection speaks to learners (the hub, or a test's stand-in)."""

    def send(self, learner: str, header: dict[str, Any]) -> bool: ...
    def begin_upload(self, learner: str, task: str, body: SpooledBody) -> bool: ...
    def end_upload(self, learner: str) -> None: ...


class Collection:
    """What both phases share: the cohort, and each learner's way from asked to answered or left out."""

    def __init__(self, task: str, cohort: Sequence[str]) -> None:
        self.task = task
        self.cohort = tuple(cohort)
        self._slots = {learner: slot for slot, learner in enumerate(self.cohort)}
        self.outstanding = set(cohort)
        self.left_out: dict[str, str] = {}

    @property
    def done(self) -> bool:
        return not self.outstanding

    @property
    def answered(self) -> int:
        return len(self.cohort) - len(self.outstanding) - len(self.left_out)

    def can_reach(self, quorum: int) -> bool:
        """Whether enough learners have answered or still may."""
        return len(self.cohort) - len(self.left_out) >= quorum

    def leave_out(self, learner: str, reason: str) -> None:
        """This learner does not count in this phase."""
        if learner in self.outstanding:
            self.outstanding.discard(learner)
            self.left_out[learner] = reason

    def check_task(self, said: Said) -> None:
        """Refuse an answer to another task, from an uninvited learner, or a second one.

        Raises:
            RefusedError: it must not count.
        """
        task = str(said.header.get("task"))[:80]
        if task != self.task:
            raise RefusedError(f"it answers {task}, not {self.task}: too late, or from another round")
        if said.learner not in self._slots:
            raise RefusedError(f"it was not asked to take part in {self.task}")
        if said.learner not in self.outstanding:
            raise RefusedError(f"it has answered {self.task} already, or was left out of it")


class TrainCollection(Collection):
    """Collects the updates of one round."""

    def __init__(
        self,
        task: str,
        cohort: Sequence[str],
        *,
        layout: Layout,
        blocks: tuple[Block, ...],
        spool: Spool,
        post: Post,
        max_examples: Mapping[str, int | None],
        take: Callable[[Update], None],
    ) -> None:
        """Args: take is given each complete update, in slot order, as soon as all before it are decided."""
        super().__init__(task, cohort)
        self._layout, self._blocks, self._digest = layout, blocks, layout_digest(layout)
        self._spool, self._post = spool, post
        self._max_examples = max_examples
        self._take = take
        self._announced: deque[Update] = deque()
        self._uploading: dict[str, Update] = {}
        self._arrived: dict[str, Update] = {}
        self._since: dict[str, float] = {}
        self._slow: set[str] = set()
        self._next_slot = 0

    def answer(self, said: Said) -> None:
        """A learner's announcement of its update, perhaps with the update itself.

        Raises:
            RefusedError: it does not count; the learner is left out of the round.
        """
        self.check_task(said)
        if said.learner in self.announced:
            raise RefusedError(f"it has answered {self.task} already")
        try:
            update = self._announcement(said)
        except RefusedError as error:
            self.leave_out(said.learner, str(error))
            raise
        if isinstance(update.body, MemoryBody):
            self._arrive(update)
        else:
            self._announced.append(update)
            self._announced = deque(sorted(self._announced, key=lambda other: self._slots[other.learner]))
            self._ask_for_more()

    def uploaded(self, learner: str) -> None:
        """The last block of a learner's update is here."""
        update = self._uploading.pop(learner, None)
        self._forget_pace(learner)
        if update is not None:
            self._arrive(update)
        self._ask_for_more()

    @property
    def announced(self) -> set[str]:
        """Learners whose update is ready, and only waits for its way here."""
        return {update.learner for update in self._announced} | set(self._uploading)

    def restart_upload(self, learner: str) -> None:
        """The learner lost its connection; its announcement comes again when it is back."""
        self._cancel(learner)
        self._ask_for_more()

    def leave_out(self, learner: str, reason: str) -> None:
        super().leave_out(learner, reason)
        self._cancel(learner)
        self._hand_on()
        self._ask_for_more()

    def hand_slots_on(self, now: float) -> float:
        """Let others upload beside those that are slow; returns when to look again (the caller's clock)."""
        limit_s = SLOW_UPLOAD_S + self._layout.nbytes / SLOW_UPLOAD_BYTES_PER_S
        for learner in self._uploading:
            self._since.setdefault(learner, now)
        slow = {learner for learner, since in self._since.items() if now - since >= limit_s}
        if slow != self._slow:
            self._slow = slow
            self._ask_for_more()
        return min(
            (since + limit_s for name, since in self._since.items() if name not in slow), default=math.inf
        )

    def close(self) -> None:
        """Nothing more is taken: give back what is half-way."""
        for learner in [*self._uploading, *(update.learner for update in self._announced)]:
            self._cancel(learner)
        for update in self._arrived.values():
            update.body.release()
        self._arrived.clear()

    def _announcement(self, said: Said) -> Update:
        header = said.header
        limit = self._max_examples.get(said.learner) or MAX_EXAMPLES
        num_examples = header.get("num_examples")
        if type(num_examples) is not int or not 1 <= num_examples <= limit:
            raise RefusedError(
                f"it claims {str(num_examples)[:40]} training examples (1 to {limit} are possible)"
            )
        if header.get("digest") != self._digest:
            raise RefusedError(self._difference(header.get("layout")))
        body: Body
        if said.body is not None or not self._layout.nbytes:
            body = MemoryBody(self._layout, self._blocks, said.body or b"")
        else:
            body = _Announced()
        return Update(
            said.learner,
            num_examples,
            finite_metrics(header.get("metrics")),
            body,
            fit_s=_finite(header.get("fit_s")) or 0.0,
            nbytes=self._layout.nbytes,
        )

    def _difference(self, header: Any) -> str:
        try:
            difference = self._layout.difference(Layout.from_header(header))
        except (LayoutError, TypeError) as error:
            return f"its description of the parameters is broken: {error}"
        return f"after training it has {difference}" if difference else "its layout and digest disagree"

    def _ask_for_more(self) -> None:
        while self._announced and len(self._uploading) - len(self._slow) < PARALLEL_UPLOADS:
            update = self._announced.popleft()
            body = SpooledBody(self._spool, self._layout, self._blocks)
            update.body = body
            self._uploading[update.learner] = update
            if not self._post.begin_upload(update.learner, self.task, body):
                self._cancel(update.learner)  # it is gone; it announces again when it is back

    def _cancel(self, learner: str) -> None:
        self._announced = deque(update for update in self._announced if update.learner != learner)
        update = self._uploading.pop(learner, None)
        self._forget_pace(learner)
        if update is not None:
            self._post.end_upload(learner)
            update.body.release()

    def _forget_pace(self, learner: str) -> None:
        self._since.pop(learner, None)
        self._slow.discard(learner)

    def _arrive(self, update: Update) -> None:
        self.outstanding.discard(update.learner)
        self._arrived[update.learner] = update
        self._hand_on()

    def _hand_on(self) -> None:
        while self._next_slot < len(self.cohort):
            learner = self.cohort[self._next_slot]
            update = self._arrived.pop(learner, None)
            if update is not None:
                self._take(update)
            elif learner not in self.left_out:
                return
            self._next_slot += 1


class EvaluateCollection(Collection):
    """Collects the learners' evaluations of one global model."""

    def __init__(self, task: str, cohort: Sequence[str]) -> None:
        super().__init__(task, cohort)
        self.results: dict[str, tuple[int, dict[str, float]]] = {}

    def answer(self, said: Said) -> None:
        """A learner's evaluation.

        Raises:
            RefusedError: it does not count; the learner is left out of the evaluation.
        """
        self.check_task(said)
        header = said.header
        try:
            num_examples = header.get("num_examples")
            if type(num_examples) is not int or not 1 <= num_examples <= MAX_EXAMPLES:
                raise RefusedError(f"it claims to have evaluated {str(num_examples)[:40]} examples")
            metrics = finite_metrics(header.get("metrics"))
            for name in ("loss", "accuracy"):
                value = _finite(header.get(name))
                if value is None:
                    raise RefusedError(f"its {name} is {str(header.get(name))[:40]}")
                metrics[name] = value
        except RefusedError as error:
            self.leave_out(said.learner, str(error))
            raise
        self.outstanding.discard(said.learner)
        self.results[said.learner] = (num_examples, metrics)

    def in_order(self) -> list[tuple[float, dict[str, float]]]:
        """Weights and metrics in slot order, so that sums do not depend on the order of arrival."""
        return [
            (float(self.results[name][0]), self.results[name][1])
            for name in self.cohort
            if name in self.results
        ]


class _Announced:
    """Stands for a body that has not been asked for yet."""

    def read(self, block: Block) -> Any:
        raise AssertionError("an announced update has no body yet")

    def arrays(self) -> Any:
        raise AssertionError("an announced update has no body yet")

    def release(self) -> None:
        """Nothing is held."""


def finite_metrics(metrics: Any) -> dict[str, float]:
    """The finite numbers of a learner's own metrics, at most `MAX_METRICS`; the rest is dropped."""
    if not isinstance(metrics, dict):
        return {}
    numbers = ((str(name)[:100], _finite(value)) for name, value in list(metrics.items())[:MAX_METRICS])
    return {name: value for name, value in numbers if value is not None}


def _finite(value: Any) -> float | None:
    """A JSON value as a finite number; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer may have thousands of digits
        return None
    return number if math.isfinite(number) else None
