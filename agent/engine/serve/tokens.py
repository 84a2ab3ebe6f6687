"""Who may ask: bearer tokens, of which only hashes are kept.

The file has a line for each token: ``<sha256 of the token> <name> [infer|admin]``.
``infer`` may ask models and read what there is; ``admin`` (the default) may
change what is served too. ``pithead-agent serve --new-token NAME`` makes one.
"""

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct

from contract.errors import PitheadError

PREFIX: Final = "ps1."
ROLES: Final = ("infer", "admin")
_HEX: Final = 64
_SCHEME: Final = b"bearer "


class Principal(Struct, frozen=True):
    """Somebody who may ask."""

    name: str
    admin: bool


ANYBODY: Final = Principal("anybody", admin=True)
"""Where no tokens are asked for: on loopback."""


BY_BROKER: Final = Principal("mqtt", admin=False)
"""All who ask by MQTT: who they are, their broker knows."""


class Tokens:
    """The tokens that are known."""

    def __init__(self, known: Mapping[bytes, Principal]) -> None:
        self._known = dict(known)
        self.changes = 0
        """How often they have become others."""

    def become(self, others: "Tokens") -> None:
        """Know what ``others`` knows, and nothing else."""
        self._known = others._known  # noqa: SLF001 - of the same class
        self.changes += 1

    def who(self, authorization: bytes | None) -> Principal:
        """Return whom an ``Authorization`` header names; raises ``auth.missing``, ``auth.invalid``.

        Looked up by hash, so that the time it takes tells nothing of a token.
        """
        if authorization is None:
            raise PitheadError("auth.missing", "send Authorization: Bearer <token>")
        if authorization[:7].lower() != _SCHEME:
            raise PitheadError("auth.invalid", "the scheme must be Bearer")
        found = self._known.get(hashlib.sha256(authorization[7:].strip()).digest())
        if found is None:
            raise PitheadError("auth.invalid", "the token is not known")
        return found


def read(path: Path) -> Tokens:
    """Return the tokens of a file; raises ``config.invalid`` with the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PitheadError("config.invalid", f"--token-file {path}: {error}") from error
    known: dict[bytes, Principal] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        role = words[2] if len(words) > 2 else "admin"  # noqa: PLR2004
        try:
            digest = bytes.fromhex(words[0])
            name = words[1]
        except (ValueError, IndexError) as error:
            raise PitheadError("config.invalid", f"--token-file {path}: line {number}: {error}") from error
        if len(words[0]) != _HEX or role not in ROLES:
            raise PitheadError(
                "config.invalid", f"--token-file {path}: line {number}: <sha256> <name> [infer|admin]"
            )
        known[digest] = Principal(name, admin=role == "admin")
    if not known:
        raise PitheadError("config.invalid", f"--token-file {path} has no token")
    return Tokens(known)


def new(name: str, role: str) -> tuple[str, str]:
    """Return a new token, and its line for the file."""
    token = PREFIX + secrets.token_urlsafe(32)
    return token, f"{hashlib.sha256(token.encode()).hexdigest()} {name} {role}"
