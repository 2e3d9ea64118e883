"""The manager's database: one SQLite file in WAL mode, brought up to date by Alembic at start.

Durability: ``synchronous=FULL``. In WAL mode NORMAL would survive kill -9 as well, but a power failure could
take back the last commits, among them reports that their sender has already thrown away because we
acknowledged them. Writers begin IMMEDIATE, so two of them queue up (``busy_timeout``) instead of failing
when the second one upgrades.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import event

from flops.core.disk import disk_full

_BUSY_TIMEOUT_MS = 10_000
_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}",
)
MIGRATIONS = Path(__file__).parent / "migrations"


def open_database(path: Path) -> sa.Engine:
    """Open the file (mode 600), making it where needed, and run the migrations it has not seen."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    # The default pool's 5 connections would make a dozen project threads wait for each other's reads.
    engine = sa.create_engine(f"sqlite:///{path}", pool_size=16, max_overflow=48)
    event.listen(engine, "connect", _prepare_connection)
    event.listen(engine, "begin", _begin)
    try:
        _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """One consistent view of the database.

    Raises:
        DiskFullError: the database needs space and there is none.
    """
    with _disk_full_told(engine), engine.begin() as connection:
        yield connection


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """One transaction that holds the write lock from its start; committed at the end, or rolled back.

    Raises:
        DiskFullError: there is no space for it; nothing was written.
    """
    with _disk_full_told(engine), engine.execution_options(writes=True).begin() as connection:
        yield connection


@contextmanager
def _disk_full_told(engine: sa.Engine) -> Iterator[None]:
    try:
        yield
    except sa.exc.OperationalError as error:
        if "disk is full" not in str(error.orig):
            raise
        folder = Path(engine.url.database or ".").parent
        raise disk_full(folder, "the manager") from error


def _prepare_connection(connection: Any, _record: object) -> None:
    # The driver's own transaction handling begins DEFERRED and too late; `_begin` does it.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(pragma)
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: sa.Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with writing(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
