"""PostgreSQL: a database of its own on a server that may be restarted at any time.

Writers queue up as on SQLite: each begins by taking one advisory lock, which ends with its transaction
(docs/decisions/0015). Readers see one snapshot. The password is known to the driver only: no error and no
log holds the URL.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.adapt import Dumper
from sqlalchemy import event

from flops.core.disk import DiskFullError
from flops.core.errors import FlopsError, InvalidInputError
from flops.persistence.errors import DatabaseAwayError
from flops.persistence.lease import Lease, StandBy

_WRITERS = 0x464C4F7073_01
"""Key of our advisory lock; it counts within one database."""
_CONNECT_TIMEOUT_S = 5
_SESSION = {
    "lock_timeout": "10s",
    # A manager that was lost with its machine in the middle of a transaction must not keep out the next.
    "idle_in_transaction_session_timeout": "60s",
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}
_DISK_FULL = "53100"
_AWAY = ("08", "25006", "42501", "53", "55P03", "57014", "57P", "58")
"""Beginnings of SQLSTATEs that an operator mends, while projects wait."""
# READ COMMITTED: what a writer reads once it has the lock is what the writer before it has committed.
READING: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
WRITING: dict[str, Any] = {"isolation_level": "READ COMMITTED"}


def turn(engine: sa.Engine) -> AbstractContextManager[None]:
    """Of writers: the server has a queue of them."""
    return nullcontext()


def connect(url: str, **options: Any) -> sa.Engine:
    """An engine on the database of the URL.

    Raises:
        InvalidInputError: the URL cannot be used.
    """
    engine, _ = _connect(url, "flops", options)
    return engine


def connect_alone(url: str, standing_by: StandBy | None, **options: Any) -> sa.Engine:
    """An engine for the one manager that acts; each of its writers proves that it still is. Disposing of it
    gives the lease back.

    Raises:
        InvalidInputError, ConflictError, DatabaseAwayError, GivenUp: see `Lease.take`.
    """

    def session(statement_timeout_ms: int) -> "psycopg.Connection[Any]":
        positional, named = engine.dialect.create_connect_args(engine.url)
        limits = f" -c statement_timeout={statement_timeout_ms}"
        ours = {**named, **arguments, "options": arguments["options"] + limits}
        # A database that is cut off must be noticed before the lease is over.
        ours |= {"connect_timeout": 2, "tcp_user_timeout": statement_timeout_ms}
        return psycopg.connect(*positional, autocommit=True, **ours)

    lease = Lease(session, lambda error: _translated(engine, error), _WRITERS, place(parse(url)))
    engine, arguments = _connect(url, lease.application_name, options)
    event.listen(engine, "engine_disposed", lambda _: lease.release())
    try:
        lease.take(standing_by)
    except BaseException:
        lease.release()
        raise
    engine.update_execution_options(lease=lease)
    return engine


def _connect(url: str, name: str, options: dict[str, Any]) -> tuple[sa.Engine, dict[str, Any]]:
    parsed = parse(url)
    arguments = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "application_name": name,
        "options": " ".join(f"-c {name}={value}" for name, value in _SESSION.items()),
    }
    # A connection that the server closed is noticed before it is used: a restart costs nobody anything.
    engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args=arguments, **options)
    event.listen(engine, "connect", _prepare_connection)
    return engine, arguments


def parse(url: str) -> sa.URL:
    """Raises: InvalidInputError: the URL cannot be used; the message does not repeat it."""
    wanted = "FLOPS_DATABASE has to look like postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise InvalidInputError(f"{wanted} - and has not; it is not repeated here") from None
    if parsed.drivername not in ("postgresql", "postgresql+psycopg"):
        raise InvalidInputError(f"{wanted} - leave it out for SQLite")
    if not parsed.database or "@" in f"{parsed.host}{parsed.database}":
        raise InvalidInputError(f"{wanted} - write '@', '/' and ':' in a password as %40, %2F and %3A")
    return parsed.set(drivername="postgresql+psycopg")


def place(url: sa.URL) -> str:
    """Where a database is, without who enters it and how."""
    host = url.host or str(url.query.get("host", "localhost"))
    return f"{host}:{url.port or url.query.get('port', 5432)}/{url.database}"


def begin_reading(connection: sa.Connection) -> None:
    """Nothing: the driver begins with the first statement."""


def begin_writing(connection: sa.Connection, *, patient: bool) -> None:
    """Take the lock of writers; and see that the engine's lease, where it has one, is not lost."""
    if patient:
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS})")
    # A statement of its own, behind the lock: it sees what the holder before has committed.
    if (lease := connection.get_execution_options().get("lease")) is not None:
        lease.verify(connection)


def translated(engine: sa.Engine, error: sa.exc.DBAPIError) -> FlopsError | None:
    """The error in words for the operator; None: it is a mistake of ours."""
    if isinstance(error, sa.exc.DataError):
        return InvalidInputError(
            f"a value does not fit into the database: {_reason(error.orig)} - shorten it"
        )
    return _translated(engine, error.orig)


def _translated(engine: sa.Engine, error: BaseException | None) -> FlopsError | None:
    where = place(engine.url)
    state = getattr(error, "sqlstate", None) or ""
    if state == _DISK_FULL:
        return DiskFullError(
            f"no space is left for the database {where} - free some there: projects wait, and then go on"
        )
    lost = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) and not state
    if lost or state.startswith(_AWAY):
        return DatabaseAwayError(
            f"the database {where} cannot be used now ({_reason(error)}) - see to its server and to "
            "FLOPS_DATABASE: projects wait, and then go on"
        )
    return None


def _reason(error: BaseException | None) -> str:
    """The first line of what driver or server say, without what we say ourselves."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    for start in ("connection failed: ", "connection is bad: "):
        line = line.removeprefix(start)
    if line.startswith("connection to server at ") and "failed: " in line:
        line = line.partition("failed: ")[2]
    return line.removeprefix("FATAL:").strip()[:200]


class _Text(Dumper):
    """Text, with what PostgreSQL cannot hold replaced: user code may print a NUL, and its end be a reason."""

    def dump(self, obj: str) -> bytes:
        return obj.replace("\0", "\N{REPLACEMENT CHARACTER}").encode()


def _prepare_connection(connection: Any, _record: object) -> None:
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        connection.close()
        raise InvalidInputError(
            f"the database of FLOPS_DATABASE has the encoding {encoding} - make one with ENCODING 'UTF8'"
        )
    connection.adapters.register_dumper(str, _Text)
