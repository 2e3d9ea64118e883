"""Who people are at an issuer of OpenID Connect; tokens that came from signing in there."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("issuer", sa.String(500), primary_key=True),
        sa.Column("subject", sa.String(255), primary_key=True),
        sa.Column("user", sa.String(60), sa.ForeignKey("users.name"), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("last", sa.Float(), nullable=False),
        sa.UniqueConstraint("user", "issuer"),
    )
    op.add_column("tokens", sa.Column("signed_in", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    op.drop_column("tokens", "signed_in")
    op.drop_table("accounts")
