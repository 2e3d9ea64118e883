"""Which manager acts, where several share one PostgreSQL: a lease that its holder renews.

Owns: the table `manager_lease`, and the thread that renews. The table is no part of the migrations: it says
nothing that a backup would want, and has to be there before anybody may migrate.
Promises: at no moment two hold it. Its end is told by the clock of the database; the holder itself stops a
second earlier, by a clock of its machine that also counts while that sleeps or the process is frozen. Each
new holder has a higher epoch; whoever writes proves within the same transaction that the epoch is still its
own, and ends the sessions of the holder before it first, so that nothing of that one is under way
(docs/decisions/0018).
"""

import json
import logging
import mmap
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.rows import dict_row

from flops.core.errors import ConflictError, FlopsError
from flops.core.term import boot_time, lease_end, set_lease_end
from flops.persistence.errors import DatabaseAwayError, LeaseLostError
from flops.persistence.living import end, is_gone, is_here, own_process

log = logging.getLogger(__name__)

EXPIRES_S = 6.0
"""After its last renewal another manager may take the lease."""
HOLDS_S = 5.0
"""After its last renewal the holder does nothing any more."""
RENEW_S = 1.5
POLL_S = 0.5
_STATEMENT_TIMEOUT_MS = 3000

_TABLE = """
CREATE TABLE IF NOT EXISTS manager_lease (
    name VARCHAR(20) PRIMARY KEY,
    epoch BIGINT NOT NULL,
    holder VARCHAR(40) NOT NULL,
    place VARCHAR(300) NOT NULL,
    address VARCHAR(300),
    process VARCHAR(300) NOT NULL,
    expires TIMESTAMPTZ NOT NULL
)"""
_LOOK = """
SELECT epoch, holder, place, address, process, expires::text AS expires,
    expires > clock_timestamp() AS holds
FROM manager_lease WHERE name = 'manager'"""
_END_SESSIONS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name = %s AND datname = current_database() AND pid <> pg_backend_pid()"""
_TAKE = """
INSERT INTO manager_lease (name, epoch, holder, place, address, process, expires)
VALUES ('manager', 1, %(holder)s, %(place)s, NULL, %(process)s,
    clock_timestamp() + make_interval(secs => %(expires_s)s))
ON CONFLICT (name) DO UPDATE SET epoch = manager_lease.epoch + 1, holder = excluded.holder,
    place = excluded.place, address = NULL, process = excluded.process, expires = excluded.expires
WHERE manager_lease.epoch = %(seen)s AND (%(gone)s OR manager_lease.expires <= clock_timestamp())
RETURNING epoch"""
_RENEW = """
UPDATE manager_lease SET expires = clock_timestamp() + make_interval(secs => %(expires_s)s),
    address = %(address)s
