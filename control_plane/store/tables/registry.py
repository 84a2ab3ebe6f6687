"""The registry: released versions of models and their files."""

from sqlmodel import Field, SQLModel

from control_plane.store.tables.columns import JSON_TEXT, MICROS


class ModelVersion(SQLModel, table=True):
    """One released version of a model."""

    __tablename__ = "model_version"

    model_name: str = Field(primary_key=True, max_length=64)
    version: str = Field(primary_key=True, max_length=64)
    release_counter: int = Field(sa_type=MICROS)
    manifest: str = Field(sa_type=JSON_TEXT)
    manifest_sha256: str
    manifest_length: int = Field(sa_type=MICROS)
    report: str = Field(default="{}", sa_type=JSON_TEXT)
    """What its admission said."""
    released_at: int = Field(sa_type=MICROS)
    released_by: str


class ModelFile(SQLModel, table=True):
    """One file of a released version; ``manifest.json`` is among them."""

    __tablename__ = "model_file"

    model_name: str = Field(primary_key=True, max_length=64)
    version: str = Field(primary_key=True, max_length=64)
    path: str = Field(primary_key=True, max_length=200)
    sha256: str = Field(index=True)
    length: int = Field(sa_type=MICROS)


class ModelFloor(SQLModel, table=True):
    """The signed floor of a model: no device installs a lower release counter."""

    __tablename__ = "model_floor"

    model_name: str = Field(primary_key=True, max_length=64)
    min_release_counter: int = Field(sa_type=MICROS)
