"""Turns of threads, in the order in which they asked."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that goes to whoever has waited longest.

    SQLite lets writers ask again and again, and gives up on one that was never lucky: with dozens of threads
    on a slow disk that is a matter of time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._holder: int | None = None
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Raises: RuntimeError: it is this thread's turn already, and would never come again."""
        me = threading.get_ident()
        mine = None
        with self._lock:
            if self._holder == me:
                raise RuntimeError("a transaction cannot write within another one of the same thread")
            if self._holder is None:
                self._holder = me
            else:
                mine = threading.Lock()
                mine.acquire()
                self._waiting.append((me, mine))
        if mine is not None:
            mine.acquire()  # until whoever goes before hands over
        try:
            yield
        finally:
            with self._lock:
                self._holder = None
                if self._waiting:
                    self._holder, following = self._waiting.popleft()
                    following.release()
