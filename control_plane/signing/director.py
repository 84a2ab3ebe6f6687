"""The director's word to one device: a small repository with the single target ``devices/<id>``.

The assignment itself travels in the target's ``custom``, so that a device
needs no further download: as text, since canonical JSON knows no fractions,
and the target's length and hash are those of this text.
"""

import hashlib
from datetime import timedelta
from typing import Final

from msgspec import Struct

from contract import codec
from contract.messages import Desired
from control_plane.ports import MetadataSigner
from control_plane.signing.metadata import head, next_version, sign, snapshot, timestamp

LIFETIME: Final = timedelta(days=7)
RENEW_BEFORE: Final = timedelta(days=4)
"""Signed again when less than this is left, so a device that was away for three days finds fresh metadata."""


class DirectorMetadata(Struct, frozen=True):
    """The newest metadata of one device. All three files have the same version."""

    version: int
    document_sha256: str
    """Of the desired document that is signed."""
    expires: int
    """Microseconds UTC."""
    targets: bytes
    snapshot: bytes
    timestamp: bytes


def document(desired: Desired) -> bytes:
    """Return the bytes of the target ``devices/<id>``."""
    return codec.encode(desired)


def is_current(metadata: DirectorMetadata | None, desired: Desired, now: int) -> bool:
    """Whether ``metadata`` still says what ``desired`` says, and long enough."""
    return (
        metadata is not None
        and metadata.document_sha256 == hashlib.sha256(document(desired)).hexdigest()
        and metadata.expires - now > RENEW_BEFORE // timedelta(microseconds=1)
    )


def build(desired: Desired, last_version: int, now: int, signer: MetadataSigner) -> DirectorMetadata:
    """Sign ``desired``; ``last_version`` is 0 where nothing was signed before, ``now`` is in microseconds."""
    version = next_version(last_version, now)
    text = document(desired)
    digest = hashlib.sha256(text).hexdigest()
    target = {
        "length": len(text),
        "hashes": {"sha256": digest},
        "custom": {"desired": text.decode()},
    }
    targets = sign(
        "director-targets",
        head("targets", version, now, LIFETIME) | {"targets": {f"devices/{desired.device}": target}},
        signer,
    )
    shot = sign(
        "director-snapshot", snapshot(version, now, LIFETIME, {"targets.json": (version, targets)}), signer
    )
    return DirectorMetadata(
        version=version,
        document_sha256=digest,
        expires=(now // 1_000_000) * 1_000_000 + LIFETIME // timedelta(microseconds=1),
        targets=targets,
        snapshot=shot,
        timestamp=sign("director-timestamp", timestamp(version, now, LIFETIME, (version, shot)), signer),
    )
