"""How many devices a decision needs, said before and not after the rollout."""

from typing import Final

from control_plane.core.gate.permutation import possible

MOST: Final = 64
"""No decision needs more canaries than this, whatever alpha is."""
RESERVED: Final = 0.25
"""Share of alpha for the watch after a stage's longest soak, while a person is awaited."""


def can_decide(sizes: list[tuple[int, int]], *, alpha: float, extremes: int = 1) -> bool:
    """Whether ``alpha`` pays for rejecting the ``extremes`` most extreme choices.

    ``sizes`` are (canaries, devices) by stratum. Each metric has one most
    extreme choice of its own.
    """
    return possible(sizes) * alpha >= extremes


def canaries_needed(controls: int, *, alpha: float, extremes: int = 1) -> int | None:
    """Return the fewest canaries beside ``controls`` with which the gate can decide, or None."""
    for canaries in range(1, MOST + 1):
        if can_decide([(canaries, canaries + controls)], alpha=alpha, extremes=extremes):
            return canaries
    return None


def controls_needed(canaries: int, *, alpha: float, extremes: int = 1) -> int | None:
    """Return the fewest controls beside ``canaries`` with which the gate can decide, or None."""
    if canaries < 1:
        return None
    for controls in range(1, 4 * MOST**2):
        if can_decide([(canaries, canaries + controls)], alpha=alpha, extremes=extremes):
            return controls
    return None


def alpha_shares(stages: int) -> list[tuple[float, float]]:
    """Return, by stage, the shares of alpha of (its own comparison, the watch over earlier stages).

    A rollout may halt without cause with chance alpha over all of its
    stages. ``RESERVED`` is kept for the time after the longest soaks; of the
    rest the first stage, where most harm shows, has half, and the others
    share the other half evenly. By the union bound the shares add up.
    """
    first = 1 - RESERVED
    if stages == 1:
        return [(first, 0.0)]
    first /= 2
    part = first / (2 * (stages - 1))
    return [(first, 0.0), *((part, part) for _ in range(stages - 1))]


def late_share(number: int) -> float:
    """Return the share of alpha of the late watch ``number``, from 1: together at most ``RESERVED``."""
    return float(RESERVED * 0.5**number)


def late_number(before: float, period: int) -> int:
    """Return the number, in the rollout, of a stage's late watch ``period``.

    ``before`` is how long after the rollout's first activation the stage's
    soak began, in longest soaks. A stage's late watches begin 1, 2, 4, 8 ... longest soaks after its soak. So
    one that had begun ``period`` of them was at least ``period`` longest soaks
    old when the next stage came, and no number is used twice in a rollout.
    """
    return int(before) + period


def period(number: int, longest: int) -> tuple[int, int]:
    """Return (first bucket, length) of a stage's ``number``-th period: its soak, and then late watches.

    Each is twice as long as the one before, so that few of them, and with
    them what is reserved, last for days.
    """
    return (0, longest) if number == 0 else (longest << (number - 1), longest << (number - 1))
