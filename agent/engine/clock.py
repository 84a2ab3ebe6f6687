"""The two clocks of the engine, handed in so that tests can hold them."""

from collections.abc import Callable
from typing import NamedTuple


class Clock(NamedTuple):
    """Both in integer microseconds."""

    wall: Callable[[], int]
    """Since 1970-01-01 UTC; may jump."""
    mono: Callable[[], int]
    """Never goes back; its zero means nothing."""
