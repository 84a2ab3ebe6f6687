"""What people and the control plane did: append-only."""

from sqlmodel import Field, SQLModel

from control_plane.store.tables.columns import JSON_TEXT, MICROS, ROW_ID


class Event(SQLModel, table=True):
    """One deed: who did what to whom, with its facts."""

    __tablename__ = "event"
    __table_args__ = {"sqlite_autoincrement": True}

    id: int | None = Field(default=None, primary_key=True, sa_type=ROW_ID)
    t: int = Field(sa_type=MICROS, index=True)
    actor: str
    kind: str = Field(index=True)
    subject: str = Field(index=True)
    facts: str = Field(default="{}", sa_type=JSON_TEXT)
