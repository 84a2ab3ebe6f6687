"""The one reader of the clock."""

import time


def now_micros() -> int:
    """Return microseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1000
