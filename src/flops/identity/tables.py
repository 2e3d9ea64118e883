"""Tables of this room; change them together with a new file in ``persistence/migrations/versions``."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

from flops.persistence import JSON, metadata

users = Table(
    "users",
    metadata,
    Column("name", String(60), primary_key=True),
    Column("role", String(20), nullable=False),
    Column("teams", JSON, nullable=False),
    Column("disabled", Boolean, nullable=False),
    Column("created", Float, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("user", String(60), ForeignKey("users.name"), nullable=False, index=True),
    Column("name", String(100), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("last_used", Float),
    Column("revoked", Float),
    Column("signed_in", Boolean, nullable=False, server_default=false()),
)

# Who people are at an issuer; bound to a user when they first sign in.
accounts = Table(
    "accounts",
    metadata,
    Column("issuer", String(500), primary_key=True),
    Column("subject", String(255), primary_key=True),
    Column("user", String(60), ForeignKey("users.name"), nullable=False),
    Column("created", Float, nullable=False),
    Column("last", Float, nullable=False),
    UniqueConstraint("user", "issuer"),
)

# Grows only: triggers refuse everything else.
audit = Table(
    "audit",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("time", Float, nullable=False),
    Column("user", String(60), nullable=False),
    Column("token", String(12), nullable=False),
    Column("address", String(60), nullable=False),
    Column("action", String(100), nullable=False),
    Column("object", Text, nullable=False),
    Column("outcome", Integer, nullable=False),
    Column("detail", JSON, nullable=False),
    Column("hash", String(64), nullable=False),
)
