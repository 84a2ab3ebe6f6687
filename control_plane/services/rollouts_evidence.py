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
from control_plane.core.gate.design import alpha_shares
from control_plane.core.gate.evidence import Floats
from control_plane.core.policy import ALARM_RATE, ERROR_RATE, LATENCY, Policy
from control_plane.core.progress import MICROS, Arm
from control_plane.store import rollouts as store
from control_plane.store.rollouts import AssignmentRecord, RolloutRecord, SeenBucket

CLOCK_MARGIN_US: Final = 3600 * MICROS
"""Devices whose clocks are wrong by more than this and more than they were last seen to be are silent."""
SHORTEST_US: Final = 1.0
"""Latencies are compared on the log scale; what is shorter than the clock can tell counts as this."""
MAX_TRACE: Final = 1 << 30
"""Bytes of a stored trace."""


class Recent(msgspec.Struct, frozen=True):
    """What the guardrails need of one device."""

    begun: bool
    """Whether it serves what it was told to (re)activate."""
    speaking: bool
    """Whether it did so within the last ``silent_buckets``."""
    windows: int
    errors: int


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

    def of(self, device: str) -> list[tuple[int, SeenBucket]]:
        """Return (when it began in the server's time, bucket) of a device."""
        offset = self.offsets.get(device, 0)
        return [(row.bucket_start + offset, row) for row in self.by_device.get(device, [])]


def load(
    tx: Session, record: RolloutRecord, members: Sequence[AssignmentRecord], since: int, skew: int
) -> Rows:
    """Return the summaries since ``since`` (server time, microseconds); ``skew`` is the worst clock error."""
    found = store.buckets(
        tx,
        record.model_name,
        [m.device_id for m in members],
        since=since - skew - CLOCK_MARGIN_US,
        received_since=since,
    )
    return Rows(found, record.policy.bucket_s)


def before_known(rows: Rows, members: Sequence[AssignmentRecord], policy: Policy) -> bool:
    """Whether enough devices have reported for long enough before the activation."""
    known = 0
    for m in members:
        old = m.previous.version if m.previous is not None else None
        known += sum(row.version == old for _, row in rows.of(m.device_id)) >= policy.min_pre_buckets
    return known >= policy.min_coverage * len(members)


def recent(
    record: RolloutRecord, members: Sequence[AssignmentRecord], rows: Rows, now: int
) -> dict[str, Recent]:
    """Return what the guardrails need, by device; ``rows`` must reach back over ``silent_buckets``."""
    policy = record.policy
    quiet = round((policy.silent_buckets * policy.bucket_s + policy.delivery_s) * MICROS)
    facts: dict[str, Recent] = {}
    for m in members:
        serving = [row for _, row in rows.of(m.device_id) if _is_after(record, m, row)]
        facts[m.device_id] = Recent(
            begun=bool(serving),
            speaking=any(now - row.t_received <= quiet and row.count + row.errors > 0 for row in serving),
            windows=sum(row.count + row.errors for row in serving),
            errors=sum(row.errors for row in serving),
        )
    return facts


def wave(record: RolloutRecord, members: Sequence[AssignmentRecord], rows: Rows, post: int) -> Evidence:
    """Return the comparison of this stage's canaries with the controls."""
    chosen = [m for m in members if m.arm is not Arm.NONE and not _earlier(record, m)]
    assert record.ordered_at is not None
    return _evidence(record, chosen, rows, post, before=record.ordered_at, share=_shares(record)[0])


def watch(
    record: RolloutRecord, members: Sequence[AssignmentRecord], rows: Rows, post: int
) -> Evidence | None:
    """Return the comparison of all canaries so far with the controls, or None in the first stage.

    Those of earlier stages go on voting: harm that comes late must show.
    The period before lies before the first activation of the rollout.
    """
    if record.stage == 0:
        return None
    chosen = [m for m in members if m.arm is not Arm.NONE]
    assert record.first_ordered_at is not None
    share = _shares(record)[1]
    found = _evidence(record, chosen, rows, post, before=record.first_ordered_at, share=share)
    return msgspec.structs.replace(found, may_advance=False, seed=f"{found.seed}:watch")


