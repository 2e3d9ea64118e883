"""Alembic's environment and the steps from one lay-out of the manager's database to the next."""
