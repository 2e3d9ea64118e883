"""Two threads that follow one engine: one hears its events, the other acts on them.

An event is a hint to look, and so is the moment at which events are heard again after the engine was
away: whoever looks then misses nothing but the order.
"""

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from flops.core.errors import FlopsError, UnavailableError
from flops.orchestration.containers import Engine

_log = logging.getLogger(__name__)

_RETRY_S = 1.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0

Step = Callable[[Collection[str], bool], float | None]


class EngineEvents:
    """Calls ``step`` with what events were about, after `wake`, and after the time it asked for.

    Args:
        filters: which events, in the engine's words.
        subject: of an event, such as the id of its container.
        step: called with the subjects since the last call, and whether to look at everything, as when
            events were missed; returns after how many seconds it wants to run at the latest (None: no need).
            After an exception it is called again a second later, with the same.
    """

    def __init__(
        self,
        engine: Engine,
        filters: Mapping[str, Any],
        subject: Callable[[Mapping[str, Any]], str],
        step: Step,
        name: str,
    ) -> None:
        self._engine = engine
        self._filters = dict(filters)
        self._subject = subject
        self._step = step
        self._changed = threading.Condition()  # guards all below
        self._subjects: set[str] = set()
        self._everything = False
        self._woken = False
        self._closing = False
        self._away: UnavailableError | None = None
        self._stream: Any = None
        self._listener = threading.Thread(target=self._listen, name=f"{name}-events", daemon=True)
        self._actor = threading.Thread(target=self._act, name=name, daemon=True)

    def start(self) -> None:
        self._actor.start()
        self._listener.start()

    @property
    def away(self) -> UnavailableError | None:
        """Why events are not heard at present."""
        return self._away

    def tell(self, subject: str) -> None:
        """As if there had been an event."""
        with self._changed:
            self._subjects.add(subject)
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def acts_here(self) -> bool:
        """Whether the caller is the thread that calls ``step``."""
        return threading.current_thread() is self._actor

    def close(self) -> None:
        """End both threads; a step that is under way is waited for."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            stream = self._stream
        if stream is not None:
            _close(stream)
        for thread in (self._listener, self._actor):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()

    # hearing
    def _listen(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closing:
            try:
                with self._engine.asking("what becomes of services is not heard"):
                    stream = self._engine.api.events(decode=True, filters=self._filters)
            except FlopsError as error:
                if self._away is None:
                    _log.warning("%s", error)
                self._away = error if isinstance(error, UnavailableError) else UnavailableError(str(error))
            else:
                pause_s = _FIRST_PAUSE_S
                self._hear(stream)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=pause_s)
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)

    def _hear(self, stream: Any) -> None:
        with self._changed:
            if self._closing:
                _close(stream)
                return
            self._stream = stream
            self._everything = True
            self._changed.notify_all()
        if self._away is not None:
            _log.warning("the Docker engine at %s answers again", self._engine.url)
        self._away = None
        try:
            for event in stream:
                self.tell(self._subject(event))
        except Exception as error:  # noqa: BLE001 - a stream that broke, however: the next one is asked for
            _log.info("the events of the engine at %s broke off: %r", self._engine.url, error)
        finally:
            self._stream = None
            _close(stream)

    # acting
    def _act(self) -> None:
        due_s: float | None = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work, timeout=due_s)
                if self._closing:
                    return
                subjects, self._subjects = self._subjects, set()
                everything, self._everything = self._everything, False
                self._woken = False
            try:
                due_s = self._step(subjects, everything)
            except Exception as error:  # noqa: BLE001 - without this thread no end of a service is ever seen
                if isinstance(error, UnavailableError):
                    _log.info("services are looked at again in %g s: %s", _RETRY_S, error)
                else:
                    _log.exception("services are looked at again in %g s", _RETRY_S)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=_RETRY_S)
                    self._subjects |= subjects
                    self._everything |= everything
                due_s = 0.0

    def _has_work(self) -> bool:
        return self._closing or self._woken or self._everything or bool(self._subjects)


def _close(stream: Any) -> None:
    """Break off an answer of the engine, whoever reads it; its reader sees the end."""
    with suppress(Exception):
        stream.close()
