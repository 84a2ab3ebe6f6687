"""Queries on signed metadata."""

import msgspec
from sqlalchemy import delete, func
from sqlmodel import Session, col, select

from contract.errors import PitheadError
from control_plane.store.tables.tuf import DirectorFiles, SignedMetadata


class DirectorRecord(msgspec.Struct, frozen=True):
    """The director's newest signed files for one device."""

    version: int
    document_sha256: str
    expires: int
    targets: bytes
    snapshot: bytes
    timestamp: bytes


def put(tx: Session, repository: str, role: str, version: int, content: bytes, now: int) -> bool:
    """Store a signed file; False when this very file is stored already.

    Raises ``request.conflict`` when the version has another content.
    """
    row = tx.get(SignedMetadata, (repository, role, version))
    if row is not None:
        if row.content != content:
            raise PitheadError(
                "request.conflict", f"{repository} {role} version {version} is stored with another content"
            )
        return False
    tx.add(SignedMetadata(repository=repository, role=role, version=version, content=content, stored_at=now))
    tx.flush()
    return True


def newest(tx: Session, repository: str, role: str) -> bytes | None:
    """Return the file with the highest version."""
    return tx.exec(
        select(SignedMetadata.content)
        .where(SignedMetadata.repository == repository, SignedMetadata.role == role)
        .order_by(col(SignedMetadata.version).desc())
        .limit(1)
    ).first()


def all_versions(tx: Session, repository: str, role: str) -> tuple[bytes, ...]:
    """Return every version of a role, in order."""
    statement = (
        select(SignedMetadata.content)
        .where(SignedMetadata.repository == repository, SignedMetadata.role == role)
        .order_by(col(SignedMetadata.version))
    )
    return tuple(tx.exec(statement))


def state(tx: Session, repository: str) -> dict[str, int]:
    """Return the highest version of every role that the repository has."""
    statement = (
        select(SignedMetadata.role, func.max(SignedMetadata.version))
        .where(SignedMetadata.repository == repository)
        .group_by(col(SignedMetadata.role))
    )
    return {role: int(version) for role, version in tx.exec(statement)}


def prune(tx: Session, repository: str, role: str, keep: int) -> None:
    """Delete all but the newest ``keep`` versions of a role."""
    oldest_kept = tx.exec(
        select(SignedMetadata.version)
        .where(SignedMetadata.repository == repository, SignedMetadata.role == role)
        .order_by(col(SignedMetadata.version).desc())
        .offset(keep - 1)
        .limit(1)
    ).first()
    if oldest_kept is not None:
        tx.execute(
            delete(SignedMetadata).where(
                col(SignedMetadata.repository) == repository,
                col(SignedMetadata.role) == role,
                col(SignedMetadata.version) < oldest_kept,
            )
        )


def director(tx: Session, device_id: str) -> DirectorRecord | None:
    """Return what was signed last for a device."""
    row = tx.get(DirectorFiles, device_id)
    if row is None:
        return None
    return DirectorRecord(
        version=row.version,
        document_sha256=row.document_sha256,
        expires=row.expires,
        targets=row.targets,
        snapshot=row.snapshot,
        timestamp=row.timestamp,
    )


def put_director(tx: Session, device_id: str, record: DirectorRecord) -> None:
    """Replace what was signed last for a device; its version must rise."""
    row = tx.get(DirectorFiles, device_id)
    if row is not None and row.version >= record.version:
        raise PitheadError(
            "request.conflict", f"{device_id}: director version {record.version} after {row.version}"
        )
    tx.merge(DirectorFiles(device_id=device_id, **msgspec.structs.asdict(record)))
    tx.flush()
