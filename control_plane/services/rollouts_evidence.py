"""From summaries to evidence: what canaries and controls did, on one grid of time.

The grid is in the server's time. A device's clock may be wrong, so each
device's buckets are moved by the smallest difference between when they came
and when they ended: its clock's error and its shortest delivery.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import msgspec
import numpy as np
import zstandard
from sqlmodel import Session

from control_plane.core.gate import Evidence, trace
from control_plane.core.gate.design import alpha_shares, late_number, late_share, period
from control_plane.core.gate.evidence import Booleans, Floats
from control_plane.core.policy import ALARM_RATE, ERROR_RATE, LATENCY, Policy
from control_plane.core.progress import MICROS, Arm
from control_plane.store import rollouts_seen as store
from control_plane.store.rollouts import AssignmentRecord, RolloutRecord
from control_plane.store.rollouts_seen import SeenBucket

LANE: Final = "lane"
"""``ModelSummary.source`` of a lane."""
CLOCK_MARGIN_US: Final = 3600 * MICROS
"""Devices whose clocks are wrong by more than this and more than they were last seen to be are silent."""
SHORTEST_US: Final = 1.0
"""Latencies are compared on the log scale; what is shorter than the clock can tell counts as this."""
MAX_TRACE: Final = 1 << 30
"""Bytes of a stored trace."""


class Due(msgspec.Struct, frozen=True):
    """A look that is due."""

    period: int
    """0 while the stage soaks, then the late watches (see ``core.gate.design``)."""
    bucket: int
    """Counted from the period's beginning."""


class Recent(msgspec.Struct, frozen=True):
    """What the guardrails need of one device."""

    begun: bool
    """Whether it has served what it was told to (re)activate."""
    speaking: bool
    """Whether it did so within the last ``silent_buckets``."""
    windows: int
    errors: int
    restarts: int = 0
    """Deaths of its engine since the soak began."""


class Rows:
    """Summaries of a rollout's devices, by device, with the offsets of their clocks."""

    def __init__(self, rows: Iterable[SeenBucket], bucket_s: float) -> None:
        self.by_device: dict[str, list[SeenBucket]] = {}
        for row in rows:
            if 0 < row.bucket_s <= 2 * bucket_s:
                self.by_device.setdefault(row.device_id, []).append(row)
        self.offsets = {
            device: min(row.t_received - row.bucket_start - round(row.bucket_s * MICROS) for row in found)
            for device, found in self.by_device.items()
        }

    def judged(self, device: str) -> str:
        """Return the source by which a model's latency and alarms are judged on a device.

        That is its lane, where it has one: applications ask as they like, and no alarm comes of it.
        """
        found = {row.source for row in self.by_device.get(device, [])}
        return LANE if LANE in found or not found else min(found)

    def of(self, device: str) -> list[tuple[int, SeenBucket]]:
        """Return (when it began in the server's time, bucket) of a device."""
        offset = self.offsets.get(device, 0)
        return [(row.bucket_start + offset, row) for row in self.by_device.get(device, [])]


def load(
    tx: Session,
    record: RolloutRecord,
    members: Sequence[AssignmentRecord],
    *spans: tuple[int, int | None],
    skew: int,
) -> Rows:
    """Return the summaries of ``spans`` (server time, microseconds); ``skew`` is the worst clock error."""
    found: list[SeenBucket] = []
    for since, until in spans:
        found += store.buckets(
            tx,
            record.model_name,
            [m.device_id for m in members],
            since=since - skew - CLOCK_MARGIN_US,
            received_since=since,
            received_until=until,
        )
    return Rows(found, record.policy.bucket_s)


def before_known(rows: Rows, members: Sequence[AssignmentRecord], policy: Policy) -> bool:
    """Whether enough devices have reported for long enough before the activation."""
    known = 0
    for m in members:
        old = m.previous.version if m.previous is not None else None
        mine = (row for _, row in rows.of(m.device_id) if row.version == old and not row.stands)
        seconds = sum(row.bucket_s for row in mine)
        known += seconds >= policy.min_pre_buckets * policy.bucket_s
    return known >= policy.min_coverage * len(members)


