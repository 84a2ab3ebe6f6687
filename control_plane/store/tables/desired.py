"""What each device shall be."""

from sqlmodel import Field, SQLModel

from control_plane.store.tables.columns import JSON_TEXT, MICROS


class DesiredDocument(SQLModel, table=True):
    """The desired document of one device, as the director will sign it."""

    __tablename__ = "desired_document"

    device_id: str = Field(primary_key=True, max_length=40)
    revision: int = Field(sa_type=MICROS)
    document: str = Field(sa_type=JSON_TEXT)
    dirty: bool = Field(default=True, index=True)
    """Whether the device has not been told of this revision yet."""
    changed_at: int = Field(sa_type=MICROS)
