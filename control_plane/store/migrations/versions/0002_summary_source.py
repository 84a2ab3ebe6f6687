"""What a summary is of: windows of a lane, or requests of applications."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; what was stored before counts as of a lane."""
    op.add_column("summary", sa.Column("source", sa.String(), nullable=False, server_default="lane"))
