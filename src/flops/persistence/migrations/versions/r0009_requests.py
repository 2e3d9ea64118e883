"""The request that set a project in motion."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("projects", sa.Column("request", sa.String(64)))


def downgrade() -> None:
    op.drop_column("projects", "request")
