"""When tokens were used last: known at once, written down together, so that nobody who reads waits for those
who write.
"""

import logging
import threading

import sqlalchemy as sa

from flops.core.clock import Clock
from flops.core.errors import FlopsError
from flops.identity import tables
from flops.persistence import writing

log = logging.getLogger(__name__)

_NOTED_EVERY_S = 60.0
"""Of one token."""
_WRITTEN_EVERY_S = 10.0
"""So much of it a manager that is killed forgets."""


class Uses:
    """Of all tokens. Safe from any thread."""

    def __init__(self, engine: sa.Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._lock = threading.Lock()
        self._noted: dict[str, float] = {}
        self._written = clock.monotonic()

    def note(self, number: str, known: float | None) -> None:
        """A token is used now; its last use that the database knew is ``known``. Never blocks."""
        now = self._clock.now()
        last = self.last(number, known)
        if last is None or now - last >= _NOTED_EVERY_S:
            with self._lock:
                self._noted[number] = now

    def last(self, number: str, known: float | None) -> float | None:
        """The last use, of what the database knew and what it does not know yet."""
        with self._lock:
            noted = self._noted.get(number)
        return known if noted is None else max(noted, known or 0.0)

    def write_if_due(self) -> None:
        if self._clock.monotonic() - self._written >= _WRITTEN_EVERY_S:
            self.write()

    def write(self) -> None:
        """Into the database, all of it; while that is away it stays here."""
        self._written = self._clock.monotonic()
        with self._lock:
            noted = dict(self._noted)
        if not noted:
            return
        table = tables.tokens
        query = sa.update(table).where(table.c.id == sa.bindparam("number"))
        values = [{"number": number, "at": at} for number, at in noted.items()]
        try:
            with writing(self._engine) as connection:
                connection.execute(query.values(last_used=sa.bindparam("at")), values)
        except FlopsError as error:
            log.info("the last uses of tokens are not written yet: %s", error)
            return
        with self._lock:
            self._noted = {key: at for key, at in self._noted.items() if noted.get(key) != at}
