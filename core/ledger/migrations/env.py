"""Alembic's entry: migrates over the connection that the caller holds, in its transaction."""

from alembic import context

from core.ledger.rows import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
context.run_migrations()