def recent(
    tx: Session, record: RolloutRecord, members: Sequence[AssignmentRecord], rows: Rows, now: int
) -> dict[str, Recent]:
    """Return what the guardrails need, by device; ``rows`` must reach back over ``silent_buckets``."""
    quiet_now = [m.device_id for m in members if m.device_id not in rows.by_device]
    first = record.first_ordered_at
    spoke = store.spoke(tx, record.model_name, quiet_now, first) if quiet_now and first is not None else {}
    watched = [m.device_id for m in members] if record.watch_from is not None else []
    longest = round(record.policy.max_soak_buckets * record.policy.bucket_s * MICROS)
    restarts = store.restarts(tx, watched, max(record.watch_from or 0, now - longest)) if watched else {}
    policy = record.policy
    quiet = round((policy.silent_buckets * policy.bucket_s + policy.delivery_s) * MICROS)
    facts: dict[str, Recent] = {}
    for m in members:
        serving = [row for _, row in rows.of(m.device_id) if _is_after(record, m, row)]
        facts[m.device_id] = Recent(
            begun=bool(serving) or spoke.get((m.device_id, _wanted(record, m) or ""), -1) >= m.activation,
            speaking=any(
                now - row.t_received <= quiet and row.count + row.errors + row.muted > 0 for row in serving
            ),
            windows=sum(row.count + row.errors for row in serving),
            errors=sum(row.errors for row in serving),
            restarts=restarts.get(m.device_id, 0),
        )
    return facts


def comparisons(
    record: RolloutRecord, members: Sequence[AssignmentRecord], rows: Rows, due: Due
) -> list[tuple[str, Evidence]]:
    """Return (kind, evidence) of all that must be looked at: the stage's own comparison, and the watch.

    Only the former can let a stage pass. Between two stages, and after the
    longest soak, only the watch is left.
    """
    found = []
    if record.soak_from is not None and due.period == 0:
        found.append(("gate", wave(record, members, rows, due.bucket)))
    if record.watched_stage > 0 or not found:
        found.append(("watch", watch(record, members, rows, due)))
    return found


def wave(record: RolloutRecord, members: Sequence[AssignmentRecord], rows: Rows, post: int) -> Evidence:
    """Return the comparison of this stage's canaries with the controls."""
    chosen = [m for m in members if m.arm is not Arm.NONE and not _earlier(record, m)]
    assert record.ordered_at is not None
    share = alpha_shares(record.stages)[record.stage][0]
    return _evidence(record, chosen, rows, (0, post), before=record.ordered_at, share=share)


def watch(record: RolloutRecord, members: Sequence[AssignmentRecord], rows: Rows, due: Due) -> Evidence:
    """Return the comparison of all canaries so far with the controls.

    Those of earlier stages go on voting: harm that comes late must show.
    The period before lies before the first activation of the rollout. Between
    two stages the test of the stage before goes on as it was, so it spends no
    more. After the longest soak come late watches, each a comparison of its
    own with a share of the alpha that is reserved for them.
    """
    assert record.first_ordered_at is not None
    assert record.watch_from is not None
    stage, longest = record.watched_stage, record.policy.max_soak_buckets
    start, length = period(due.period, longest)
    if due.period:
        before = (record.watch_from - record.first_ordered_at) / (longest * record.policy.bucket_s * MICROS)
        number = late_number(before, due.period)
        share, seed = late_share(number), f"{record.id}:{stage}:late:{number}"
    elif stage == 0:
        share, seed = alpha_shares(record.stages)[0][0], f"{record.id}:0"
    else:
        share, seed = alpha_shares(record.stages)[stage][1], f"{record.id}:{stage}:watch"
    chosen = [m for m in members if m.arm is not Arm.NONE]
    span = (start, due.bucket)
    found = _evidence(record, chosen, rows, span, before=record.first_ordered_at, share=share)
    last = length if due.period else None
    return msgspec.structs.replace(found, may_advance=False, seed=seed, last=last)


def spans(record: RolloutRecord, due: Due) -> list[tuple[int, int | None]]:
    """Return from when until when (server's time) summaries are needed for a look."""
    assert record.first_ordered_at is not None
    assert record.watch_from is not None
    width = record.policy.bucket_s * MICROS
    since = record.first_ordered_at - round(record.policy.pre_buckets * width)
    if due.period == 0:
        return [(since, None)]
    start = record.watch_from + round((period(due.period, record.policy.max_soak_buckets)[0] - 1) * width)
    return [(since, record.first_ordered_at + round(2 * width)), (start, None)]


def buckets_by(record: RolloutRecord, now: int) -> int:
    """Return how many buckets since ``watch_from`` should have arrived by ``now``."""
    if record.watch_from is None:
        return 0
    seconds = (now - record.watch_from) / MICROS - record.policy.delivery_s
    return max(0, math.floor(seconds / record.policy.bucket_s))


def pack(evidence: Evidence, policy: Policy) -> bytes:
    """Return ``evidence`` as a trace (see ``core.gate.trace``), not compressed."""
    directions = {metric.name: metric.higher_is_worse for metric in policy.metrics}
    lines = trace.write(evidence, bucket_s=policy.bucket_s, directions=directions)
    return "".join(f"{line}\n" for line in lines).encode()


