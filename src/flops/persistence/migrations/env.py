"""Run by Alembic; the connection and its transaction are `flops.persistence.database`'s."""

from alembic import context

from flops.persistence.metadata import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
