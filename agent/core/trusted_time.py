"""What is known of the time when the clock may be wrong: signed times are a floor under it."""

from datetime import UTC, datetime
from typing import Final

BUILT: Final = int(datetime(2025, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
"""No honest clock stands before this, microseconds UTC."""
TOLERANCE_US: Final = 300 * 1_000_000
"""How far behind signed time a clock may be and still be asked whether a certificate is valid."""
NO_CHECK_TIME: Final = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which the ``ssl`` module does not name."""


def clock_is_right(now: int, floor: int) -> bool:
    """Whether the clock can be right, as far as the device can know; both in microseconds UTC."""
    return now + TOLERANCE_US >= max(floor, BUILT)
