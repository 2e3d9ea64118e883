"""Ending work from another thread: a flag with callbacks, and a bounded number of places that respects it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Cancelled(Exception):
    """The work was given up on request."""


class Cancellation:
    """A flag that is set once. Callbacks run in the thread that sets it, or at once where it is set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._callbacks: list[Callable[[], None]] = []

    def cancel(self) -> None:
        with self._lock:
            self._set = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def check(self) -> None:
        """Raises: Cancelled: the flag is set."""
        if self._set:
            raise Cancelled

    @property
    def is_set(self) -> bool:
        return self._set

    @contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """Within the block, ``callback`` is called when the flag is set."""
        with self._lock:
            now = self._set
            if not now:
                self._callbacks.append(callback)
        if now:
            callback()
        try:
            yield
        finally:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)


class Places:
    """So many may work at the same time; the others wait, until their cancellation wakes them."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._condition = threading.Condition()

    @contextmanager
    def take(self, cancellation: Cancellation) -> Iterator[None]:
        """Raises: Cancelled: while waiting, or before."""
        with cancellation.calling(self._wake), self._condition:
            self._condition.wait_for(lambda: self._free > 0 or cancellation.is_set)
            cancellation.check()
            self._free -= 1
        try:
            yield
        finally:
            with self._condition:
                self._free += 1
                self._condition.notify()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()
