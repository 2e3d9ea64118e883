"""Tables of this room; change them together with a new file in ``persistence/migrations/versions``."""

from sqlalchemy import Boolean, Column, Float, Integer, String, Table, Text

from flops.persistence import JSON, metadata

join_tokens = Table(
    "join_tokens",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("node", String(40), nullable=False),
    Column("owner", String(60), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False),
    # When a machine joined with it.
    Column("used", Float),
)

joined_nodes = Table(
    "joined_nodes",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("owner", String(60), nullable=False, index=True),
    # Id and hash of its credential.
    Column("credential", String(12), nullable=False, index=True),
    Column("sha256", String(64), nullable=False),
    Column("platform", String(40), nullable=False),
    Column("cpus", Integer, nullable=False),
    Column("memory_mb", Integer, nullable=False),
    Column("version", String(40), nullable=False),
    Column("joined", Float, nullable=False),
    Column("last_seen", Float, nullable=False),
    # When it left, and how.
    Column("gone", Float),
    Column("gone_reason", Text),
    # What its owner allows, and which data it holds, in its own words.
    Column("allowance", JSON, nullable=False),
    Column("holdings", JSON, nullable=False),
    # Of the set of services that are wanted there: raised with every change.
    Column("number", Integer, nullable=False),
)

node_services = Table(
    "node_services",
    metadata,
    Column("name", String(60), primary_key=True),
    Column("node", String(40), nullable=False, index=True),
    Column("project", String(60), nullable=False, index=True),
    Column("role", String(20), nullable=False),
    Column("wanted", Boolean, nullable=False),
    # How often it was wanted; each time is an attempt of its own.
    Column("attempt", Integer, nullable=False),
    # SHA-256 of all that the node is told, the attempt included.
    Column("digest", String(64), nullable=False),
    # What is wanted, without its secrets: those are in a private file.
    Column("assignment", JSON, nullable=False),
    # The number of the node's set that has it, or has it no longer.
    Column("number", Integer, nullable=False),
    # What the node said last of this attempt.
    Column("state", String(10), nullable=False),
    Column("exit_code", Integer),
    Column("reason", Text, nullable=False),
    Column("restarts", Integer, nullable=False),
    Column("started_at", Float),
)
