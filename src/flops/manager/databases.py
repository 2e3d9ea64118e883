"""Which database a FLOPS_HOME works with. Rows and folders of projects belong together: a manager on another
database would take the folders that it finds for leftovers, and remove them.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from flops.core.errors import ConflictError
from flops.core.settings import Settings
from flops.manager.paths import models_dir, write_private_json
from flops.persistence import database_place, open_database

if TYPE_CHECKING:
    from flops.persistence.lease import StandBy

_SQLITE = "SQLite"


def open_own_database(settings: Settings, standing_by: "StandBy | None" = None) -> sa.Engine:
    """The database of the settings, for one manager alone; remembered for the next one.

    Args:
        standing_by: wait until no other manager acts on it.
    Raises:
        ConflictError: the home's projects are in another one, or another manager is in this one.
        Others: see `open_database`.
    """
    check_database(settings)
    engine = open_database(settings.database_url or settings.database, alone=True, standing_by=standing_by)
    if not is_remembered(settings):
        remember_database(settings)
    return engine


def is_remembered(settings: Settings) -> bool:
    """Whether the last manager of the home worked with the database of the settings."""
    return _last(settings) == _now(settings)


def remember_database(settings: Settings) -> None:
    write_private_json(_file(settings), {"database": _now(settings)})


def check_database(settings: Settings) -> None:
    """Raises: ConflictError: the home's projects are in another database."""
    now, last = _now(settings), _last(settings)
    if last is not None and last != now and _holds_anything(settings):
        way = "without FLOPS_DATABASE" if last == _SQLITE else f"with a FLOPS_DATABASE of {last}"
        raise ConflictError(
            f"the projects of {settings.home} are in the database {last}, not in {now} - start the manager "
            f"{way}, take a backup there and restore it for {now} in another FLOPS_HOME; or, where that "
            f"database itself was moved, remove {_file(settings)}"
        )


def _now(settings: Settings) -> str:
    return database_place(settings.database_url) if settings.database_url else _SQLITE


def _last(settings: Settings) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(_file(settings).read_text(encoding="utf-8"))["database"])
    return _SQLITE if settings.database.exists() else None


def _holds_anything(settings: Settings) -> bool:
    folders = (settings.projects_dir, models_dir(settings))
    return any(folder.is_dir() and any(folder.iterdir()) for folder in folders)


def _file(settings: Settings) -> Path:
    return settings.home / "database.json"
