"""Queries on the registry of released models."""

from collections.abc import Iterable
from typing import Any

import msgspec
from sqlalchemy import func
from sqlmodel import Session, col, select

from control_plane.store.tables.registry import ModelFile, ModelFloor, ModelVersion


class FileRecord(msgspec.Struct, frozen=True):
    """A file of a released version."""

    path: str
    sha256: str
    length: int


class VersionRecord(msgspec.Struct, frozen=True):
    """A released version without its manifest's content."""

    model_name: str
    version: str
    release_counter: int
    manifest_sha256: str
    manifest_length: int
    released_at: int
    released_by: str


class VersionDetail(msgspec.Struct, frozen=True):
    """A released version with its manifest, its files and what its admission said."""

    record: VersionRecord
    manifest: dict[str, Any]
    report: dict[str, Any]
    files: tuple[FileRecord, ...]


class ModelRecord(msgspec.Struct, frozen=True):
    """A model: its versions by rising release counter, and its floor."""

    name: str
    versions: tuple[VersionRecord, ...]
    min_release_counter: int | None = None


def add_version(
    tx: Session, record: VersionRecord, *, manifest: str, report: str, files: Iterable[FileRecord]
) -> None:
    """Store a released version."""
    tx.add(ModelVersion(**msgspec.structs.asdict(record), manifest=manifest, report=report))
    for file in files:
        tx.add(
            ModelFile(model_name=record.model_name, version=record.version, **msgspec.structs.asdict(file))
        )
    tx.flush()


def set_floor(tx: Session, model_name: str, minimum: int) -> None:
    """Store a model's signed floor."""
    tx.merge(ModelFloor(model_name=model_name, min_release_counter=minimum))


def version(tx: Session, model_name: str, version_name: str) -> VersionRecord | None:
    """Return a released version."""
    row = tx.get(ModelVersion, (model_name, version_name))
    return None if row is None else _record(row)


def detail(tx: Session, model_name: str, version_name: str) -> VersionDetail | None:
    """Return a released version with all that is known of it."""
    row = tx.get(ModelVersion, (model_name, version_name))
    if row is None:
        return None
    files = tx.exec(
        select(ModelFile)
        .where(ModelFile.model_name == model_name, ModelFile.version == version_name)
        .order_by(col(ModelFile.path))
    )
    return VersionDetail(
        record=_record(row),
        manifest=msgspec.json.decode(row.manifest, type=dict[str, Any]),
        report=msgspec.json.decode(row.report, type=dict[str, Any]),
        files=tuple(FileRecord(path=file.path, sha256=file.sha256, length=file.length) for file in files),
    )


def models(tx: Session, name: str | None = None) -> list[ModelRecord]:
    """Return all models, or the one of this name, by name."""
    statement = select(ModelVersion).order_by(col(ModelVersion.model_name), col(ModelVersion.release_counter))
    if name is not None:
        statement = statement.where(ModelVersion.model_name == name)
    versions: dict[str, list[VersionRecord]] = {}
    for row in tx.exec(statement):
        versions.setdefault(row.model_name, []).append(_record(row))
    floors = {row.model_name: row.min_release_counter for row in tx.exec(select(ModelFloor))}
    return [ModelRecord(model, tuple(found), floors.get(model)) for model, found in versions.items()]


def is_artifact(tx: Session, sha256: str) -> bool:
    """Whether a released version has a file with this hash."""
    found = tx.exec(select(func.count()).select_from(ModelFile).where(ModelFile.sha256 == sha256)).one()
    return found > 0


def _record(row: ModelVersion) -> VersionRecord:
    return VersionRecord(
        model_name=row.model_name,
        version=row.version,
        release_counter=row.release_counter,
        manifest_sha256=row.manifest_sha256,
        manifest_length=row.manifest_length,
        released_at=row.released_at,
        released_by=row.released_by,
    )
