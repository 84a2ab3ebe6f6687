"""Queries on API tokens and join tokens."""

import msgspec
from sqlalchemy import update
from sqlmodel import Session, col, select

from contract.errors import PitheadError
from control_plane.store.tables.token import ApiToken, JoinToken


class ApiTokenRecord(msgspec.Struct, frozen=True):
    """An API token without its secret."""

    id: str
    name: str
    roles: tuple[str, ...]
    created_at: int
    created_by: str
    expires_at: int | None = None
    revoked_at: int | None = None
    last_used: int | None = None


class JoinTokenRecord(msgspec.Struct, frozen=True):
    """A join token without its secret."""

    id: str
    description: str
    labels: dict[str, str]
    created_at: int
    created_by: str
    expires_at: int
    max_uses: int
    uses: int = 0
    revoked_at: int | None = None


def add_api_token(tx: Session, record: ApiTokenRecord, *, secret_hash: str) -> None:
    """Store a token under the hash of its secret."""
    tx.add(
        ApiToken(
            id=record.id,
            name=record.name,
            hash=secret_hash,
            roles=msgspec.json.encode(record.roles).decode(),
            created_at=record.created_at,
            created_by=record.created_by,
            expires_at=record.expires_at,
        )
    )


def api_token_by_hash(tx: Session, secret_hash: str) -> ApiTokenRecord | None:
    """Return the token with this hash, revoked and expired ones too."""
    row = tx.exec(select(ApiToken).where(ApiToken.hash == secret_hash)).first()
    return None if row is None else _api_token(row)


def api_tokens(tx: Session) -> list[ApiTokenRecord]:
    """Return all API tokens, the newest first."""
    return [_api_token(row) for row in tx.exec(select(ApiToken).order_by(col(ApiToken.id).desc()))]


def touch_api_token(tx: Session, token_id: str, now: int) -> None:
    """Note that a token was used."""
    tx.execute(update(ApiToken).where(col(ApiToken.id) == token_id).values(last_used=now))


def revoke_api_token(tx: Session, token_id: str, now: int) -> bool:
    """Revoke; False when it was revoked before. Raises ``request.not_found``."""
    row = tx.get(ApiToken, token_id)
    if row is None:
        raise PitheadError("request.not_found", f"no API token {token_id}")
    if row.revoked_at is not None:
        return False
    row.revoked_at = now
    return True


def add_join_token(tx: Session, record: JoinTokenRecord, *, secret_hash: str) -> None:
    """Store a join token under the hash of its secret."""
    tx.add(
        JoinToken(
            id=record.id,
            hash=secret_hash,
            description=record.description,
            labels=msgspec.json.encode(record.labels).decode(),
            created_at=record.created_at,
            created_by=record.created_by,
            expires_at=record.expires_at,
            max_uses=record.max_uses,
        )
    )


def join_token_by_hash(tx: Session, secret_hash: str) -> JoinTokenRecord | None:
    """Return the token with this hash, whatever its state."""
    row = tx.exec(select(JoinToken).where(JoinToken.hash == secret_hash)).first()
    return None if row is None else _join_token(row)


def take_join_token(tx: Session, token_id: str, now: int) -> bool:
    """Take one use, in one statement; False when none is left, or it is expired or revoked."""
    taken = tx.execute(
        update(JoinToken)
        .where(
            col(JoinToken.id) == token_id,
            col(JoinToken.uses) < col(JoinToken.max_uses),
            col(JoinToken.expires_at) > now,
            col(JoinToken.revoked_at).is_(None),
        )
        .values(uses=col(JoinToken.uses) + 1)
        .returning(col(JoinToken.id))
    )
    return taken.first() is not None


def join_tokens(tx: Session) -> list[JoinTokenRecord]:
    """Return all join tokens, the newest first."""
    return [_join_token(row) for row in tx.exec(select(JoinToken).order_by(col(JoinToken.id).desc()))]


def revoke_join_token(tx: Session, token_id: str, now: int) -> bool:
    """Revoke; False when it was revoked before. Raises ``request.not_found``."""
    row = tx.get(JoinToken, token_id)
    if row is None:
        raise PitheadError("request.not_found", f"no join token {token_id}")
    if row.revoked_at is not None:
        return False
    row.revoked_at = now
    return True


def _api_token(row: ApiToken) -> ApiTokenRecord:
    return ApiTokenRecord(
        id=row.id,
        name=row.name,
        roles=msgspec.json.decode(row.roles, type=tuple[str, ...]),
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used=row.last_used,
    )


def _join_token(row: JoinToken) -> JoinTokenRecord:
    return JoinTokenRecord(
        id=row.id,
        description=row.description,
        labels=msgspec.json.decode(row.labels, type=dict[str, str]),
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        max_uses=row.max_uses,
        uses=row.uses,
        revoked_at=row.revoked_at,
    )
