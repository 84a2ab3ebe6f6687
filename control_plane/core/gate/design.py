"""How many devices a decision needs, said before and not after the rollout."""

from typing import Final

from control_plane.core.gate.permutation import possible

MOST: Final = 64
"""No decision needs more canaries than this, whatever alpha is."""


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
    stages. The first stage, where most harm shows, has half of it; the rest
    is divided evenly. Each stage is randomised anew, so the shares add up.
    """
    if stages == 1:
        return [(1.0, 0.0)]
    part = 0.5 / (2 * (stages - 1))
    return [(0.5, 0.0), *((part, part) for _ in range(stages - 1))]
