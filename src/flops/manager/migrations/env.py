"""Run by Alembic; the connection and its transaction are `flops.manager.database`'s."""

from alembic import context

from flops.manager.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
