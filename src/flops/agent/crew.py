"""The learners of one agent, and the workers that do their work.

Every learner has its own conversation with the aggregator, to which it is one like any other. Learner k lives
on worker k modulo their number, for good, since its state is there; a worker's learners take turns in the
order in which their tasks come.
"""

import logging
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

from flops.agent.fragments import Fragments
from flops.core.errors import FailedError, FlopsError
from flops.federation import AgentConfig
from flops.federation import conversation as conversations
from flops.federation import learner as learning
from flops.federation.channels import Channels
from flops.federation.config import VirtualLearner
from flops.federation.conversation import Conversation, keep_beating
from flops.federation.kept_models import KeptModels
from flops.federation.learner import Learner
from flops.federation.tally import Tally
from flops.federation.wire import INLINE_BYTES
from flops.guest import Guest, LastingSeat, Room, Worker

log = logging.getLogger(__name__)

_STACK_BYTES = 1 << 20
"""Of many learners' threads: the default, 8 MiB, times a thousand may be more than the system grants."""


@dataclass
class _Member:
    """One learner in this process."""

    name: str
    conversation: Conversation
    learner: Learner
    seat: LastingSeat
    goes_on: bool = True
    error: FlopsError | None = None


class Crew:
    """All learners of an agent, from their start to the end of the project."""

    def __init__(self, config: AgentConfig) -> None:
        """Start the workers, but for one that comes from a container of its own.

        Raises:
            NotFoundError: interpreter or checkout are not there.
        """
        self._config = config
        self._fragments = Fragments(config.data)
        learners = config.learners()
        self._models = KeptModels() if len(learners) > 1 else None
        self._channels = Channels()
        self._tally = _tally(config)
        count = min(config.workers, len(learners))
        self._desks = [_Desk(self._worker(number, count)) for number in range(count)]
        for place, learner in enumerate(learners):
            desk = self._desks[place % count]
            desk.members.append(self._member(place, learner, desk))

    def take_part(self) -> None:
        """Take part until the project is over.

        Raises:
            FlopsError: the part of the last learner has ended before; the aggregator was told why.
        """
        members = [member for desk in self._desks for member in desk.members]
        if len(members) > 1:
            threading.stack_size(_STACK_BYTES)
            log.info("%d learners on %d workers", len(members), len(self._desks))
            # What is news of one learner is noise of a thousand.
            for noisy in (conversations.__name__, learning.__name__):
                logging.getLogger(noisy).setLevel(logging.WARNING)
        for desk in self._desks:
            threading.Thread(target=desk.work, name="work", daemon=True).start()
        everyone = [member.conversation for member in members]
        threading.Thread(target=keep_beating, args=(everyone,), name="beat", daemon=True).start()
        threads = [threading.Thread(target=_converse, args=(member,), daemon=True) for member in members[1:]]
        for thread in threads:
            thread.start()
        _converse(members[0])
        for thread in threads:
            thread.join()
        failed = [member.error for member in members if member.error is not None]
        if len(failed) == len(members):
            raise failed[-1]

    def kill(self) -> None:
        """End the workers; the learners' part goes on with those of the next agent."""
        for desk in self._desks:
            desk.worker.kill()

    def dismiss(self) -> None:
        """End the workers: the learners' part is over."""
        for desk in self._desks:
            desk.worker.dismiss()

    def _member(self, place: int, learner: VirtualLearner, desk: "_Desk") -> _Member:
        seat = LastingSeat(desk.worker, place, learner.seed, lambda: self._fragments.of_site(learner.site))
        conversation = Conversation(
            self._config.link(learner),
            on_task=lambda: desk.inbox.put(member),
            models=self._models,
            channels=self._channels,
            tally=self._tally,
        )
        member = _Member(learner.learner, conversation, Learner(learner.learner, conversation, seat), seat)
        return member

    def _worker(self, number: int, count: int) -> Worker:
        config = self._config
        if config.worker_socket:
            return _attached(Path(config.worker_socket))
        log_file = Path(config.log) if config.log else None
        if log_file is not None and count > 1:
            log_file = log_file.with_stem(f"{log_file.stem}-worker-{number + 1}")
        seats = len(range(number, len(config.learners()), count))

        def start() -> Guest:
            guest = Guest.start(
                Room(Path(config.python), Path(config.code)),
                log=log_file,
                isolate=config.isolate,
                threads=config.threads,
                memory_mb=config.memory_mb * seats if config.memory_mb else None,
            )
            log.info("a worker runs, isolation: %s", guest.isolation)
            if config.insist and not guest.isolation.network_cut:
                guest.kill()
                raise FailedError(
                    f"the network of the user's code cannot be cut here ({guest.isolation.reason}), and "
                    "it must not run with one - allow user namespaces on this machine"
                )
            return guest

        worker = Worker(start)
        worker.guest()
        return worker


def _tally(config: AgentConfig) -> Tally | None:
    """Raises FailedError: it cannot be written."""
    if config.tally is None:
        return None
    try:
        return Tally(Path(config.tally))
    except OSError as error:
        raise FailedError(
            f"what is sent cannot be counted in '{config.tally}': {error} - check its folder"
        ) from error


def _attached(path: Path) -> Worker:
    """A worker in a container of its own, which is waited for when it is needed."""

    def attach() -> Guest:
        guest = Guest.attach(path, unwanted=lambda: worker.over)
        log.info("the worker has come")
        return guest

    worker = Worker(attach)
    return worker


class _Desk:
    """One worker and its learners."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.members: list[_Member] = []
        self.inbox: queue.SimpleQueue[_Member] = queue.SimpleQueue()

    def work(self) -> None:
        """Prepare all learners, then do their tasks, one after the other."""
        for member in self.members:
            self._settle(member, member.learner.prepare())
        while True:
            member = self.inbox.get()
            task = member.conversation.next_task(0) if member.goes_on else None
            if task is not None:
                self._settle(member, member.learner.do(task))
                if task.layout.nbytes <= INLINE_BYTES:
                    member.seat.drop_update()  # it has been sent along

    def _settle(self, member: _Member, goes_on: bool) -> None:
        if not goes_on:
            member.goes_on = False
            member.seat.leave()


def _converse(member: _Member) -> None:
    """Keep one learner's conversation to its end."""
    try:
        member.conversation.run()
    except FlopsError as error:
        member.error = error
        log.warning("learner %s has ended: %s", member.name, error)
