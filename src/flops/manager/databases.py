"""Which database a FLOPS_HOME works with. Rows and folders of projects belong together: a manager on another
database would take the folders that it finds for leftovers, and remove them.
"""

import json
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa

from flops.core.errors import ConflictError
from flops.core.settings import Settings
from flops.manager.paths import models_dir, write_private_json
from flops.persistence import database_place, open_database

_SQLITE = "SQLite"


def open_own_database(settings: Settings) -> sa.Engine:
    """The database of the settings, for one manager alone; remembered for the next one.

    Raises:
        ConflictError: the home's projects are in another one, or another manager is in this one.
        Others: see `open_database`.
    """
    now = database_place(settings.database_url) if settings.database_url else _SQLITE
    last = _last(settings)
    if last is not None and last != now and _holds_anything(settings):
        way = "without FLOPS_DATABASE" if last == _SQLITE else f"with a FLOPS_DATABASE of {last}"
        raise ConflictError(
            f"the projects of {settings.home} are in the database {last}, not in {now} - start the manager "
            f"{way}, take a backup there and restore it for {now} in another FLOPS_HOME; or, where that "
            f"database itself was moved, remove {_file(settings)}"
        )
    engine = open_database(settings.database_url or settings.database, alone=True)
    if last != now:
        write_private_json(_file(settings), {"database": now})
    return engine


def _last(settings: Settings) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(_file(settings).read_text(encoding="utf-8"))["database"])
    return _SQLITE if settings.database.exists() else None


def _holds_anything(settings: Settings) -> bool:
    folders = (settings.projects_dir, models_dir(settings))
    return any(folder.is_dir() and any(folder.iterdir()) for folder in folders)


def _file(settings: Settings) -> Path:
    return settings.home / "database.json"