def reach(record: RolloutRecord, now: int) -> int:
    """Return from when on (server's time) summaries are needed for the gate."""
    first = record.first_ordered_at if record.first_ordered_at is not None else now
    return first - round(record.policy.pre_buckets * record.policy.bucket_s * MICROS)


def buckets_by(record: RolloutRecord, now: int) -> int:
    """Return how many buckets of this stage's soak should have arrived by ``now``."""
    if record.soak_from is None:
        return 0
    seconds = (now - record.soak_from) / MICROS - record.policy.delivery_s
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


def _shares(record: RolloutRecord) -> tuple[float, float]:
    return alpha_shares(record.stages)[record.stage]


def _earlier(record: RolloutRecord, m: AssignmentRecord) -> bool:
    return m.arm is Arm.CANARY and m.stage is not None and m.stage < record.stage


def _is_after(record: RolloutRecord, m: AssignmentRecord, row: SeenBucket) -> bool:
    wanted = record.version if m.arm is Arm.CANARY else m.previous.version if m.previous else None
    return row.version == wanted and row.activation >= m.activation


def _evidence(
    record: RolloutRecord,
    members: Sequence[AssignmentRecord],
    rows: Rows,
    post: int,
    *,
    before: int,
    share: float,
) -> Evidence:
    assert record.soak_from is not None
    width = record.policy.bucket_s * MICROS
    pre = record.policy.pre_buckets
    cells = _Cells(len(members), pre + post)
    for index, m in enumerate(members):
        old = m.previous.version if m.previous is not None else None
        for start, row in rows.of(m.device_id):
            if _is_after(record, m, row):
                column = pre + math.floor((start - record.soak_from) / width)
                if pre <= column < pre + post:
                    cells.add(index, column, row)
            elif row.version == old and row.activation < m.activation:
                column = pre + math.floor((start - before) / width)
                if 0 <= column < pre:
                    cells.add(index, column, row)
    empty = cells.leading_empty(pre)
    return Evidence(
        seed=f"{record.id}:{record.stage}",
        devices=tuple(m.device_id for m in members),
        treated=tuple(m.arm is Arm.CANARY for m in members),
        strata=tuple(m.stratum for m in members),
        pre=pre - empty,
        series={metric.name: CALCULATED[metric.name](cells)[:, empty:] for metric in record.policy.metrics},
        alpha_share=share,
    )


class _Cells:
    """Sums per device and bucket; two rows of one bucket are added up."""

    def __init__(self, devices: int, columns: int) -> None:
        shape = (devices, columns)
        self.windows = np.zeros(shape)
        self.errors = np.zeros(shape)
        self.alarms = np.zeros(shape)
        self.latency = np.zeros(shape)
        self.timed = np.zeros(shape)

    def add(self, device: int, column: int, row: SeenBucket) -> None:
        self.windows[device, column] += row.count
        self.errors[device, column] += row.errors
        self.alarms[device, column] += row.alarms
        if row.latency_p95_us is not None and row.count > 0:
            self.latency[device, column] += max(row.latency_p95_us, SHORTEST_US) * row.count
            self.timed[device, column] += row.count

    def leading_empty(self, pre: int) -> int:
        """Return how many of the first ``pre`` columns nobody has anything in."""
        used = np.flatnonzero((self.windows + self.errors)[:, :pre].any(axis=0))
        return int(used[0]) if len(used) else pre

    def latency_p95(self) -> Floats:
        return _ratio(self.latency, self.timed)

    def alarm_rate(self) -> Floats:
        return _ratio(self.alarms, self.windows)

    def error_rate(self) -> Floats:
        return _ratio(self.errors, self.windows + self.errors)


CALCULATED: Final[Mapping[str, Callable[[_Cells], Floats]]] = {
    LATENCY: _Cells.latency_p95,
    ALARM_RATE: _Cells.alarm_rate,
    ERROR_RATE: _Cells.error_rate,
}
"""How each live metric is calculated; the names are ``core.policy.LIVE_METRICS``."""


def _ratio(above: Floats, below: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)
