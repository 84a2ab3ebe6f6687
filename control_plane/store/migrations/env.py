"""Runs the revisions on the connection that ``Database.migrate`` hands over."""

from typing import cast

from alembic import context
from sqlalchemy import Connection
from sqlmodel import SQLModel

from control_plane.store import tables

__all__ = ["tables"]

connection = cast("Connection", context.config.attributes["connection"])
context.configure(connection=connection, target_metadata=SQLModel.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
