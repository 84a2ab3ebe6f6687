"""What the gate is given and what it answers."""

import enum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Integers = NDArray[np.int64]


class Outcome(enum.Enum):
    """What the gate says."""

    ADVANCE = "advance"
    HOLD = "hold"
    HALT = "halt"


class Evidence(msgspec.Struct, frozen=True):
    """What was seen of canaries and controls, in buckets of time.

    ``series`` holds, by metric, an array devices x buckets with NaN where a
    device said nothing; the first ``pre`` buckets lie before the activation.
    ``seed`` fixes the permutations; ``alpha_share`` is the part of the
    policy's alpha that this comparison may spend on halting.
    """

    seed: str
    devices: tuple[str, ...]
    treated: tuple[bool, ...]
    strata: tuple[str, ...]
    pre: int
    series: dict[str, Any]
    alpha_share: float = 1.0
    last: int | None = None
    """Bucket over which the error is spent; the policy's longest soak unless given."""
    may_advance: bool = True
    """False for a comparison that only watches for harm."""
    muted: Any = None
    """Devices x buckets: whether the device gave no windows since its machine did not run. Such a bucket is
    neither evidence nor silence. None: no machine ever stood."""


class MetricLook(msgspec.Struct, frozen=True):
    """What one look found in one metric, on the scale of the comparison; positive is worse."""

    metric: str
    shift: float | None
    """Adjusted mean of the canaries less that of the controls."""
    margin_p: float | None
    """Permutation p of "at least as harmful as the margin"."""
    passed: bool
    """Whether the margin is refuted by now, and at this look too."""


class Look(msgspec.Struct, frozen=True):
    """One look; ``bucket`` counts from the activation."""

    bucket: int
    verdict: Outcome
    reason: str
    harm_z: float | None
    """Largest standardised rank sum over all that was compared."""
    harm_p: float | None
    """Its permutation p at this look alone."""
    harm_limit: float | None
    """The z above which this look halts."""
    worst: str | None
    """Which comparison that was, for example ``alarm_rate`` or ``silence``."""
    alpha_spent: float
    metrics: tuple[MetricLook, ...]


class Verdict(msgspec.Struct, frozen=True):
    """The gate's answer to all the evidence there is."""

    verdict: Outcome
    reason: str
    bucket: int | None
    """When it was decided, counted from the activation; None while it holds. Of an ADVANCE, the look
    from which on every look advanced."""
    looks: tuple[Look, ...] = ()
    permutations: int = 0
    exact: bool = False
    """Whether all possible choices of canaries were compared, not a sample."""
    too_few: bool = False
    """Whether no amount of time could decide with so few devices."""
    exhausted: bool = False
    """Whether the longest soak is over."""


def hold(reason: str, *, too_few: bool = False) -> Verdict:
    """Return a HOLD without looks: there is nothing to look at, or it cannot be read."""
    return Verdict(verdict=Outcome.HOLD, reason=reason, bucket=None, too_few=too_few)
