"""Tokens: of operators for the API, and of devices for joining. Only hashes are stored."""

from sqlmodel import Field, SQLModel

from control_plane.store.tables.columns import JSON_TEXT, MICROS


class ApiToken(SQLModel, table=True):
    """A bearer token of the operators' API."""

    __tablename__ = "api_token"

    id: str = Field(primary_key=True)
    name: str
    hash: str = Field(unique=True)
    roles: str = Field(sa_type=JSON_TEXT)
    created_at: int = Field(sa_type=MICROS)
    created_by: str
    expires_at: int | None = Field(default=None, sa_type=MICROS)
    revoked_at: int | None = Field(default=None, sa_type=MICROS)
    last_used: int | None = Field(default=None, sa_type=MICROS)


class JoinToken(SQLModel, table=True):
    """A token with which devices enrol."""

    __tablename__ = "join_token"

    id: str = Field(primary_key=True)
    hash: str = Field(unique=True)
    description: str = ""
    labels: str = Field(default="{}", sa_type=JSON_TEXT)
    """JSON object: the labels that a device gets."""
    created_at: int = Field(sa_type=MICROS)
    created_by: str
    expires_at: int = Field(sa_type=MICROS)
    max_uses: int
    uses: int = 0
    revoked_at: int | None = Field(default=None, sa_type=MICROS)
