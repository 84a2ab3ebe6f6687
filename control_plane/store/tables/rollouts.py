"""Rollouts, their devices, and every decision with all that it was based on."""

from sqlalchemy import LargeBinary
from sqlmodel import Field, Index, SQLModel

from control_plane.store.tables.columns import JSON_TEXT, MICROS, ROW_ID


class RolloutRow(SQLModel, table=True):
    """One rollout of one version."""

    __tablename__ = "rollout"

    id: str = Field(primary_key=True)
    model_name: str = Field(index=True)
    version: str
    assignment: str = Field(sa_type=JSON_TEXT)
    """The version as a ``ModelAssignment``, fixed when the rollout was made."""
    selection: str = Field(sa_type=JSON_TEXT)
    policy: str = Field(sa_type=JSON_TEXT)
    state: str = Field(index=True)
    stage: int = 0
    stages: int
    pause: str = "not"
    waived: bool = False
    reason: str = ""
    created_at: int = Field(sa_type=MICROS)
    created_by: str
    changed_at: int = Field(sa_type=MICROS)
    start_at: int | None = Field(default=None, sa_type=MICROS)
    offered_at: int | None = Field(default=None, sa_type=MICROS)
    first_ordered_at: int | None = Field(default=None, sa_type=MICROS)
    ordered_at: int | None = Field(default=None, sa_type=MICROS)
    soak_from: int | None = Field(default=None, sa_type=MICROS)
    """Since when both arms are compared; it outlives its stage until the next one is activated."""
    looked_at: int = 0
    """Bucket of the last look since then."""
    receipts_to: int = Field(default=0, sa_type=MICROS)
    """Receipts up to this id have been read."""


class AssignmentRow(SQLModel, table=True):
    """One device in one rollout."""

    __tablename__ = "assignment"
    __table_args__ = (Index("assignment_by_device", "device_id"),)

    rollout_id: str = Field(primary_key=True, foreign_key="rollout.id")
    device_id: str = Field(primary_key=True)
    stratum: str
    state: str
    arm: str = "none"
    stage: int | None = None
    """In which stage it became a canary."""
    activation: int = Field(default=0, sa_type=MICROS)
    """Number of the last activation that was ordered, of whichever version."""
    attempt: int = 0
    previous: str | None = Field(default=None, sa_type=JSON_TEXT)
    """The ``ModelAssignment`` to go back to."""
    code: str | None = None
    detail: str = ""
    aftermath: str | None = None
    returning: bool = Field(default=False, sa_column_kwargs={"name": "returning", "quote": True})
    """Whether it was told to go back and has not said that it did."""
    changed_at: int = Field(sa_type=MICROS)


class VerdictRow(SQLModel, table=True):
    """One decision."""

    __tablename__ = "verdict"
    __table_args__ = (
        Index("verdict_by_rollout", "rollout_id", "id"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True, sa_type=ROW_ID)
    rollout_id: str = Field(foreign_key="rollout.id")
    t: int = Field(sa_type=MICROS)
    stage: int
    kind: str
    """``gate``, ``watch`` (over earlier stages and after the longest soak), ``guardrail``, ``count``,
    ``coverage``, ``soak`` or ``person``."""
    verdict: str
    bucket: int | None = None
    reason: str
    numbers: str = Field(sa_type=JSON_TEXT)
    evidence_sha256: str | None = None


class GateEvidenceRow(SQLModel, table=True):
    """What a verdict was based on: a trace, compressed."""

    __tablename__ = "gate_evidence"

    sha256: str = Field(primary_key=True)
    """Of the trace before compression."""
    rollout_id: str = Field(foreign_key="rollout.id", index=True)
    content: bytes = Field(sa_type=LargeBinary)
