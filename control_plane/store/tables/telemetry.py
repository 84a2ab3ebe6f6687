"""What devices sent. Written in batches by ``store.telemetry``, never through the ORM.

(device, epoch, priority, seq) names a record for ever, so that a repeated
message cannot count twice.
"""

from sqlalchemy import LargeBinary
from sqlmodel import Field, Index, SQLModel, UniqueConstraint

from control_plane.store.tables.columns import JSON_TEXT, MICROS, ROW_ID


class _Record(SQLModel):
    """Where and when a record comes from."""

    id: int | None = Field(default=None, primary_key=True, sa_type=ROW_ID)
    device_id: str
    epoch: str
    priority: str
    seq: int = Field(sa_type=MICROS)
    t_wall: int = Field(sa_type=MICROS)
    t_received: int = Field(sa_type=MICROS)


class Receipt(_Record, table=True):
    """One step of a device towards one version."""

    __tablename__ = "receipt"
    __table_args__ = (
        UniqueConstraint("device_id", "epoch", "priority", "seq"),
        Index("receipt_by_device", "device_id", "id"),
        {"sqlite_autoincrement": True},
    )

    model_name: str
    version: str
    state: str
    activation: int = Field(sa_type=MICROS)
    attempt: int = Field(sa_type=MICROS)
    rollout: str | None = None
    code: str | None = None
    detail: str = ""
    aftermath: str | None = None
    facts: str = Field(sa_type=JSON_TEXT)


class Anomaly(_Record, table=True):
    """One alarm of one model."""

    __tablename__ = "anomaly"
    __table_args__ = (
        UniqueConstraint("device_id", "epoch", "priority", "seq"),
        Index("anomaly_by_time", "t_received"),
        Index("anomaly_by_device", "device_id", "t_received"),
        {"sqlite_autoincrement": True},
    )

    model_name: str
    version: str
    t: int = Field(sa_type=MICROS)
    score: float
    threshold: float
    variant: str | None = None
    source: str = ""
    source_ref: str | None = None
    contributions: str = Field(sa_type=JSON_TEXT)


class HealthSample(_Record, table=True):
    """How a device was at one moment."""

    __tablename__ = "health"
    __table_args__ = (
        UniqueConstraint("device_id", "epoch", "priority", "seq"),
        Index("health_by_time", "t_received"),
        Index("health_by_device", "device_id", "t_received"),
        {"sqlite_autoincrement": True},
    )

    uptime_s: float
    cpu_percent: float
    memory_percent: float
    agent_pss_bytes: int = Field(sa_type=MICROS)
    disk_free_bytes: int = Field(sa_type=MICROS)
    temperature_c: float | None = None
    engine_restarts: int = Field(sa_type=MICROS)
    outbox: str = Field(sa_type=JSON_TEXT)
    body: str = Field(sa_type=JSON_TEXT)
    """The whole message."""


class Summary(_Record, table=True):
    """What one model did on one device during one bucket of time."""

    __tablename__ = "summary"
    __table_args__ = (
        UniqueConstraint("device_id", "epoch", "priority", "seq"),
        Index("summary_by_model", "model_name", "bucket_start"),
        Index("summary_by_device", "device_id", "bucket_start"),
        {"sqlite_autoincrement": True},
    )

    model_name: str
    version: str
    activation: int = Field(sa_type=MICROS)
    bucket_start: int = Field(sa_type=MICROS)
    bucket_s: float
    count: int = Field(sa_type=MICROS)
    errors: int = Field(sa_type=MICROS)
    alarms: int = Field(sa_type=MICROS)
    missing: int = Field(sa_type=MICROS)
    suppressed: int = Field(sa_type=MICROS)
    muted: int = Field(default=0, sa_type=MICROS, sa_column_kwargs={"server_default": "0"})
    queue: int = Field(sa_type=MICROS)
    variant: str | None = None
    accelerator: str | None = None
    source: str = Field(default="lane", sa_column_kwargs={"server_default": "lane"})
    """``lane`` or ``serve``."""
    latency_p50_us: float | None = None
    latency_p95_us: float | None = None
    latency_p99_us: float | None = None
    score_p50: float | None = None
    score_p95: float | None = None
    latency: str | None = Field(default=None, sa_type=JSON_TEXT)
    score: str | None = Field(default=None, sa_type=JSON_TEXT)


class Watermark(SQLModel, table=True):
    """What is committed of one (device, epoch, class)."""

    __tablename__ = "watermark"

    device_id: str = Field(primary_key=True)
    epoch: str = Field(primary_key=True)
    priority: str = Field(primary_key=True)
    prefix: int = Field(sa_type=MICROS)
    ranges: str = Field(sa_type=JSON_TEXT)
    t: int = Field(sa_type=MICROS)


class DeadLetter(SQLModel, table=True):
    """A message, or one record of a batch, that was refused for good."""

    __tablename__ = "dead_letter"
    __table_args__ = (UniqueConstraint("device_id", "sha256"), {"sqlite_autoincrement": True})

    id: int | None = Field(default=None, primary_key=True, sa_type=ROW_ID)
    device_id: str
    topic: str
    sha256: str
    """Of the whole payload, so that one that comes again and again is one row."""
    code: str
    detail: str
    length: int = Field(sa_type=MICROS)
    payload: bytes = Field(sa_type=LargeBinary)
    """Its beginning."""
    first_received: int = Field(sa_type=MICROS)
    last_received: int = Field(sa_type=MICROS, index=True)
    count: int = Field(sa_type=MICROS)
