"""The manager's database: how it is opened, brought up to date, read and written.

Owns: the engine, transactions, migrations, and the metadata that tables of all rooms belong to.
Promises: a transaction is whole or not there, also after a power failure; writers queue up.
Tables themselves belong to the rooms that use them: `flops.manager.tables`.
"""

from flops.persistence.database import MIGRATIONS, open_database, reading, writing
from flops.persistence.metadata import JSON, metadata

__all__ = ["JSON", "MIGRATIONS", "metadata", "open_database", "reading", "writing"]
