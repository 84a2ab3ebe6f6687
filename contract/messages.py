"""What devices and the control plane say to each other.

All times are integer microseconds since 1970-01-01 UTC, all durations say
their unit in the name. An unknown field is ignored, so that an older side
can read a newer one; a wrong one is refused with its path (``contract.codec``).
"""

import enum
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

PROTOCOL_VERSION: Final = 1

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*$")]
"""Name of a model, a variant, a binding or a channel's machine name."""
Version = Annotated[str, Meta(min_length=5, max_length=64, pattern=r"^\d+\.\d+\.\d+([-+][0-9A-Za-z.+-]+)?$")]
"""SemVer, for people; machines compare ``release_counter``."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
DeviceId = Annotated[str, Meta(min_length=8, max_length=40, pattern=r"^[a-z0-9][a-z0-9-]+[a-z0-9]$")]
Micros = Annotated[int, Meta(ge=0, le=2**62)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
ErrorCode = Annotated[str, Meta(max_length=64, pattern=r"^[a-z_]+\.[a-z_]+$")]
Text = Annotated[str, Meta(max_length=2000)]


class PriorityClass(enum.Enum):
    """Classes of records, from the most to the least worth keeping."""

    RECEIPT = "receipt"
    ANOMALY = "anomaly"
    HEALTH = "health"
    SUMMARY = "summary"
    RAW = "raw"


class AssignmentState(enum.Enum):
    """How far a device is with one version. The device reports all but the first two and the last two."""

    PLANNED = "planned"
    OFFERED = "offered"
    ACKNOWLEDGED = "acknowledged"
    FETCHING = "fetching"
    VERIFIED = "verified"
    PROBED = "probed"
    READY = "ready"
    SHADOWING = "shadowing"
    ACTIVATING = "activating"
    SOAKING = "soaking"
    CONFIRMED = "confirmed"
    ROLLED_BACK = "rolled_back"
    REFUSED = "refused"
    UNREACHED = "unreached"
    SUPERSEDED = "superseded"


class Aftermath(enum.Enum):
    """Whether a device still runs its last known good after a failure."""

    NO_CHANGE = "no_change"
    ROLLED_BACK = "rolled_back"
    UNABLE_TO_ROLL_BACK = "unable_to_roll_back"


class Sketch(Struct, frozen=True, omit_defaults=True):
    """A mergeable quantile sketch; see ``contract.sketch`` for its meaning and its error."""

    accuracy: float
    bins: dict[int, Count] = {}
    negative: dict[int, Count] = {}
    zeros: Count = 0
    count: Count = 0
    total: float = 0.0
    minimum: float | None = None
    maximum: float | None = None


# --------------------------------------------------------------- device -> control plane


class Receipt(Struct, frozen=True, omit_defaults=True, tag="receipt"):
    """One step of a device towards one version of one model."""

    model_name: Name
    version: Version
    state: AssignmentState
    activation: Count = 0
    attempt: Count = 0
    rollout: str | None = None
    code: ErrorCode | None = None
    detail: Text = ""
    aftermath: Aftermath | None = None
    facts: dict[str, str | int | float | bool | None] = {}


class VersionInSlot(Struct, frozen=True, omit_defaults=True):
    """A slot's content as reported."""

    version: Version
    digest: Sha256
    variant: Name | None = None
    accelerator: str | None = None


class RejectedVersion(Struct, frozen=True, omit_defaults=True):
    """A version that the device will not try again by itself."""

    version: Version
    digest: Sha256
    attempt: Count
    code: ErrorCode
    detail: Text = ""


class ReportedModel(Struct, frozen=True, omit_defaults=True):
    """Where one model stands on a device."""

    model_name: Name
    active: VersionInSlot | None = None
    standby: VersionInSlot | None = None
    last_good: VersionInSlot | None = None
    activation: Count = 0
    trial: bool = False
    lane: Literal["none", "loading", "calibrating", "running", "failed"] = "none"
    rejected: tuple[RejectedVersion, ...] = ()
    code: ErrorCode | None = None
    detail: Text = ""


class Reported(Struct, frozen=True, omit_defaults=True, tag="reported"):
    """The device's side of its twin: sent whole whenever it changes."""

    revision: Count
    """Revision of the desired document that this answers."""
    models: tuple[ReportedModel, ...] = ()
    agent_version: str = ""
    hardware: str = ""
    arch: str = ""
    accelerators: tuple[str, ...] = ()
    runtimes: dict[str, str] = {}
    update_code: ErrorCode | None = None
    """Why the newest desired document could not be taken, if so."""
    update_detail: Text = ""


class Anomaly(Struct, frozen=True, omit_defaults=True, tag="anomaly"):
    """One alarm of one model."""

    model_name: Name
    version: Version
    t: Micros
    """When the window ended, by the source's clock."""
    score: float
    threshold: float
    variant: Name | None = None
    source: str = ""
    """Which source it came from."""
    source_ref: str | None = None
    """Where in the source, for example a row of a replayed file."""
    contributions: dict[str, float] = {}
    """Share of the score by channel; the shares add up to 1."""