def compress(content: bytes) -> bytes:
    """Return a trace as it is stored."""
    return zstandard.ZstdCompressor(level=6).compress(content)


def decompress(content: bytes) -> bytes:
    """Return a stored trace as it was."""
    return zstandard.ZstdDecompressor().decompress(content, max_output_size=MAX_TRACE)


def _earlier(record: RolloutRecord, m: AssignmentRecord) -> bool:
    return m.arm is Arm.CANARY and m.stage is not None and m.stage < record.stage


def _wanted(record: RolloutRecord, m: AssignmentRecord) -> str | None:
    return record.version if m.arm is Arm.CANARY else m.previous.version if m.previous else None


def _is_after(record: RolloutRecord, m: AssignmentRecord, row: SeenBucket) -> bool:
    return row.version == _wanted(record, m) and row.activation >= m.activation


def _evidence(
    record: RolloutRecord,
    members: Sequence[AssignmentRecord],
    rows: Rows,
    span: tuple[int, int],
    *,
    before: int,
    share: float,
) -> Evidence:
    """``span`` is (bucket at which it begins, how many), counted from ``watch_from``."""
    assert record.watch_from is not None
    start, post = span
    width = record.policy.bucket_s * MICROS
    pre = record.policy.pre_buckets
    cells = _Cells(len(members), pre + post)
    for index, m in enumerate(members):
        old = m.previous.version if m.previous is not None else None
        judged = rows.judged(m.device_id)
        for begun, row in rows.of(m.device_id):
            if _is_after(record, m, row):
                column = pre - start + math.floor((begun - record.watch_from) / width)
                if pre <= column < pre + post:
                    cells.add(index, column, row, judged)
            elif row.version == old and row.activation < m.activation:
                column = pre + math.floor((begun - before) / width)
                if 0 <= column < pre:
                    cells.add(index, column, row, judged)
    empty = cells.leading_empty(pre)
    standing = cells.standing()[:, empty:]
    return Evidence(
        seed=f"{record.id}:{record.watched_stage}",
        devices=tuple(m.device_id for m in members),
        treated=tuple(m.arm is Arm.CANARY for m in members),
        strata=tuple(m.stratum for m in members),
        pre=pre - empty,
        series={metric.name: CALCULATED[metric.name](cells)[:, empty:] for metric in record.policy.metrics},
        alpha_share=share,
        muted=standing if standing.any() else None,
    )


class _Cells:
    """Sums per device and bucket; two rows of one bucket are added up."""

    def __init__(self, devices: int, columns: int) -> None:
        shape = (devices, columns)
        self.asked = np.zeros(shape)
        self.windows = np.zeros(shape)
        self.errors = np.zeros(shape)
        self.alarms = np.zeros(shape)
        self.latency = np.zeros(shape)
        self.timed = np.zeros(shape)
        self.muted = np.zeros(shape)
        self.failed = np.zeros(shape)

    def add(self, device: int, column: int, row: SeenBucket, judged: str) -> None:
        """Errors count whoever asked; latency and alarms only by the source that ``judged`` names."""
        self.asked[device, column] += row.count
        self.errors[device, column] += row.errors
        if row.source != judged:
            return
        self.muted[device, column] += row.muted
        self.failed[device, column] += row.errors
        self.windows[device, column] += row.count
        self.alarms[device, column] += row.alarms
        if row.latency_p95_us is not None and row.count > 0:
            self.latency[device, column] += max(row.latency_p95_us, SHORTEST_US) * row.count
            self.timed[device, column] += row.count

    def leading_empty(self, pre: int) -> int:
        """Return how many of the first ``pre`` columns nobody has anything in."""
        used = np.flatnonzero((self.asked + self.errors)[:, :pre].any(axis=0))
        return int(used[0]) if len(used) else pre

    def standing(self) -> Booleans:
        """Return where a device scored nothing since its machine did not run."""
        stands: Booleans = (self.muted > 0) & (self.windows + self.failed == 0)
        return stands

    def latency_p95(self) -> Floats:
        return _ratio(self.latency, self.timed)

    def alarm_rate(self) -> Floats:
        return _ratio(self.alarms, self.windows)

    def error_rate(self) -> Floats:
        return _ratio(self.errors, self.asked + self.errors)


CALCULATED: Final[Mapping[str, Callable[[_Cells], Floats]]] = {
    LATENCY: _Cells.latency_p95,
    ALARM_RATE: _Cells.alarm_rate,
    ERROR_RATE: _Cells.error_rate,
}
"""How each live metric is calculated; the names are ``core.policy.LIVE_METRICS``."""


def _ratio(above: Floats, below: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)
