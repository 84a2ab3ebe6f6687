"""Signed metadata, byte for byte: a version never has two contents."""

from sqlalchemy import LargeBinary
from sqlmodel import Field, SQLModel

from control_plane.store.tables.columns import MICROS


class SignedMetadata(SQLModel, table=True):
    """A signed file of a repository that is the same for all devices."""

    __tablename__ = "signed_metadata"

    repository: str = Field(primary_key=True)
    role: str = Field(primary_key=True)
    version: int = Field(primary_key=True, sa_type=MICROS)
    content: bytes = Field(sa_type=LargeBinary)
    stored_at: int = Field(sa_type=MICROS)


class DirectorFiles(SQLModel, table=True):
    """The director's newest signed files for one device."""

    __tablename__ = "director_files"

    device_id: str = Field(primary_key=True, max_length=40)
    version: int = Field(sa_type=MICROS)
    document_sha256: str
    expires: int = Field(sa_type=MICROS)
    targets: bytes = Field(sa_type=LargeBinary)
    snapshot: bytes = Field(sa_type=LargeBinary)
    timestamp: bytes = Field(sa_type=LargeBinary)
