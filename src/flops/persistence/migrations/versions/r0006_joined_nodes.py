"""Machines that join by themselves, what lets them in, and what they are wanted to run."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "join_tokens",
        sa.Column("id", sa.String(12), primary_key=True),
        sa.Column("node", sa.String(40), nullable=False),
        sa.Column("owner", sa.String(60), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.Column("used", sa.Float()),
    )
    op.create_table(
        "joined_nodes",
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column("owner", sa.String(60), nullable=False),
        sa.Column("credential", sa.String(12), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("platform", sa.String(40), nullable=False),
        sa.Column("cpus", sa.Integer(), nullable=False),
        sa.Column("memory_mb", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(40), nullable=False),
        sa.Column("joined", sa.Float(), nullable=False),
        sa.Column("last_seen", sa.Float(), nullable=False),
        sa.Column("gone", sa.Float()),
        sa.Column("gone_reason", sa.Text()),
        sa.Column("allowance", sa.JSON(), nullable=False),
        sa.Column("holdings", sa.JSON(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
    )
    op.create_index("ix_joined_nodes_owner", "joined_nodes", ["owner"])
    op.create_index("ix_joined_nodes_credential", "joined_nodes", ["credential"])
    op.create_table(
        "node_services",
        sa.Column("name", sa.String(60), primary_key=True),
        sa.Column("node", sa.String(40), nullable=False),
        sa.Column("project", sa.String(60), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("wanted", sa.Boolean(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("assignment", sa.JSON(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("exit_code", sa.Integer()),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("restarts", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Float()),
    )
    op.create_index("ix_node_services_node", "node_services", ["node"])
    op.create_index("ix_node_services_project", "node_services", ["project"])


def downgrade() -> None:
    op.drop_table("node_services")
    op.drop_table("joined_nodes")
    op.drop_table("join_tokens")
