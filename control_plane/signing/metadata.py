"""Metadata of the online roles as plain documents: how they are built, made canonical and put in an envelope.

The offline roles are python-tuf's business. The online ones are signed for
every device and every change, and a dictionary costs a tenth of an object
graph; every device checks them with python-tuf all the same.
"""

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from securesystemslib.formats import encode_canonical

from control_plane.ports import MetadataSigner

SPEC_VERSION: Final = "1.0.31"
SIGNED_AT: Final = "signed_at"
"""Field of every timestamp: when it was signed, microseconds UTC. Devices take their time floor from it."""

Document = dict[str, Any]

_encoder = msgspec.json.Encoder(order="sorted")


def canonical(signed: Document) -> bytes:
    """Return the bytes over which a signature is made."""
    text = encode_canonical(signed)
    assert text is not None
    return text.encode()


def head(kind: str, version: int, now: int, lifetime: timedelta) -> Document:
    """Return what every role's document begins with; ``now`` in microseconds UTC."""
    expires = datetime.fromtimestamp(now // 1_000_000, UTC) + lifetime
    return {
        "_type": kind,
        "spec_version": SPEC_VERSION,
        "version": version,
        "expires": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def snapshot(version: int, now: int, lifetime: timedelta, meta: dict[str, tuple[int, bytes]]) -> Document:
    """Return a snapshot; ``meta`` maps a file's name to its version and its bytes."""
    files = {name: reference(number, data) for name, (number, data) in meta.items()}
    return head("snapshot", version, now, lifetime) | {"meta": files}


def timestamp(version: int, now: int, lifetime: timedelta, snapshot_file: tuple[int, bytes]) -> Document:
    """Return a timestamp for a snapshot, given by its version and its bytes."""
    number, data = snapshot_file
    return head("timestamp", version, now, lifetime) | {
        "meta": {"snapshot.json": reference(number, data)},
        SIGNED_AT: now,
    }


def reference(version: int, data: bytes) -> Document:
    """Return how one metadata file names another: version, length and hash."""
    return {"version": version, "length": len(data), "hashes": {"sha256": hashlib.sha256(data).hexdigest()}}


def sign(role: str, signed: Document, signer: MetadataSigner) -> bytes:
    """Return the signed file of a document."""
    keyid, signature = signer.sign(role, canonical(signed))
    return _encoder.encode({"signatures": [{"keyid": keyid, "sig": signature}], "signed": signed})


def next_version(last: int, now: int) -> int:
    """Return a version above ``last`` and above all that a lost database can have given out."""
    return max(last + 1, now // 1_000_000)
