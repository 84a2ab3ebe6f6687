"""Ids of all but devices: UUIDv7 (RFC 9562, 5.7) as text, so that they sort by the time of their making."""

import os
import time
import uuid


def new_id() -> str:
    """Return a new id."""
    milliseconds = time.time_ns() // 1_000_000
    number = (milliseconds & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10))
    number = number & ~(0xF << 76) | 7 << 76
    number = number & ~(0x3 << 62) | 2 << 62
    return str(uuid.UUID(int=number))