WHERE name = 'manager' AND epoch = %(epoch)s AND holder = %(holder)s"""
_RELEASE = """
UPDATE manager_lease SET expires = clock_timestamp(), holder = '', address = NULL
WHERE name = 'manager' AND epoch = %s AND holder = %s"""
_VERIFY = "SELECT epoch, holder FROM manager_lease WHERE name = 'manager'"


@dataclass(frozen=True)
class Holder:
    """Who held the lease when somebody looked."""

    epoch: int
    holder: str
    place: str
    """Process and machine, in words."""
    address: str | None
    """URL of its REST API, once it answers."""
    process: Mapping[str, Any]
    expires: str
    holds: bool

    @property
    def is_here(self) -> bool:
        """Whether it ran on this machine, among the processes that are seen from here."""
        return is_here(self.process)

    def __str__(self) -> str:
        return f"{self.address} ({self.place})" if self.address else self.place


@dataclass(frozen=True)
class StandBy:
    """How a manager waits until the lease is free.

    Args:
        given_up: ends the waiting.
        told: called with the holder whenever it is another one, or has another address.
    """

    given_up: threading.Event = field(default_factory=threading.Event)
    told: Callable[[Holder], None] = lambda holder: None


class GivenUp(Exception):
    """The waiting was ended on request."""


class Lease:
    """One manager's claim to act. `take` once, `release` at the end.

    Args:
        connect: makes a session of the database, with autocommit.
        translated: a driver's error in words for the operator; None: it is a mistake of ours.
        writers: the advisory lock of writers.
        place: where the database is, in words.
    """

    def __init__(
        self,
        connect: Callable[[int], "psycopg.Connection[Any]"],
        translated: Callable[[BaseException], FlopsError | None],
        writers: int,
        place: str,
    ) -> None:
        self.holder = uuid.uuid4().hex
        self.address: str | None = None
        self.on_lost: Callable[[str], None] = lambda message: None
        self._connect = connect
        self._translated = translated
        self._writers = writers
        self._place = place
        self._session: psycopg.Connection[Any] | None = None
        self._epoch = 0
        self._predecessor: Mapping[str, Any] = {}
        self._lost: str | None = None
        self._turn = threading.Lock()
        self._ended = threading.Event()
        self._announced = threading.Event()
        self._keeper: threading.Thread | None = None
        # Steps of their own processes look at it there: nobody could tell them while we are frozen.
        self.until_fd = os.memfd_create("flops-lease", os.MFD_CLOEXEC)
        os.ftruncate(self.until_fd, mmap.PAGESIZE)
        self._until = mmap.mmap(self.until_fd, mmap.PAGESIZE)

    @property
    def application_name(self) -> str:
        """Of all sessions of this manager: whoever takes over ends them."""
        return _application_name(self.holder)

    @property
    def holds(self) -> bool:
        """Whether this manager may act now."""
        return self._lost is None and boot_time() < lease_end(self._until)

    def check(self) -> None:
        """Raises: LeaseLostError, DatabaseAwayError: this manager must not act, or not now."""
        if self._lost is not None:
            raise LeaseLostError(self._lost)
        if not self.holds:
            raise DatabaseAwayError(
                f"the lease of this manager was not renewed for {HOLDS_S:g} s - see to the database: "
                "projects wait, and go on here or in the manager that takes over"
            )

    def verify(self, connection: sa.Connection) -> None:
        """See, within a transaction that holds the lock of writers, that the lease is still ours.

        Raises:
            LeaseLostError: it is not; the transaction must not commit.
        """
        row = connection.exec_driver_sql(_VERIFY).first()
        if row is None or (row.epoch, row.holder) != (self._epoch, self.holder):
            self._lose()
            raise LeaseLostError(str(self._lost))

    # taking it

    def take(self, standing_by: StandBy | None = None) -> None:
        """Take the lease; without ``standing_by`` only one that is free or that its holder does not renew.

        Raises:
            ConflictError: another manager holds and renews it.
            DatabaseAwayError: the database does not let us ask; one who stands by asks again.
            GivenUp: the waiting was ended.
        """
        waits = standing_by or StandBy()
        seen: Holder | None = None
        complained = False
        while True:
            try:
                now = self._try()
                complained = False
            except DatabaseAwayError as error:
                if standing_by is None:
                    raise
                if not complained:
                    log.warning("%s", error)
                now, complained = seen, True
            if self._epoch:
                break
            if now is not None and (seen is None or (now.holder, now.address) != (seen.holder, seen.address)):
                waits.told(now)
            if standing_by is None and now is not None and seen is not None and now.expires != seen.expires:
                raise ConflictError(
                    f"another manager uses the database {self._place}: {now} - stop it with 'flops down' "
                    "where it runs, let this one wait with --standby, or name another FLOPS_DATABASE"
                )
            seen = now
            if waits.given_up.wait(POLL_S):
                raise GivenUp
        self._keeper = threading.Thread(target=self._keep, name="flops-lease", daemon=True)
        self._keeper.start()

    def _try(self) -> Holder | None:
        """Take it where it is free; answers who holds it otherwise."""
        with self._asking() as session:
            with suppress(psycopg.errors.UndefinedTable):
                seen = self._look(session)
                gone = seen is not None and seen.holds and is_gone(seen.process)
                if seen is not None and seen.holds and not gone:
                    return seen
                self._take(session, seen, gone)
                return seen
            with session.transaction():
                session.execute(f"SELECT pg_advisory_xact_lock({self._writers})".encode())
                session.execute(_TABLE.encode())
        return None

    def _look(self, session: "psycopg.Connection[Any]") -> Holder | None:
        row = session.cursor(row_factory=dict_row).execute(_LOOK.encode()).fetchone()
        return Holder(**(row | {"process": json.loads(row["process"])})) if row is not None else None

    def _take(self, session: "psycopg.Connection[Any]", seen: Holder | None, gone: bool) -> None:
        if seen is not None and seen.holder:
            # A frozen one may be in the midst of a transaction, and hold the lock of writers.
            with suppress(psycopg.errors.InsufficientPrivilege):
                session.execute(_END_SESSIONS.encode(), [_application_name(seen.holder)])
        process = own_process()
        with session.transaction():
            session.execute(f"SELECT pg_advisory_xact_lock({self._writers})".encode())
            begun = boot_time()
            row = session.execute(
                _TAKE.encode(),
                {
                    "holder": self.holder,
                    "place": f"pid {process['pid']} on {process['host']}"[:300],
                    "process": json.dumps(process),
                    "seen": seen.epoch if seen is not None else 0,
                    "gone": gone,
                    "expires_s": EXPIRES_S,
                },
            ).fetchone()
        if row is not None:
            self._set_until(begun + HOLDS_S)
            self._epoch = int(row[0])
            self._predecessor = seen.process if seen is not None and seen.holder else {}

    def end_predecessor(self) -> None:
        """Kill the holder before, where it is on this machine, frozen maybe: it may act no more, and what it
        listens on is needed.
        """
        self.check()
        end(self._predecessor)

    # keeping it

    def announce(self, address: str) -> None:
        """Let those who stand by know where the REST API is."""
        self.address = address
        self._announced.set()

    def _keep(self) -> None:
        pause_s = RENEW_S
        while not self._ended.is_set():
            self._announced.wait(pause_s)
            self._announced.clear()
            if self._ended.is_set() or self._lost is not None:
                return
            pause_s = RENEW_S if self._renew() else POLL_S

    def _renew(self) -> bool:
        begun = boot_time()
        values = {
            "address": self.address,
            "epoch": self._epoch,
            "holder": self.holder,
            "expires_s": EXPIRES_S,
        }
        try:
            with self._asking() as session:
                renewed = session.execute(_RENEW.encode(), values).rowcount
        except FlopsError as error:
            log.warning("the lease is not renewed: %s", error)
            return False
        if self._ended.is_set():
            return True
        if not renewed:
            self._lose()
        else:
            self._set_until(begun + HOLDS_S)
        return True

    def _lose(self) -> None:
        self._set_until(0.0)
        if self._ended.is_set():
            self._lost = self._lost or "this manager has given its lease back - it acts no more"
            return
        who = "another manager"
        with suppress(FlopsError, psycopg.Error), self._asking() as session:
            seen = self._look(session)
            who = f"another manager, {seen}," if seen is not None and seen.holder else who
        with self._turn:
            first = self._lost is None
            self._lost = self._lost or f"{who} has taken over - this one acts no more"
        if first:
            log.error("%s", self._lost)
            self.on_lost(self._lost)

    def release(self) -> None:
        """Let another manager have it at once. Nothing is written under this lease afterwards."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._announced.set()
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._keeper.join()
        with suppress(FlopsError, psycopg.Error):
            if self._epoch and self._lost is None:
                self._set_until(0.0)
                with self._asking() as session:
                    session.execute(_RELEASE.encode(), [self._epoch, self.holder])
        with self._turn:
            if self._session is not None:
                self._session.close()
                self._session = None
        os.close(self.until_fd)

    def _set_until(self, until: float) -> None:
        set_lease_end(self._until, until)

    @contextmanager
    def _asking(self) -> Iterator["psycopg.Connection[Any]"]:
        """The session of the lease, alone; another one after an error.

        Raises:
            DatabaseAwayError: there is none, or it broke.
        """
        with self._turn:
            try:
                if self._session is None:
                    self._session = self._connect(_STATEMENT_TIMEOUT_MS)
                yield self._session
            except psycopg.errors.UndefinedTable:
                raise
            except psycopg.Error as error:
                if self._session is not None:
                    self._session.close()
                    self._session = None
                told = self._translated(error)
                if told is None:
                    raise
                raise told from error


def _application_name(holder: str) -> str:
    return f"flops {holder}"
