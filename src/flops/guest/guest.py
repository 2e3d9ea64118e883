"""The guest: a worker process with the seat of one learner, and more of them where learners share it."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from flops.guest.attached import ATTACH_DEADLINE_S, Attached
from flops.guest.line import Dataset, Line
from flops.guest.process import Isolation, Process
from flops.guest.room import Room
from flops.guest.seat import Seat


class Guest(Seat):
    """User code, alive from `start` to `close`: a process, and the seat of its first learner (key 0)."""

    def __init__(self, process: Process | Attached, seed: int, dataset: Dataset | None) -> None:
        super().__init__(Line(process), 0, seed, dataset)
        self._process = process

    @classmethod
    def start(
        cls,
        room: Room,
        *,
        log: Path | None = None,
        isolate: bool = True,
        threads: int | None = None,
        seed: int = 0,
        dataset: Dataset | None = None,
        memory_mb: int | None = None,
    ) -> "Guest":
        """Start the user's interpreter on the user's checkout; imports nothing of it yet.

        Args:
            log: file that everything it prints is appended to.
            isolate: cut its network where the platform allows it, and drop root's privileges.
            threads: how many threads numerical libraries use in it.
            seed: of all random numbers, together with the round.
            dataset: called (in the thread of the request) when user code loads data; returns open Arrow IPC
                files, which are closed here. What it raises is raised by the request.
            memory_mb: limit of its private memory (RLIMIT_DATA).
        Raises:
            NotFoundError: interpreter or checkout are not there.
        """
        return cls(
            Process(room, log=log, isolate=isolate, threads=threads, memory_mb=memory_mb), seed, dataset
        )

    @classmethod
    def attach(
        cls,
        socket_path: Path,
        *,
        seed: int = 0,
        dataset: Dataset | None = None,
        deadline_s: float = ATTACH_DEADLINE_S,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> "Guest":
        """Wait for a worker that runs in a container of its own (``python -m flops_worker --connect``).

        It is its container that cuts its network and limits its memory. `close` dismisses it; after `kill`,
        and where it died, its orchestrator starts it again, and the next `attach` gets the new one.

        Args:
            socket_path: in a folder of mode 700 that these two containers share; made, and removed when the
                worker is there.
            seed: as of `start`; so is ``dataset``.
            unwanted: asked a few times a second; waiting ends when it says so.
        Raises:
            UnavailableError: none has come.
            GuestClosed: it is not wanted any more.
            InvalidInputError: the folder is open to others, or the path is too long.
        """
        return cls(Attached.wait_for(socket_path, deadline_s, unwanted), seed, dataset)

    def seat(self, key: int, *, seed: int = 0, dataset: Dataset | None = None) -> Seat:
        """The seat of another learner in the same process.

        What user code keeps in its ModelManager is the learner's own; what it keeps in modules and classes is
        shared by all learners of the process.

        Args:
            key: tells learners apart; 0 is the guest's own.
        """
        return Seat(self._line, key, seed, dataset)

    @property
    def pid(self) -> int:
        """0 where the worker's container hides it."""
        return self._process.pid

    @property
    def isolation(self) -> Isolation:
        return self._process.isolation

    def close(self, grace_s: float = 2.0) -> None:
        """End the guest: at once when it is idle, else `grace_s` later; requests under way end too."""
        self._line.shut(dismiss=True)
        self._process.wait(grace_s)
        self._free()

    def kill(self) -> None:
        """End the guest now."""
        self._line.shut()
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _free(self) -> None:
        self._line.free()
        self.drop_update()
