"""Clusters of hierarchies."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "clusters",
        sa.Column(
            "project",
            sa.String(16),
            sa.ForeignKey("projects.id", ondelete="CASCADE"),
            primary_key=True,
            nullable=False,
        ),
        sa.Column("cluster", sa.String(255), primary_key=True),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("rounds_done", sa.Integer(), nullable=False),
    )
    op.add_column("services", sa.Column("cluster", sa.String(255)))
    op.add_column("learners", sa.Column("cluster", sa.String(255)))
    with op.batch_alter_table("report_sources") as table:
        table.alter_column("source", existing_type=sa.String(60), type_=sa.String(255))


def downgrade() -> None:
    with op.batch_alter_table("report_sources") as table:
        table.alter_column("source", existing_type=sa.String(255), type_=sa.String(60))
    op.drop_column("learners", "cluster")
    op.drop_column("services", "cluster")
    op.drop_table("clusters")
