"""What was looked up just now, kept for as long as nothing of it changes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from flops.core.clock import Clock

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key, each of one version of what it was made of. Safe from any thread.

    The version is to be asked for before the look-up: what changes meanwhile has another one then, and what
    was looked up is never given for it.

    Args:
        kept_s: so long at most a change goes unseen that raised no version.
        most: so much is kept, of what was used last.
        size: of a value, in the same unit; each counts as 1 without.
    """

    def __init__(
        self, clock: Clock, *, kept_s: float, most: int, size: Callable[[Value], int] = lambda _: 1
    ) -> None:
        self._clock = clock
        self._kept_s, self._most, self._size = kept_s, most, size
        self._lock = threading.Lock()
        self._values: OrderedDict[Key, tuple[Value, int, float]] = OrderedDict()
        self._held = 0

    def get(self, key: Key, version: int = 0) -> Value | None:
        """None: it has to be looked up."""
        with self._lock:
            value, known, until = self._values.get(key, (None, version, 0.0))
            if known != version or until <= self._clock.monotonic():
                return None
            self._values.move_to_end(key)
        return value

    def keep(self, key: Key, value: Value, version: int = 0) -> None:
        """Keep what was looked up, after the version was asked for."""
        with self._lock:
            if key in self._values:
                self._held -= self._size(self._values.pop(key)[0])
            self._values[key] = value, version, self._clock.monotonic() + self._kept_s
            self._held += self._size(value)
            while self._held > self._most:
                _, (oldest, _, _) = self._values.popitem(last=False)
                self._held -= self._size(oldest)
