"""How long to wait before the next try."""

from typing import Final

FACTOR: Final = 2.0


def delay(failures: int, fraction: float, *, base_s: float = 1.0, cap_s: float = 60.0) -> float:
    """Return the seconds to wait after ``failures`` failures in a row (at least 1).

    The bound doubles with each failure up to ``cap_s``; ``fraction`` in
    [0, 1), a random number, picks a point in its upper half, so that a fleet
    that lost its server together does not come back together.
    """
    if failures < 1:
        raise ValueError(f"failures counts from 1, not {failures}")
    bound = min(cap_s, base_s * FACTOR ** min(failures - 1, 64))
    return bound * (0.5 + 0.5 * fraction)
