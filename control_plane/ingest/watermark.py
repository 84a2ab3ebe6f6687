"""What is committed of a sequence of records, as a prefix and ranges. Pure."""

from bisect import bisect_right
from collections.abc import Iterable
from operator import itemgetter
from typing import Final

import msgspec

MAX_RANGES: Final = 1_000
"""Ranges that are kept. To forget the oldest is safe: the device sends those records again, and the
tables' own keys know them."""

Spans = tuple[tuple[int, int], ...]


class Mark(msgspec.Struct, frozen=True):
    """All up to ``prefix``, and the closed ``ranges`` beyond it, in order, with gaps between them."""

    prefix: int = 0
    ranges: Spans = ()

    def __contains__(self, seq: int) -> bool:
        if seq <= self.prefix:
            return True
        place = bisect_right(self.ranges, seq, key=itemgetter(0)) - 1
        return place >= 0 and seq <= self.ranges[place][1]

    def add(self, sequence: Iterable[int], oldest: int = 0) -> "Mark":
        """Return the mark with ``sequence`` added, and with everything below ``oldest``.

        What the device holds no more can never come, so it need not stay open.
        """
        prefix = max(self.prefix, oldest - 1)
        spans = sorted([*self.ranges, *((seq, seq) for seq in set(sequence))])
        ranges: list[tuple[int, int]] = []
        for first, last in spans:
            if first <= prefix + 1:
                prefix = max(prefix, last)
            elif ranges and first <= ranges[-1][1] + 1:
                ranges[-1] = (ranges[-1][0], max(ranges[-1][1], last))
            else:
                ranges.append((first, last))
        return Mark(prefix, tuple(ranges[-MAX_RANGES:]))
