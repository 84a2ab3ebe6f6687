"""The first schema."""

from alembic import op
from sqlmodel import SQLModel

from control_plane.store import tables

__all__ = ["tables"]

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    SQLModel.metadata.create_all(op.get_bind())
