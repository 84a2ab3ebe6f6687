"""How many windows a lane did not score, since its machine did not run."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column; of what was stored before nothing is known, so nothing was muted."""
    op.add_column("summary", sa.Column("muted", sa.BigInteger(), nullable=False, server_default="0"))
