"""Who wants to hear of state changes, for adapters that deliver them by themselves."""

import logging
import threading

from flops.orchestration.port import ServiceStatus, Watcher

_log = logging.getLogger(__name__)


class Watchers:
    """The callbacks of `Orchestrator.watch`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: tuple[Entry, ...] = ()

    def add(self, callback: Watcher) -> "Entry":
        entry = Entry(self, callback)
        with self._lock:
            self._entries = (*self._entries, entry)
        return entry

    def discard(self, entry: "Entry") -> None:
        with self._lock:
            self._entries = tuple(other for other in self._entries if other is not entry)

    def deliver(self, status: ServiceStatus) -> None:
        """Call everybody, in the order they came; one that fails does not keep the news from the rest."""
        for entry in self._entries:
            try:
                entry.callback(status)
            except Exception:  # noqa: BLE001 - it is the caller's code, and our thread must go on
                _log.exception("a watcher failed at service %s", status.name)


class Entry:
    """One subscription."""

    def __init__(self, watchers: Watchers, callback: Watcher) -> None:
        self.callback = callback
        self._watchers = watchers

    def close(self) -> None:
        self._watchers.discard(self)
