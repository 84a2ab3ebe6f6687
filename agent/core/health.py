"""Judge a trial from what its lanes show."""

import enum
from collections.abc import Sequence
from typing import Final, Literal

import msgspec
from msgspec import Struct

from contract.messages import Count, ErrorCode, Text

LOAD_S: Final = 120.0
"""A session that does not serve within this has failed. A calibration does not count."""
SOURCE_S: Final = 300.0
"""How long a lane may fail because of its sensor before the trial is given up."""
MAX_STARTS: Final = 3
"""Engine processes that one trial may use up across restarts of the whole device."""
ERROR_SHARE: Final = 0.05
ERRORS: Final = 3
"""A trial is bad from this many errors on, if they are at least ``ERROR_SHARE`` of its windows."""


class Judgement(enum.Enum):
    """What is to be done with a trial."""

    PENDING = "pending"
    GOOD = "good"
    BAD = "bad"


class Verdict(Struct, frozen=True):
    """A judgement and why."""

    judgement: Judgement = Judgement.PENDING
    code: ErrorCode | None = None
    detail: Text = ""


class LaneSeen(Struct, frozen=True):
    """One lane of the model on trial."""

    lane: str
    state: Literal["unknown", "loading", "calibrating", "running", "failed"] = "unknown"
    serves_trial: bool = False
    """Its session is the trial's: same digest, same activation."""
    code: ErrorCode | None = None
    """Set when the trial's session failed."""
    detail: Text = ""
    windows: Count = 0
    errors: Count = 0


class Watch(Struct, frozen=True):
    """How long a trial has lasted, by the monotonic clock in seconds."""

    begun: float
    running: float | None = None
    """Since when all lanes have been running the trial."""
    sick: float | None = None
    """Since when a lane has failed because of its source."""
    moved: float | None = None
    """When a lane last calibrated."""


def watch(before: Watch | None, lanes: Sequence[LaneSeen], now: float) -> Watch:
    """Return the watch after one more look."""
    w = before or Watch(begun=now)
    running = all(lane.state == "running" and lane.serves_trial for lane in lanes)
    sick = any(_source_failed(lane) for lane in lanes)
    calibrating = any(lane.state == "calibrating" for lane in lanes)
    return msgspec.structs.replace(
        w,
        running=(now if w.running is None else w.running) if running else None,
        sick=(now if w.sick is None else w.sick) if sick else None,
        moved=now if calibrating else w.moved,
    )


def judge(w: Watch, lanes: Sequence[LaneSeen], now: float, *, trial_s: float, starts: int) -> Verdict:
    """Judge a trial.

    ``starts`` counts the engine processes that began while it lasted. A model
    without a lane has only to last as long.
    """
    if starts > MAX_STARTS:
        return Verdict(Judgement.BAD, "trial.crashed", f"the engine was started {starts} times")
    bad = next((bad for lane in lanes if (bad := _lane_bad(lane)) is not None), None)
    bad = bad or _too_late(w, now, trial_s)
    if bad is not None:
        return bad
    lasted = w.running is not None and now - w.running >= trial_s
    return Verdict(Judgement.GOOD) if lasted and all(lane.windows > 0 for lane in lanes) else Verdict()


def _too_late(w: Watch, now: float, trial_s: float) -> Verdict | None:
    if w.sick is not None:
        if now - w.sick < max(SOURCE_S, trial_s):
            return None
        return Verdict(Judgement.BAD, "trial.unhealthy", f"no source for {now - w.sick:.0f} s")
    since = w.begun if w.moved is None else w.moved
    if w.running is None and now - since >= LOAD_S:
        return Verdict(Judgement.BAD, "trial.unhealthy", f"not in service after {now - since:.0f} s")
    return None


def crashed(detail: str) -> Verdict:
    """The engine died while the trial was in service."""
    return Verdict(Judgement.BAD, "trial.crashed", detail)


def _source_failed(lane: LaneSeen) -> bool:
    return lane.state == "failed" and lane.code is not None and lane.code.startswith("source.")


def _lane_bad(lane: LaneSeen) -> Verdict | None:
    if lane.state == "failed" and not _source_failed(lane):
        cause = lane.code or "no code"
        return Verdict(Judgement.BAD, "trial.unhealthy", f"lane {lane.lane}: {cause}: {lane.detail}"[:2000])
    if lane.code is not None and not _source_failed(lane):
        return Verdict(
            Judgement.BAD, "trial.unhealthy", f"lane {lane.lane}: {lane.code}: {lane.detail}"[:2000]
        )
    if not lane.serves_trial or lane.errors < ERRORS:
        return None
    if lane.errors >= ERROR_SHARE * (lane.windows + lane.errors):
        return Verdict(
            Judgement.BAD,
            "trial.unhealthy",
            f"lane {lane.lane}: {lane.errors} errors in {lane.windows + lane.errors} windows",
        )
    return None
