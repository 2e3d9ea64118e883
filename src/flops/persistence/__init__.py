"""The manager's database: how it is opened, brought up to date, read and written.

Owns: the engines (SQLite, PostgreSQL), transactions, migrations, the lease of the manager that acts, and the
metadata that tables of all rooms belong to.
Promises: a transaction is whole or not there, also after a power failure; writers queue up, readers see one
moment; a database that is away is an error of its own, and nothing more is lost than time.
Tables themselves belong to the rooms that use them: `flops.manager.tables`.
"""

from flops.persistence.database import (
    MIGRATIONS,
    connect,
    database_place,
    lease_of,
    migrate,
    one_view,
    open_database,
    reading,
    revision_of,
    revisions,
    writing,
)
from flops.persistence.errors import DatabaseAwayError, LeaseLostError
from flops.persistence.metadata import JSON, metadata

__all__ = [
    "JSON",
    "MIGRATIONS",
    "DatabaseAwayError",
    "LeaseLostError",
    "connect",
    "database_place",
    "lease_of",
    "metadata",
    "migrate",
    "one_view",
    "open_database",
    "reading",
    "revision_of",
    "revisions",
    "writing",
]
