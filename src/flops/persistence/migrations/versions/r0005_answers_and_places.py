"""Answers that are given again for the same Idempotency-Key; projects by the time of their creation."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "answers",
        sa.Column("caller", sa.String(60), primary_key=True),
        sa.Column("key", sa.String(200), primary_key=True),
        sa.Column("request", sa.String(64), nullable=False),
        sa.Column("project", sa.String(16), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("answer", sa.JSON()),
    )
    op.create_index("ix_answers_created", "answers", ["created"])
    op.create_index("ix_projects_created", "projects", ["created"])


def downgrade() -> None:
    op.drop_index("ix_projects_created", "projects")
    op.drop_table("answers")
