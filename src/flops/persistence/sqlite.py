"""SQLite: one file in WAL mode.

Durability: ``synchronous=FULL``. In WAL mode NORMAL would survive kill -9 as well, but a power failure could
take back the last commits, among them reports that their sender has already thrown away because we
acknowledged them. Writers of one process take turns (`Turns`). They begin IMMEDIATE, so those of two
processes queue up (``busy_timeout``) instead of failing when the second one upgrades.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from flops.core.disk import disk_full
from flops.core.errors import FlopsError
from flops.persistence.errors import DatabaseAwayError
from flops.persistence.turns import Turns

_BUSY_TIMEOUT_MS = 10_000
_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}",
)
READING: dict[str, Any] = {}
WRITING: dict[str, Any] = {}


def connect(path: Path, **options: Any) -> sa.Engine:
    """An engine on the file (mode 600), which is made where needed."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    engine = sa.create_engine(f"sqlite:///{path}", execution_options={"turns": Turns()}, **options)
    event.listen(engine, "connect", _prepare_connection)
    return engine


def turn(engine: sa.Engine) -> AbstractContextManager[None]:
    """Of this process's writers, around a transaction."""
    turns: Turns = engine.get_execution_options()["turns"]
    return turns.taken()


def begin_reading(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def begin_writing(connection: sa.Connection, *, patient: bool) -> None:
    """Begin, and take the lock of writers; ``patient`` changes nothing here."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def translated(engine: sa.Engine, error: sa.exc.DBAPIError) -> FlopsError | None:
    """The error in words for the operator; None: it is a mistake of ours."""
    if "database is locked" in str(error.orig):
        return DatabaseAwayError(
            f"another program has held {engine.url.database} for {_BUSY_TIMEOUT_MS / 1000:g} s - see 'fuser' "
            "for which; projects wait"
        )
    if "disk is full" not in str(error.orig):
        return None
    return disk_full(Path(engine.url.database or ".").parent, "the manager")


def _prepare_connection(connection: Any, _record: object) -> None:
    # The driver's own transaction handling begins DEFERRED and too late; `begin` does it.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(pragma)
    cursor.close()
