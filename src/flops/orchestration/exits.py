"""One thread that waits for the ends of all services at once: pidfds in an epoll, no polling."""

import logging
import os
import select
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)

_RETRY_S = 1.0


class ExitWatch:
    """Calls ``step`` with the names whose processes ended, after `wake`, and after the time it asked for.

    Args:
        step: runs in the thread; returns after how many seconds it wants to run at the latest (None: no
            need). It must call `drop` for every ended name it was given, or it is called again at once.
            An exception (out of descriptors, say) is logged and the step repeated a second later.
    """

    def __init__(self, step: Callable[[list[str]], float | None], name: str) -> None:
        self._step = step
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._lock = threading.Lock()
        self._names: dict[int, str] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, pidfd: int, name: str) -> None:
        """Watch a process; the pidfd is ours from now on."""
        with self._lock:
            self._names[pidfd] = name
        self._epoll.register(pidfd, select.EPOLLIN)

    def drop(self, pidfd: int) -> None:
        """Stop watching and close the pidfd."""
        with self._lock:
            del self._names[pidfd]
        self._epoll.unregister(pidfd)
        os.close(pidfd)

    def wake(self) -> None:
        with self._lock:
            if not self._closing.is_set():
                os.eventfd_write(self._wake, 1)

    def runs_here(self) -> bool:
        """Whether the caller is the thread itself."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """End the thread; the watched processes go on."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            os.eventfd_write(self._wake, 1)
        if self._thread.is_alive() and not self.runs_here():
            self._thread.join()
        self._epoll.close()
        os.close(self._wake)
        for pidfd in self._names:
            os.close(pidfd)
        self._names.clear()

    def _run(self) -> None:
        timeout_s: float | None = 0.0
        while not self._closing.is_set():
            ready = self._epoll.poll(timeout_s)
            if self._closing.is_set():
                return
            if any(descriptor == self._wake for descriptor, _ in ready):
                os.eventfd_read(self._wake)
            with self._lock:
                ended = [self._names[fd] for fd, _ in ready if fd in self._names]
            try:
                timeout_s = self._step(ended)
            except Exception:  # noqa: BLE001 - without this thread no end of a service is ever seen
                _log.exception("the ends of services are looked at again in %g s", _RETRY_S)
                self._closing.wait(_RETRY_S)
                timeout_s = 0.0
