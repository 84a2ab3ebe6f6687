"""Judge a trial, and the version that was confirmed, from what their lanes show."""

import enum
from collections.abc import Mapping, Sequence
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
MAX_DEATHS: Final = 5
"""Engines that a confirmed version may take down, each soon after its start, before it is given up."""
STALE_S: Final = 10.0
"""A lane speaks every second; after this without a word it counts as running no more."""
SILENT_S: Final = 30.0
"""A lane that says nothing for so long while its engine lives hangs in its model."""
GROWN_S: Final = 10.0
"""A trial is good only while windows are scored: within this time, or the trial's own if that is longer."""
ERROR_SHARE: Final = 0.05
ERRORS: Final = 3
"""A trial is bad from this many errors on, if they are at least ``ERROR_SHARE`` of its windows."""
DAMAGE: Final = frozenset({"package.file_mismatch", "package.file_missing"})
"""Codes of a lane whose files are not what they were when they came."""


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
    """One lane of a model, as far as it concerns the version that is judged."""

    lane: str
    state: Literal["unknown", "loading", "calibrating", "running", "failed", "silent"] = "unknown"
    serves: bool = False
    """Its session is that version's: same digest, same activation."""
    code: ErrorCode | None = None
    """Set when that session failed."""
    detail: Text = ""
    windows: Count = 0
    errors: Count = 0
    source_works: bool = False
    """Its source has given rows to some version before."""
    on_demand: bool = False
    """It answers requests: that nobody asks says nothing of it."""


class Watch(Struct, frozen=True):
    """How long a trial has lasted, by the monotonic clock in seconds."""

    begun: float
    running: float | None = None
    """Since when all lanes have been running the trial."""
    sick: float | None = None
    """Since when a lane has failed because of its source."""
    moved: float | None = None
    """When all lanes last ran, or one calibrated."""
    grown: Mapping[str, tuple[Count, float]] = {}
    """Windows of each lane, and when they last grew."""


def watch(before: Watch | None, lanes: Sequence[LaneSeen], now: float) -> Watch:
    """Return the watch after one more look."""
    w = before or Watch(begun=now)
    running = all(lane.state == "running" and lane.serves for lane in lanes)
    sick = any(_source_failed(lane) for lane in lanes)
    calibrating = any(lane.state == "calibrating" for lane in lanes)
    return msgspec.structs.replace(
        w,
        running=(now if w.running is None else w.running) if running else None,
        sick=(now if w.sick is None else w.sick) if sick else None,
        moved=now if calibrating or running else w.moved,
        grown={lane.lane: _growth(w.grown.get(lane.lane), lane, now) for lane in lanes},
    )


def _growth(before: tuple[Count, float] | None, lane: LaneSeen, now: float) -> tuple[Count, float]:
    return before if before is not None and before[0] == lane.windows else (lane.windows, now)


def judge(w: Watch, lanes: Sequence[LaneSeen], now: float, *, trial_s: float, starts: int) -> Verdict:
    """Judge a trial.

    ``starts`` counts the engine processes that began while it lasted. A model
    without a lane has only to last as long; where it is served, it must be in
    service for that time, and few of its answers may be errors. A source that
    gives nothing says nothing of the model: the trial goes on until windows come.
    """
    if starts > MAX_STARTS:
        return Verdict(Judgement.BAD, "trial.crashed", f"the engine was started {starts} times")
    bad = next((bad for lane in lanes if (bad := _lane_bad(lane)) is not None), None)
    bad = bad or _too_late(w, now, trial_s)
    if bad is not None:
        return bad
    lasted = w.running is not None and now - w.running >= trial_s
    recent = max(GROWN_S, trial_s)
    asked = {lane.lane for lane in lanes if lane.on_demand}
    scoring = all(n > 0 and now - at < recent for lane, (n, at) in w.grown.items() if lane not in asked)
    return Verdict(Judgement.GOOD) if lasted and scoring else Verdict()


def judge_confirmed(lanes: Sequence[LaneSeen], failed_s: float, deaths: int, died_of: str = "") -> Verdict:
    """Judge a version that was confirmed: bad is what keeps it from serving and does not pass.

    ``failed_s`` says for how long a lane has failed, see ``ails``; ``died_of``
    how the last engine died, as ``code: detail``.
    """
    if deaths >= MAX_DEATHS:
        code, _, how = died_of.partition(": ")
        said = f"after its trial: {deaths} engines died of it" + (f"; the last one: {how}" if how else "")
        return Verdict(Judgement.BAD, code or "trial.crashed", said)
    bad = next((lane for lane in lanes if ails(lane)), None)
    if bad is None or failed_s < LOAD_S:
        return Verdict()
    detail = f"after its trial: lane {bad.lane} fails since {failed_s:.0f} s: {bad.code}: {bad.detail}"
    return Verdict(Judgement.BAD, "trial.unhealthy", detail[:2000])


def ails(lane: LaneSeen) -> bool:
    """Whether a lane does not serve, and neither its source nor a damaged file is the reason."""
    return lane.state == "failed" and not _source_failed(lane) and lane.code not in DAMAGE


def _too_late(w: Watch, now: float, trial_s: float) -> Verdict | None:
    if w.sick is not None:
        if now - w.sick < max(SOURCE_S, trial_s):
            return None
        return Verdict(Judgement.BAD, "trial.unhealthy", f"no source for {now - w.sick:.0f} s")
    since = w.begun if w.moved is None else w.moved
    if w.running is None and now - since >= LOAD_S:
        return Verdict(Judgement.BAD, "trial.unhealthy", f"not in service after {now - since:.0f} s")
    return None


def crashed(detail: str, code: ErrorCode = "trial.crashed") -> Verdict:
    """The engine died, or had to be ended, while the trial was in service."""
    return Verdict(Judgement.BAD, code, detail)


def _source_failed(lane: LaneSeen) -> bool:
    """A setting that is wrong is trouble of the source too, unless it has worked with another version."""
    if lane.state != "failed" or lane.code is None:
        return False
    return lane.code.startswith("source.") or (lane.code == "config.invalid" and not lane.source_works)


def _lane_bad(lane: LaneSeen) -> Verdict | None:
    if lane.state == "failed" and not _source_failed(lane):
        cause = lane.code or "no code"
        return Verdict(Judgement.BAD, "trial.unhealthy", f"lane {lane.lane}: {cause}: {lane.detail}"[:2000])
    if lane.code is not None and not _source_failed(lane):
        return Verdict(
            Judgement.BAD, "trial.unhealthy", f"lane {lane.lane}: {lane.code}: {lane.detail}"[:2000]
        )
    if not lane.serves or lane.errors < ERRORS:
        return None
    if lane.errors >= ERROR_SHARE * (lane.windows + lane.errors):
        return Verdict(
            Judgement.BAD,
            "trial.unhealthy",
            f"lane {lane.lane}: {lane.errors} errors in {lane.windows + lane.errors} windows"
            + (f", such as {lane.detail}" if lane.detail else ""),
        )
    return None
