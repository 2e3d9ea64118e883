"""Who wants to know that something was committed: wakes threads and event loops, and carries no content.

A listener learns only that there may be something new and reads the store; so a wake-up may be given twice,
or too early, and none is ever lost. Whoever keeps what they read asks for its `version` before they read.
"""

import threading
from collections.abc import Callable
from contextlib import suppress

Listener = Callable[[], None]


class Broadcast:
    """Listeners by project, or by what else changes. Safe from any thread; they must neither block nor
    raise.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[str, list[Listener]] = {}
        self._version = 0
        self._versions: dict[str, int] = {}
        self.closed = False

    def listen(self, subject: str, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` after each change of the subject, until the answered function is called."""
        with self._lock:
            self._listeners.setdefault(subject, []).append(listener)

        def end() -> None:
            with self._lock, suppress(KeyError, ValueError):
                listeners = self._listeners[subject]
                listeners.remove(listener)
                if not listeners:
                    del self._listeners[subject]

        return end

    def notify(self, subject: str) -> None:
        with self._lock:
            self._version += 1
            self._versions[subject] = self._version
            listeners = tuple(self._listeners.get(subject, ()))
        for listener in listeners:
            listener()

    def version(self, subject: str | None = None) -> int:
        """Another one after each change of the subject; None: of anything."""
        with self._lock:
            return self._version if subject is None else self._versions.get(subject, 0)

    def close(self) -> None:
        """Wake everybody for the last time: `closed` is true from now on."""
        with self._lock:
            self.closed = True
            listeners = [item for items in self._listeners.values() for item in items]
        for listener in listeners:
            listener()
