"""Whose a registered model is; what is of a project that is forgotten is the first admin's."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("models", sa.Column("owner", sa.String(60), nullable=False, server_default="admin"))
    op.add_column("models", sa.Column("team", sa.String(60)))
    models = sa.table("models", sa.column("project"), sa.column("owner"), sa.column("team"))
    projects = sa.table("projects", sa.column("id"), sa.column("owner"), sa.column("team"))
    known = sa.select(projects.c.id)
    for name in ("owner", "team"):
        of_project = sa.select(projects.c[name]).where(projects.c.id == models.c.project).scalar_subquery()
        op.execute(sa.update(models).where(models.c.project.in_(known)).values({name: of_project}))


def downgrade() -> None:
    op.drop_column("models", "team")
    op.drop_column("models", "owner")
