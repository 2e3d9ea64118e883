"""Nodes of learners, and models that are served."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("learners", sa.Column("node", sa.String(200), nullable=False, server_default=""))
    op.create_table(
        "deployments",
        sa.Column(
            "project",
            sa.String(16),
            sa.ForeignKey("projects.id", ondelete="CASCADE"),
            primary_key=True,
            nullable=False,
        ),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("image", sa.Text()),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("stopped", sa.Boolean(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("deployments")
    op.drop_column("learners", "node")
