"""Worker processes that are started again when they die, and seats that outlive them."""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flops.guest.errors import GuestClosed, GuestDied
from flops.guest.guest import Guest
from flops.guest.line import Dataset
from flops.guest.results import EvaluateResult, FitResult
from flops.guest.seat import Seat

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_LIVES = 4
"""How many processes may be killed from outside under one learner's request before it is given up."""


class Worker:
    """A guest that is there whenever it is needed: where one has died, the next is started.

    Args:
        start: starts a process.
    """

    def __init__(self, start: Callable[[], Guest]) -> None:
        self._start = start
        self._changing = threading.Lock()
        self._guest: Guest | None = None
        self._life = 0
        self._over = False

    def guest(self) -> tuple[int, Guest]:
        """The process that lives now, and its number, from 1.

        Raises:
            GuestClosed: it was killed by us.
            NotFoundError: interpreter or checkout are not there.
            UnavailableError: none has come from its container.
        """
        with self._changing:
            if self._over:
                raise GuestClosed(where="the worker")
            if self._guest is None:
                self._guest = self._start()
                self._life += 1
                if self._life > 1:
                    log.warning("the worker was started again, its learners load their code and data again")
            return self._life, self._guest

    def lost(self, life: int) -> None:
        """The process of that number is of no use any more."""
        with self._changing:
            guest, self._guest = (self._guest, None) if life == self._life else (None, self._guest)
        if guest is not None:
            guest.kill()

    @property
    def over(self) -> bool:
        return self._over

    def kill(self) -> None:
        """End it for good; requests under way end too."""
        guest = self._last()
        if guest is not None:
            guest.kill()

    def dismiss(self) -> None:
        """`kill`, for one that has done its part: nobody is to start it again."""
        guest = self._last()
        if guest is not None:
            guest.close(0.0)

    def _last(self) -> Guest | None:
        self._over = True
        with self._changing:
            guest, self._guest = self._guest, None
        return guest


class LastingSeat:
    """A learner's seat at a worker, over the lives of its process.

    In the next process code and data are loaded again, by the learner's next request. What the user's code
    kept of former rounds is lost then, as it is with an agent that was killed. One thread at a time.

    A learner whose code ends the process in its own turn has failed; where the process was killed from
    outside (SIGKILL, perhaps for lack of memory) or cut off, its request is repeated in the next one. What
    was answered counts: a process may die as often as it likes between requests that succeed.
    """

    def __init__(self, worker: Worker, key: int, seed: int, dataset: Dataset | None) -> None:
        self._worker = worker
        self._key, self._seed, self._dataset = key, seed, dataset
        self._seat: Seat | None = None
        self._life = 0
        self._killed = 0
        self._loaded: list[Callable[[Seat], Any]] = []

    def load(self) -> None:
        """Import the repository and construct this learner's ModelManager."""
        self._ask(Seat.load)
        self._loaded.append(Seat.load)

    def load_data(self) -> None:
        """Let user code load the learner's data."""
        self._ask(Seat.load_data)
        self._loaded.append(Seat.load_data)

    def fit(self, model_fd: int, round_number: int, seed: int, config: Mapping[str, Any], /) -> FitResult:
        """See `Seat.fit`."""
        return self._ask(lambda seat: seat.fit(model_fd, round_number, seed, config))

    def evaluate(self, model_fd: int, round_number: int, config: Mapping[str, Any], /) -> EvaluateResult:
        """See `Seat.evaluate`."""
        return self._ask(lambda seat: seat.evaluate(model_fd, round_number, config))

    def drop_update(self) -> None:
        """See `Seat.drop_update`."""
        if self._seat is not None:
            self._seat.drop_update()

    def leave(self) -> None:
        """See `Seat.leave`."""
        self._loaded.clear()
        if self._seat is not None and not self._worker.over:
            self._seat.leave()

    def _ask(self, request: Callable[[Seat], Result]) -> Result:
        while True:
            life, guest = self._worker.guest()
            try:
                result = request(self._seat_at(life, guest))
            except GuestDied as error:
                self._worker.lost(life)
                self._killed += 1
                if not error.from_outside or self._killed >= MAX_LIVES:
                    raise
            except GuestClosed:  # by us, or it died in another learner's turn
                if self._worker.over:
                    raise
                self._worker.lost(life)
            else:
                self._killed = 0
                return result

    def _seat_at(self, life: int, guest: Guest) -> Seat:
        if self._seat is None or self._life != life:
            self.drop_update()
            self._seat, self._life = guest.seat(self._key, seed=self._seed, dataset=self._dataset), life
            for step in self._loaded:
                step(self._seat)
        return self._seat
