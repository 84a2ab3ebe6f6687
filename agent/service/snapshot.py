"""What the running supervisor saw last, for ``pithead-agent status``. Lost at a reboot, and that is fine."""

import contextlib
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.ports import LaneState, ServeState
from contract.messages import Desired, Micros, OutboxHealth, Reported


class Snapshot(Struct, frozen=True):
    """The live part of the status."""

    t: Micros
    reported: Reported
    lanes: tuple[LaneState, ...]
    engine_pid: int | None
    broker: str
    server: str
    outbox: OutboxHealth
    desired: Desired | None = None
    serve: ServeState | None = None


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Replace the file; an error is of no account."""
    temporary = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        temporary.write_bytes(msgspec.json.encode(snapshot))
        temporary.rename(path)


def read_snapshot(path: Path) -> Snapshot | None:
    """Return the last snapshot, or None."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Snapshot)
    except (OSError, msgspec.MsgspecError):
        return None
