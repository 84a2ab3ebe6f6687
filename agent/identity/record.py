"""What a device knows of itself once it is enrolled, and the join token that brings it there."""

import re
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from contract.errors import PitheadError
from contract.messages import DeviceId, Micros, Sha256

TOKEN: Final = re.compile(r"pj1\.([A-Za-z0-9_-]{43})\.([0-9a-f]{64})")


class Identity(Struct, frozen=True, omit_defaults=True):
    """``identity.json``: who the device is, and where its server and broker are."""

    device: DeviceId
    server: str
    broker_host: str
    broker_port: int
    enrolled_at: Micros
    name: str = ""
    hardware: str = "unknown"


class JoinToken(Struct, frozen=True):
    """A join token taken apart. ``text`` is what the server wants to see."""

    text: str
    ca_sha256: Sha256


def parse_token(text: str) -> JoinToken:
    """Return a join token ``pj1.<secret>.<SHA-256 of the server CA>``, or raise ``enrol.token_invalid``."""
    matched = TOKEN.fullmatch(text.strip())
    if matched is None:
        raise PitheadError(
            "enrol.token_invalid", "a join token looks like pj1.<secret>.<fingerprint>; was it copied whole?"
        )
    return JoinToken(text.strip(), matched.group(2))


def load(path: Path) -> Identity | None:
    """Return the identity in ``path``; None when there is none. A damaged one is ``storage.corrupt``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PitheadError("storage.failed", f"reading {path}: {error.strerror}") from error
    try:
        return msgspec.json.decode(data, type=Identity)
    except msgspec.MsgspecError as error:
        raise PitheadError("storage.corrupt", f"{path}: {error}; enrol the device again") from error
