"""Stop all writes to controls of the plant from this device, by hand and at once.

Needs neither supervisor nor control plane: the engine's sinks look for the
file before each write (``agent.engine.sinks.bypass``).
"""

import contextlib
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.store import durable
from contract.errors import PitheadError


class Bypass(Struct, frozen=True):
    """Who stopped the writes, when, and why; all empty where the file says nothing that can be read."""

    since: str = ""
    who: str = ""
    why: str = ""


def switch_on(path: Path, now: datetime, who: str, why: str) -> None:
    """Stop the writes, durably. One that is on already stays as it is. Raises ``storage.*``.

    On a full disk there is often room for an empty file still, and that stops them too.
    """
    if read(path) is not None:
        return
    since = now.astimezone(UTC).isoformat(timespec="seconds")
    try:
        durable.write(path, msgspec.json.encode(Bypass(since, who, why)))
    except PitheadError:
        with contextlib.suppress(OSError):
            path.touch()
        if read(path) is None:
            raise


def switch_off(path: Path) -> None:
    """Allow the writes again, durably. Raises ``storage.*``."""
    durable.remove(path)


def read(path: Path) -> Bypass | None:
    """Return the bypass that is on, or None. A file that cannot be read is one too."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Bypass)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.MsgspecError):
        return Bypass()


def since_us(found: Bypass, path: Path) -> int:
    """Return since when it is on, microseconds UTC: as it says, else as old as its file is; 0 if unknown."""
    try:
        since = datetime.fromisoformat(found.since)
        seconds = (since if since.tzinfo is not None else since.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        try:
            seconds = path.lstat().st_mtime
        except OSError:
            return 0
    return max(0, round(seconds * 1e6))


def render(found: Bypass | None) -> str:
    """Return one line for a person."""
    if found is None:
        return "off: controls are written as their lanes say"
    parts = (
        (found.since and f"since {found.since}"),
        (found.who and f"by {found.who}"),
        (found.why and f"({found.why})"),
    )
    return " ".join(["on", *(part for part in parts if part)]) + ": nothing is written to any control"
