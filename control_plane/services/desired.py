"""Change what a device shall be. The director signs whatever stands here."""

import time
from collections.abc import Callable

from msgspec.structs import replace
from sqlmodel import Session

from contract.messages import PROTOCOL_VERSION, Desired
from control_plane.store import desired as store


def read(tx: Session, device_id: str) -> Desired:
    """Return the device's document; revision 0 with no models when nothing was ever wanted of it."""
    return store.read(tx, device_id) or Desired(v=PROTOCOL_VERSION, device=device_id, revision=0)


def change(
    tx: Session, device_id: str, edit: Callable[[Desired], Desired], *, now: int | None = None
) -> Desired:
    """Apply ``edit`` and return the document as it then stands.

    The revision rises, and the device is marked to be told, only when
    something changed. ``now`` in microseconds, the time by default. Device and
    revision are not ``edit``'s to choose.
    """
    before = read(tx, device_id)
    after = replace(edit(before), v=PROTOCOL_VERSION, device=device_id, revision=before.revision)
    if after == before:
        return before
    after = replace(after, revision=before.revision + 1)
    store.write(tx, after, time.time_ns() // 1000 if now is None else now)
    return after


def dirty(tx: Session, limit: int = 1000) -> list[tuple[str, int]]:
    """Return ``(device id, revision)`` of the devices that have not been told, the longest waiting first."""
    return store.dirty(tx, limit)


def clear(tx: Session, device_id: str, revision: int) -> None:
    """Note that a device was told of ``revision``; when it is older than the newest, it stays marked."""
    store.clear(tx, device_id, revision)
