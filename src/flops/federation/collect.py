"""Collecting the answers of one phase: who was asked, who answered, what is refused, and why.

A collection decides; it never waits. The round feeds it what members say, and it hands complete updates on in
slot order.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from flops.federation.hub import Said
from flops.federation.intake import MAX_EXAMPLES, Intake, NormGate, Post, finite, finite_metrics
from flops.federation.updates import LateError, RefusedError, Spool, Update
from flops_worker.tensors import Layout


class Collection:
    """What both phases share: the cohort, and each member's way from asked to answered or left out."""

    def __init__(self, task: str, cohort: Sequence[str]) -> None:
        self.task = task
        self.cohort = tuple(cohort)
        self._slots = {member: slot for slot, member in enumerate(self.cohort)}
        self.outstanding = set(cohort)
        self.left_out: dict[str, str] = {}

    @property
    def done(self) -> bool:
        return not self.outstanding

    @property
    def answered(self) -> int:
        return len(self.cohort) - len(self.outstanding) - len(self.left_out)

    def can_reach(self, quorum: int) -> bool:
        """Whether enough members have answered or still may."""
        return len(self.cohort) - len(self.left_out) >= quorum

    def leave_out(self, member: str, reason: str) -> None:
        """This member does not count in this phase."""
        self.leave_all_out([member], reason)

    def leave_all_out(self, members: Iterable[str], reason: str) -> None:
        """These members do not count in this phase."""
        for member in self.outstanding.intersection(members):
            self.outstanding.discard(member)
            self.left_out[member] = reason

    def check_task(self, said: Said) -> None:
        """Refuse an answer to another task, from an uninvited member, or a second one.

        Raises:
            LateError: to an earlier task, or from a member that was left out meanwhile.
            RefusedError: it must not count.
        """
        task = str(said.header.get("task"))[:80]
        if task != self.task:
            raise LateError(f"it answers {task}, not {self.task}: too late, or from another round")
        if said.learner not in self._slots:
            raise RefusedError(f"it was not asked to take part in {self.task}")
        if said.learner in self.left_out:
            raise LateError(f"it was left out of {self.task}: {self.left_out[said.learner]}")
        if said.learner not in self.outstanding:
            raise RefusedError(f"it has answered {self.task} already")


class TrainCollection(Collection):
    """Collects the updates of one round.

    Args:
        version: of the global model that the cohort was given.
        layouts: of members whose updates have another layout than the model.
        take: given each complete update, in slot order, as soon as all before it are decided.
    """

    def __init__(
        self,
        task: str,
        cohort: Sequence[str],
        *,
        version: int,
        layout: Layout,
        layouts: Mapping[str, Layout],
        spool: Spool,
        post: Post,
        max_examples: Mapping[str, int | None],
        take: Callable[[Update], None],
        gate: NormGate | None = None,
        needs_loss: bool = False,
    ) -> None:
        super().__init__(task, cohort)
        self._version, self._take, self._gate = version, take, gate
        self._intake = Intake(
            layout=layout,
            layouts=layouts,
            spool=spool,
            post=post,
            max_examples=max_examples,
            order=self._slots.__getitem__,
            needs_loss=needs_loss,
        )
        self._arrived: dict[str, Update] = {}
        self._next_slot = 0

    @property
    def announced(self) -> set[str]:
        """Members whose update is ready, and only waits for its way here."""
        return self._intake.announced

    def answer(self, said: Said) -> None:
        """A member's announcement of its update, perhaps with the update itself.

        Raises:
            RefusedError: it does not count; the member is left out of the round.
        """
        self.check_task(said)
        if said.learner in self.announced:
            raise RefusedError(f"it has answered {self.task} already")
        try:
            if said.header.get("version") != self._version:
                raise RefusedError(
                    f"it was made from version {str(said.header.get('version'))[:40]} of the model, "
                    f"not from {self._version}"
                )
            update = self._intake.announce(said, self._gate)
        except RefusedError as error:
            self.leave_out(said.learner, str(error))
            raise
        if update is not None:
            self._arrive(update)

    def uploaded(self, member: str) -> None:
        """The last block of a member's update is here.

        Raises:
            RefusedError: it does not count; the member is left out of the round.
        """
        try:
            update = self._intake.uploaded(member, self._gate)
        except RefusedError as error:
            self.leave_out(member, str(error))
            raise
        if update is not None:
            self._arrive(update)

    def restart_upload(self, member: str) -> None:
        """The member lost its connection; its announcement comes again when it is back."""
        self._intake.cancel(member)
        self._intake.ask_for_more()

    def leave_all_out(self, members: Iterable[str], reason: str) -> None:
        members = list(members)
        super().leave_all_out(members, reason)
        for member in members:
            self._intake.cancel(member)
        self._hand_on()
        self._intake.ask_for_more()

    def hand_slots_on(self, now: float) -> float:
        """Let others upload beside those that are slow; returns when to look again (the caller's clock)."""
        return self._intake.hand_slots_on(now)

    def close(self) -> None:
        """Nothing more is taken: give back what is half-way."""
        self._intake.close()
        for update in self._arrived.values():
            update.body.release()
        self._arrived.clear()

    def _arrive(self, update: Update) -> None:
        self.outstanding.discard(update.learner)
        self._arrived[update.learner] = update
        self._hand_on()

    def _hand_on(self) -> None:
        while self._next_slot < len(self.cohort):
            member = self.cohort[self._next_slot]
            update = self._arrived.pop(member, None)
            if update is not None:
                self._take(update)
            elif member not in self.left_out:
                return
            self._next_slot += 1


class EvaluateCollection(Collection):
    """Collects the members' evaluations of one global model."""

    def __init__(self, task: str, cohort: Sequence[str], max_examples: Mapping[str, int | None]) -> None:
        """Args: max_examples is how many each member can have evaluated; None: not known."""
        super().__init__(task, cohort)
        self._max_examples = max_examples
        self.results: dict[str, tuple[int, dict[str, float]]] = {}

    def answer(self, said: Said) -> None:
        """A member's evaluation.

        Raises:
            RefusedError: it does not count; the member is left out of the evaluation.
        """
        self.check_task(said)
        try:
            self.results[said.learner] = evaluation_of(said, self._max_examples.get(said.learner))
        except RefusedError as error:
            self.leave_out(said.learner, str(error))
            raise
        self.outstanding.discard(said.learner)

    def in_order(self) -> list[tuple[float, dict[str, float]]]:
        """Weights and metrics in slot order, so that sums do not depend on the order of arrival."""
        return [
            (float(self.results[name][0]), self.results[name][1])
            for name in self.cohort
            if name in self.results
        ]


def evaluation_of(said: Said, max_examples: int | None) -> tuple[int, dict[str, float]]:
    """Examples and metrics (loss and accuracy among them) of a member's evaluation.

    Args:
        max_examples: that it can have evaluated; None: not known.
    Raises:
        RefusedError: it does not count.
    """
    header = said.header
    num_examples = header.get("num_examples")
    if type(num_examples) is not int or not 1 <= num_examples <= (max_examples or MAX_EXAMPLES):
        raise RefusedError(f"it claims to have evaluated {str(num_examples)[:40]} examples")
    metrics = finite_metrics(header.get("metrics"))
    for name in ("loss", "accuracy"):
        value = finite(header.get(name))
        if value is None:
            raise RefusedError(f"its {name} is {str(header.get(name))[:40]}")
        metrics[name] = value
    return num_examples, metrics
