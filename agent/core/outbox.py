"""The outbox's decisions: what goes first, what is given up, what an acknowledgement covers."""

from collections.abc import Mapping, Sequence
from typing import Final

from contract.messages import AckRange, PriorityClass

ORDER: Final = tuple(PriorityClass)
"""From the most to the least worth keeping; also the order of sending."""
RANK: Final[Mapping[PriorityClass, int]] = {priority: rank for rank, priority in enumerate(ORDER)}


def evictions(
    held: Mapping[PriorityClass, int], coming: Mapping[PriorityClass, int], limit: int
) -> dict[PriorityClass, int]:
    """Return how many bytes each class must give up so that all fits into ``limit``.

    ``held`` and ``coming`` are bytes by class. The least important class
    gives first, whether its records are old or only coming.
    """
    excess = sum(held.values()) + sum(coming.values()) - limit
    given: dict[PriorityClass, int] = {}
    for priority in reversed(ORDER):
        if excess <= 0:
            break
        share = min(excess, held.get(priority, 0) + coming.get(priority, 0))
        if share:
            given[priority] = share
            excess -= share
    return given


def acknowledged(ack: AckRange) -> list[tuple[int, int]]:
    """Return the closed ranges of sequence numbers that ``ack`` covers, merged and in order."""
    spans = [(1, ack.prefix)] if ack.prefix else []
    spans += [(first, last) for first, last in ack.ranges if 1 <= first <= last]
    return merge(spans)


def merge(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return closed ranges in order, with overlapping and touching ones joined."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
