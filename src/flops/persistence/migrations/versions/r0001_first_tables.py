"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _project() -> sa.Column[str]:
    return sa.Column(
        "project",
        sa.String(16),
        sa.ForeignKey("projects.id", ondelete="CASCADE"),
        primary_key=True,
        nullable=False,
    )


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("updated", sa.Float(), nullable=False),
        sa.Column("finished", sa.Float()),
        sa.Column("last_seq", sa.Integer(), nullable=False),
        sa.Column("spooled_seq", sa.Integer(), nullable=False),
        sa.Column("training", sa.JSON()),
        sa.Column("rounds_done", sa.Integer(), nullable=False),
        sa.Column("rounds_total", sa.Integer(), nullable=False),
        sa.Column("metrics", sa.JSON()),
        sa.Column("best_round", sa.Integer()),
        sa.Column("tracking", sa.JSON()),
        sa.Column("cleaned", sa.Boolean(), nullable=False),
    )
    op.create_index("ix_projects_state", "projects", ["state"])
    op.create_table(
        "steps",
        _project(),
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column("started", sa.Float(), nullable=False),
        sa.Column("finished", sa.Float()),
        sa.Column("result", sa.JSON()),
    )
    op.create_table(
        "services",
        _project(),
        sa.Column("name", sa.String(60), primary_key=True),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("learner", sa.String(60)),
        sa.Column("restarts", sa.Integer(), nullable=False),
        sa.Column("over", sa.Text()),
    )
    op.create_table(
        "learners",
        _project(),
        sa.Column("learner", sa.String(60), primary_key=True),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("site", sa.String(200), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text()),
    )
    op.create_table(
        "rounds",
        _project(),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("finished", sa.Float(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
    )
    op.create_table(
        "events",
        _project(),
        sa.Column("seq", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("time", sa.Float(), nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
    )
    op.create_table(
        "report_sources",
        _project(),
        sa.Column("source", sa.String(60), primary_key=True),
        sa.Column("last_seq", sa.Integer(), nullable=False),
    )
    op.create_table(
        "models",
        sa.Column("name", sa.String(200), primary_key=True),
        sa.Column("version", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("project", sa.String(16), nullable=False),
        sa.Column("round", sa.Integer()),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("folder", sa.Text()),
    )
    op.create_index("ix_models_project", "models", ["project"])


def downgrade() -> None:
    for table in (
        "models",
        "report_sources",
        "events",
        "rounds",
        "learners",
        "services",
        "steps",
        "projects",
    ):
        op.drop_table(table)
