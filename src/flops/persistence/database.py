"""The manager's database, on SQLite or PostgreSQL: opened, brought up to date by Alembic at start, read and
written. What the two engines do differently is in `sqlite` and `postgresql`.
"""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event

from flops.persistence import sqlite

if TYPE_CHECKING:
    from flops.persistence.lease import Lease, StandBy

MIGRATIONS = Path(__file__).parent / "migrations"


def open_database(
    where: Path | str, *, alone: bool = False, standing_by: "StandBy | None" = None
) -> sa.Engine:
    """Open a database and run the migrations it has not seen; openers at the same moment take turns.

    Args:
        where: an SQLite file, made where needed, or a URL ``postgresql://USER:PASSWORD@HOST:PORT/DATABASE``.
        alone: keep others out who open it so, until the engine is disposed of, or its lease is lost (see
            `lease_of`). A file is its home's anyway.
        standing_by: wait until it is free; of a server only.
    Raises:
        InvalidInputError: the URL cannot be used.
        ConflictError: somebody else is alone in it.
        DatabaseAwayError: the server does not let us in.
        GivenUp: the waiting was ended.
    """
    if alone and not isinstance(where, Path):
        from flops.persistence import postgresql

        engine = postgresql.connect_alone(where, standing_by, **_OPTIONS)
        event.listen(engine, "begin", _begin)
    else:
        engine = connect(where)
    try:
        with writing(engine, patient=True) as connection:
            migrate(connection, "head")
    except BaseException:
        engine.dispose()
        raise
    return engine


def connect(where: Path | str) -> sa.Engine:
    """An engine for `reading` and `writing`, on a database as it is; see `open_database`."""
    if isinstance(where, Path):
        engine = sqlite.connect(where, **_OPTIONS)
    else:
        from flops.persistence import postgresql  # managers on SQLite need none of its driver

        engine = postgresql.connect(where, **_OPTIONS)
    event.listen(engine, "begin", _begin)
    return engine


def lease_of(engine: sa.Engine) -> "Lease | None":
    """What allows the holder of this engine to act; None: nobody else can."""
    lease: Lease | None = engine.get_execution_options().get("lease")
    return lease


def database_place(url: str) -> str:
    """Where the database of a URL is, in words that may be shown.

    Raises:
        InvalidInputError: the URL cannot be used.
    """
    from flops.persistence import postgresql

    return postgresql.place(postgresql.parse(url))


def migrate(connection: sa.Connection, revision: str) -> None:
    """Bring the tables up to a revision, or (``base``) remove them, inside the connection's transaction."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    if revision == "base":
        command.downgrade(config, revision)
    else:
        command.upgrade(config, revision)


def revision_of(connection: sa.Connection) -> str | None:
    """The revision that the tables are at; None: there are none."""
    return MigrationContext.configure(connection).get_current_revision()


def revisions() -> list[str]:
    """All that are known, the first one first."""
    return [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()][::-1]


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """One consistent view of the database; inside of `one_view`, that one.

    Raises:
        DiskFullError: the database needs space and there is none.
        DatabaseAwayError: it does not answer.
    """
    if (view := _views.get(engine)) is not None:
        yield view
        return
    options = _adapter(engine).READING
    with _told(engine), engine.execution_options(**options).begin() as connection:
        yield connection


@contextmanager
def one_view(engine: sa.Engine) -> Iterator[None]:
    """Whatever this thread reads inside is of one moment, and costs one transaction; it must not write."""
    with reading(engine) as connection:
        before = _views.get(engine)
        _views.set(engine, connection)
        try:
            yield
        finally:
            _views.set(engine, before)


class _Views(threading.local):
    """The connections of this thread's `one_view`."""

    def __init__(self) -> None:
        self._open: dict[int, sa.Connection | None] = {}

    def get(self, engine: sa.Engine) -> sa.Connection | None:
        return self._open.get(id(engine))

    def set(self, engine: sa.Engine, connection: sa.Connection | None) -> None:
        if connection is None:
            self._open.pop(id(engine), None)
        else:
            self._open[id(engine)] = connection


_views = _Views()


@contextmanager
def writing(engine: sa.Engine, *, patient: bool = False) -> Iterator[sa.Connection]:
    """One transaction that holds the write lock from its start; committed at the end, or rolled back.

    Args:
        patient: wait for a writer before it as long as that takes, where the engine can.
    Raises:
        DiskFullError: there is no space for it; nothing was written.
        DatabaseAwayError: the database does not answer. Where it went away during the commit, the
            transaction may have come about.
        LeaseLostError: another manager has taken over; nothing was written.
    """
    assert _views.get(engine) is None, "what is written would not be seen by the view that is open"
    adapter = _adapter(engine)
    options = {**adapter.WRITING, "writes": True, "patient": patient}
    with _told(engine), adapter.turn(engine), engine.execution_options(**options).begin() as connection:
        yield connection


@contextmanager
def _told(engine: sa.Engine) -> Iterator[None]:
    try:
        yield
    except sa.exc.DBAPIError as error:
        told = _adapter(engine).translated(engine, error)
        if told is None:
            raise
        raise told from error


def _adapter(engine: sa.Engine) -> Any:
    if engine.dialect.name == "sqlite":
        return sqlite
    from flops.persistence import postgresql

    return postgresql


def _begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if options.get("writes", False):
        _adapter(connection.engine).begin_writing(connection, patient=bool(options.get("patient", False)))
    else:
        _adapter(connection.engine).begin_reading(connection)


def _to_json(value: Any) -> str:
    """JSON as both engines take it: NaN and infinities are null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


# The default pool's 5 connections would make a dozen project threads wait for each other's reads.
_OPTIONS: dict[str, Any] = {"pool_size": 16, "max_overflow": 48, "json_serializer": _to_json}