class OutboxHealth(Struct, frozen=True, omit_defaults=True):
    """State of the device's outbox."""

    records: Count
    bytes: Count
    lost: dict[str, Count] = {}
    """Records given up so far, by priority class."""


class Health(Struct, frozen=True, omit_defaults=True, tag="health"):
    """How the device itself is."""

    uptime_s: float
    cpu_percent: float
    memory_percent: float
    agent_pss_bytes: Count
    disk_free_bytes: Count
    outbox: OutboxHealth
    temperature_c: float | None = None
    engine_restarts: Count = 0
    connected_s: float | None = None
    clock_offset_s: float | None = None
    load_1: float | None = None


class ModelSummary(Struct, frozen=True, omit_defaults=True, tag="summary"):
    """What one model did during one bucket of time."""

    model_name: Name
    version: Version
    bucket_start: Micros
    bucket_s: float
    count: Count
    """Windows scored."""
    errors: Count = 0
    alarms: Count = 0
    missing: Count = 0
    """Samples that did not come, came late or were out of range."""
    suppressed: Count = 0
    """Alarms for which no ``Anomaly`` was sent, since there were too many at once."""
    activation: Count = 0
    variant: Name | None = None
    accelerator: str | None = None
    latency_us: Sketch | None = None
    score: Sketch | None = None
    queue: Count = 0


Body = Receipt | Reported | Anomaly | Health | ModelSummary


class Envelope(Struct, frozen=True, omit_defaults=True, rename={"priority": "class"}):
    """One record of the outbox.

    ``seq`` counts from 1 within (``epoch``, ``priority``); ``epoch`` is new
    when the outbox was lost. (device, epoch, class, seq) is unique for ever.
    """

    v: int
    device: DeviceId
    priority: PriorityClass
    epoch: Annotated[str, Meta(min_length=1, max_length=64)]
    seq: Annotated[int, Meta(ge=1, le=2**62)]
    boot_id: str
    t_wall: Micros
    t_mono: Micros
    body: Body
    oldest: Count = 0
    """The smallest ``seq`` of this epoch and class that the device still holds: what is below was
    acknowledged or given up, so nobody need wait for it. 0 when the device does not say."""


class Status(Struct, frozen=True, omit_defaults=True):
    """Retained presence; the will says ``online`` = false."""

    v: int
    device: DeviceId
    online: bool
    boot_id: str
    t_wall: Micros


# --------------------------------------------------------------- control plane -> device


class AckRange(Struct, frozen=True, omit_defaults=True, rename={"priority": "class"}):
    """What is committed of one (epoch, class): all up to ``prefix``, and the closed ``ranges``."""

    epoch: str
    priority: PriorityClass
    prefix: Count
    ranges: tuple[tuple[int, int], ...] = ()


class Ack(Struct, frozen=True, omit_defaults=True):
    """The device may delete these records: they are stored, or refused for good."""

    v: int
    device: DeviceId
    acks: tuple[AckRange, ...]


class DesiredHint(Struct, frozen=True, omit_defaults=True):
    """A hint that the bundle changed. Never an order: the signed metadata decides."""

    v: int
    device: DeviceId
    version: Count
    sha256: Sha256


class Role(enum.Enum):
    """What a device does with a version."""

    ACTIVE = "active"
    STAGED = "staged"
    SHADOW = "shadow"


class ModelAssignment(Struct, frozen=True, omit_defaults=True):
    """One version that a device shall have, and what for."""

    model_name: Name
    version: Version
    role: Role
    manifest_path: str
    """Target path of the manifest, the same in both repositories."""
    manifest_sha256: Sha256
    manifest_length: Count
    release_counter: Count
    activation: Count = 0
    """A higher number activates again, even the same version (sham restart)."""
    attempt: Count = 0
    """A higher number allows a rejected version once more."""
    rollout: str | None = None


class Reporting(Struct, frozen=True, omit_defaults=True):
    """How often a device reports."""

    bucket_s: Annotated[float, Meta(ge=0.2, le=3600)] = 60.0
    health_s: Annotated[float, Meta(ge=0.5, le=3600)] = 60.0
    trial_s: Annotated[float, Meta(ge=0.5, le=86400)] = 30.0
    """How long a trial must be healthy before it is confirmed."""


class Desired(Struct, frozen=True, omit_defaults=True):
    """What a device shall be: the director's signed assignment (``custom`` of ``devices/<id>``)."""

    v: int
    device: DeviceId
    revision: Count
    models: tuple[ModelAssignment, ...] = ()
    reporting: Reporting = msgspec.field(default_factory=Reporting)
    agent_version: str | None = None
