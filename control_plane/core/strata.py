"""Who comes when: a random order of the devices inside strata, the same on every look.

The order is a hash of rollout and device, so it needs no stored randomness,
is balanced over hardware, accelerator and site, and picks other guinea pigs
in every rollout.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Final

import msgspec

SMALLEST_STRATUM: Final = 4
"""Strata with fewer devices are put together into one, since nothing can be compared inside them."""
MIXED: Final = "mixed"


class Choice(msgspec.Struct, frozen=True):
    """Who is who in one stage."""

    canaries: tuple[str, ...]
    controls: tuple[str, ...]
    """All others, the hold-out among them."""
    hold_out: tuple[str, ...]


def rank(rollout: str, device: str) -> str:
    """Return the key by which ``device`` is sorted in ``rollout``."""
    return hashlib.sha256(f"{rollout}\n{device}".encode()).hexdigest()


def merge_small(strata: Mapping[str, str], smallest: int = SMALLEST_STRATUM) -> dict[str, str]:
    """Return device -> stratum with the strata of fewer than ``smallest`` devices put together."""
    sizes: dict[str, int] = {}
    for stratum in strata.values():
        sizes[stratum] = sizes.get(stratum, 0) + 1
    return {device: stratum if sizes[stratum] >= smallest else MIXED for device, stratum in strata.items()}


def order(rollout: str, strata: Mapping[str, str]) -> list[str]:
    """Return the devices so that every beginning of the list is as balanced over the strata as can be."""
    groups = _groups(rollout, strata)
    position = {
        device: (Fraction(2 * index + 1, 2 * len(members)), rank(rollout, device))
        for members in groups.values()
        for index, device in enumerate(members)
    }
    return sorted(position, key=position.__getitem__)


def choose(
    rollout: str,
    strata: Mapping[str, str],
    *,
    canaries: int,
    hold_out: int,
    kept: Iterable[str] = (),
) -> Choice:
    """Choose ``canaries`` devices and a hold-out of ``hold_out`` at random, both from the same strata.

    The hold-out comes from the end of the order, the canaries from its
    beginning; ``kept`` are devices that are in the hold-out already. Fewer
    canaries are chosen when the hold-out leaves no more.
    """
    kept = set(kept) & set(strata)
    line = [device for device in order(rollout, strata) if device not in kept]
    more = max(0, min(hold_out - len(kept), len(line) - 1))
    held = {*kept, *line[len(line) - more :]}
    chosen = [device for device in line if device not in held][: max(canaries, 0)]
    others = [device for device in order(rollout, strata) if device not in chosen]
    return Choice(
        canaries=tuple(chosen),
        controls=tuple(others),
        hold_out=tuple(device for device in others if device in held),
    )


def share(percent: float, devices: int) -> int:
    """Return ``percent`` of ``devices``, rounded up."""
    return math.ceil(round(percent * devices / 100, 9))


def _groups(rollout: str, strata: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for device in sorted(strata, key=lambda device: rank(rollout, device)):
        groups.setdefault(strata[device], []).append(device)
    return groups
