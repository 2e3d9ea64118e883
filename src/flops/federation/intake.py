"""The intake: updates on their way in, from announcement to complete and checked.

It decides and never waits. A small update comes beside its announcement; a large one is asked for when there
is room (a few at a time), so memory is bounded by what is asked for, and an update that is refused by its
announcement costs no bytes.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import numpy as np

from flops.federation.blocks import LARGEST, LARGEST_SUM, Block, blocks
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
    """How the intake speaks to members (the hub, or a test's stand-in)."""

    def send(self, learner: str, header: dict[str, Any]) -> bool: ...
    def begin_upload(self, learner: str, task: str, body: SpooledBody) -> bool: ...
    def end_upload(self, learner: str) -> None: ...


class NormGate:
    """Refuses updates that are too far away from the model they were made from."""

    def __init__(self, model: memoryview, most: float) -> None:
        """Args: most is the largest L2 norm of the difference between update and model."""
        self._model, self._most = model, most

    @classmethod
    def of(cls, model: memoryview, most: float | None) -> Self | None:
        """The gate of a training; None where it has none."""
        return None if most is None else cls(model, most)

    def check(self, body: Body, blocks: tuple[Block, ...]) -> None:
        """Raises RefusedError for an update beyond the gate."""
        total = 0.0
        for block in blocks:
            difference = body.read(block).astype(np.float64)
            difference -= block.view(self._model[block.offset : block.end])
            total += float(np.dot(difference, difference))
        if not math.sqrt(total) <= self._most:
            raise RefusedError(
                f"it is {math.sqrt(total):.4g} away from the global model (max_update_norm is {self._most:g})"
            )


class Intake:
    """Takes in the updates of one aggregator's members; used by one thread.

    Args:
        layout: of the updates of all members that `layouts` does not name.
        layouts: of members that send sums.
        needs_loss: an update without the metric ``train_loss`` is of no use.
        order: whose large update is asked for first, the smallest first.
    """

    def __init__(
        self,
        *,
        layout: Layout,
        layouts: Mapping[str, Layout] | None = None,
        spool: Spool,
        post: Post,
        max_examples: Mapping[str, int | None],
        order: Callable[[str], int],
        needs_loss: bool = False,
    ) -> None:
        self._needs_loss = needs_loss
        self._expected = _Expected(layout)
        self._special = {name: _Expected(sums, LARGEST_SUM) for name, sums in (layouts or {}).items()}
        self._spool, self._post = spool, post
        self._max_examples, self._order = max_examples, order
        self._announced: deque[Update] = deque()
        self._uploading: dict[str, Update] = {}
        self._since: dict[str, float] = {}
        self._slow: set[str] = set()

    @property
    def announced(self) -> set[str]:
        """Members whose update is ready, and only waits for its way here."""
        return {update.learner for update in self._announced} | set(self._uploading)

    def announce(self, said: Said, gate: NormGate | None = None) -> Update | None:
        """A member's announcement; returns its update where that came along, else asks for it in its turn.

        Raises:
            RefusedError: it does not count.
        """
        update = self._announcement(said)
        if isinstance(update.body, MemoryBody):
            return self._gated(update, gate)
        self._announced.append(update)
        self._announced = deque(sorted(self._announced, key=lambda other: self._order(other.learner)))
        self.ask_for_more()
        return None

    def uploaded(self, member: str, gate: NormGate | None = None) -> Update | None:
        """The last block of a member's update is here; None where it is not waited for any more.

        Raises:
            RefusedError: it does not count after all.
        """
        update = self._uploading.pop(member, None)
        self._forget_pace(member)
        self.ask_for_more()
        return self._gated(update, gate) if update is not None else None

    def cancel(self, member: str) -> None:
        """Drop what there is of a member's update; it may announce another one. Asks nobody else yet."""
        self._announced = deque(update for update in self._announced if update.learner != member)
        update = self._uploading.pop(member, None)
        self._forget_pace(member)
        if update is not None:
            self._post.end_upload(member)
            update.body.release()

    def ask_for_more(self) -> None:
        """Use what room there is."""
        while self._announced and len(self._uploading) - len(self._slow) < PARALLEL_UPLOADS:
            update = self._announced.popleft()
            expected = self._of(update.learner)
            body = SpooledBody(self._spool, expected.layout, expected.blocks, expected.largest)
            update.body = body
            self._uploading[update.learner] = update
            if not self._post.begin_upload(update.learner, update.task, body):
                self.cancel(update.learner)  # it is gone; it announces again when it is back

    def hand_slots_on(self, now: float) -> float:
        """Let others upload beside those that are slow; returns when to look again (the caller's clock)."""
        limits = {
            member: SLOW_UPLOAD_S + self._of(member).layout.nbytes / SLOW_UPLOAD_BYTES_PER_S
            for member in self._uploading
        }
        for member in self._uploading:
            self._since.setdefault(member, now)
        slow = {member for member, since in self._since.items() if now - since >= limits[member]}
        if slow != self._slow:
            self._slow = slow
            self.ask_for_more()
        return min(
            (since + limits[member] for member, since in self._since.items() if member not in slow),
            default=math.inf,
        )

    def close(self) -> None:
        """Nothing more is taken: give back what is half-way."""
        for member in self.announced:
            self.cancel(member)

    def _of(self, member: str) -> "_Expected":
        return self._special.get(member, self._expected)

    def _gated(self, update: Update, gate: NormGate | None) -> Update:
        if gate is not None and update.learner not in self._special:
            try:
                gate.check(update.body, self._expected.blocks)
            except RefusedError:
                update.body.release()
                raise
        return update

    def _forget_pace(self, member: str) -> None:
        self._since.pop(member, None)
        self._slow.discard(member)

    def _announcement(self, said: Said) -> Update:
        header, expected = said.header, self._of(said.learner)
        limit = self._max_examples.get(said.learner) or MAX_EXAMPLES
        num_examples = header.get("num_examples")
        if type(num_examples) is not int or not 1 <= num_examples <= limit:
            raise RefusedError(
                f"it claims {str(num_examples)[:40]} training examples (1 to {limit} are possible)"
            )
        if header.get("digest") != expected.digest:
            raise RefusedError(expected.difference(header.get("layout")))
        metrics = finite_metrics(header.get("metrics"))
        if self._needs_loss and "train_loss" not in metrics:
            raise RefusedError("it does not say the loss before training, which this strategy weighs it by")
        body: Body
        if said.body is not None or not expected.layout.nbytes:
            body = MemoryBody(expected.layout, expected.blocks, said.body or b"", expected.largest)
        else:
            body = _Announced()
        version = header.get("version")
        return Update(
            said.learner,
            num_examples,
            metrics,
            body,
            fit_s=finite(header.get("fit_s")) or 0.0,
            nbytes=expected.layout.nbytes,
            task=str(header.get("task")),
            version=version if type(version) is int else -1,
        )


class _Expected:
    """What a member's updates look like."""

    def __init__(self, layout: Layout, largest: float = LARGEST) -> None:
        self.layout, self.blocks, self.digest = layout, blocks(layout), layout_digest(layout)
        self.largest = largest

    def difference(self, header: Any) -> str:
        if header is None:
            return "its parameters are not those that were asked for"
        try:
            difference = self.layout.difference(Layout.from_header(header))
        except (LayoutError, TypeError) as error:
            return f"its description of the parameters is broken: {error}"
        return f"after training it has {difference}" if difference else "its layout and digest disagree"


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
    numbers = ((str(name)[:100], finite(value)) for name, value in list(metrics.items())[:MAX_METRICS])
    return {name: value for name, value in numbers if value is not None}


def finite(value: Any) -> float | None:
    """A JSON value as a finite number; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer may have thousands of digits
        return None
    return number if math.isfinite(number) else None
