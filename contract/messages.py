"""What devices and the control plane say to each other.

All times are integer microseconds since 1970-01-01 UTC, all durations say
their unit in the name. An unknown field is ignored, so that an older side
can read a newer one; a wrong one is refused with its path (``contract.codec``).

Every number, text and list is bounded: what decodes can be calculated with
and stored, so that no device can stop the ingest of all the others.
"""

import enum
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

PROTOCOL_VERSION: Final = 1

END: Final = r"$(?!\n)"
"""End of a pattern: Python's ``$`` alone would let a newline follow, and JSON Schema has no other."""
NO_NUL: Final = r"^(?![\s\S]*\x00)"
"""Pattern of a text that every database can hold."""

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*" + END)]
"""Name of a model, a variant, a binding or a channel's machine name."""
Version = Annotated[
    str,
    Meta(min_length=5, max_length=64, pattern=r"^[0-9]+\.[0-9]+\.[0-9]+([-+][0-9A-Za-z.+-]+)?" + END),
]
"""SemVer, for people; machines compare ``release_counter``."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}" + END)]
DeviceId = Annotated[str, Meta(min_length=8, max_length=40, pattern=r"^[a-z0-9][a-z0-9-]+[a-z0-9]" + END)]
Micros = Annotated[int, Meta(ge=0, le=2**62)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Real = Annotated[float, Meta(ge=-1e300, le=1e300)]
"""A finite number, far enough from the largest that sums of it are finite too."""
ErrorCode = Annotated[str, Meta(max_length=64, pattern=r"^[a-z_]+\.[a-z_]+" + END)]
Text = Annotated[str, Meta(max_length=2000, pattern=NO_NUL)]
Label = Annotated[str, Meta(max_length=200, pattern=NO_NUL)]
"""A short text that somebody else chose: an id, a kind of hardware, a version of a program."""

MAX_BINS: Final = 4096
"""Bins of one half of a sketch."""
BinIndex = Annotated[int, Meta(ge=-(2**22), le=2**22)]
"""At the finest accuracy the bin of the largest number is about 3.6 million."""
Bins = Annotated[dict[BinIndex, Count], Meta(max_length=MAX_BINS)]
MAX_LISTED: Final = 1000
"""Entries of a list that a device or an operator can make longer."""
Fact = Text | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | Real | bool | None


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

    accuracy: Annotated[float, Meta(ge=0.0001, le=0.5)]
    bins: Bins = {}
    negative: Bins = {}
    zeros: Count = 0
    count: Count = 0
    total: Real = 0.0
    minimum: Real | None = None
    maximum: Real | None = None


# --------------------------------------------------------------- device -> control plane


class Receipt(Struct, frozen=True, omit_defaults=True, tag="receipt"):
    """One step of a device towards one version of one model."""

    model_name: Name
    version: Version
    state: AssignmentState
    activation: Count = 0
    attempt: Count = 0
    rollout: Label | None = None
    code: ErrorCode | None = None
    detail: Text = ""
    aftermath: Aftermath | None = None
    facts: Annotated[dict[Label, Fact], Meta(max_length=100)] = {}


class VersionInSlot(Struct, frozen=True, omit_defaults=True):
    """A slot's content as reported."""

    version: Version
    digest: Sha256
    variant: Name | None = None
    accelerator: Label | None = None


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
    rejected: Annotated[tuple[RejectedVersion, ...], Meta(max_length=MAX_LISTED)] = ()
    code: ErrorCode | None = None
    detail: Text = ""


class Reported(Struct, frozen=True, omit_defaults=True, tag="reported"):
    """The device's side of its twin: sent whole whenever it changes."""

    revision: Count
    """Revision of the desired document that this answers."""
    models: Annotated[tuple[ReportedModel, ...], Meta(max_length=MAX_LISTED)] = ()
    agent_version: Label = ""
    hardware: Label = ""
    arch: Label = ""
    accelerators: Annotated[tuple[Label, ...], Meta(max_length=100)] = ()
    runtimes: Annotated[dict[Label, Label], Meta(max_length=100)] = {}
    update_code: ErrorCode | None = None
    """Why the newest desired document could not be taken, if so."""
    update_detail: Text = ""


class Anomaly(Struct, frozen=True, omit_defaults=True, tag="anomaly"):
    """One alarm of one model."""

    model_name: Name
    version: Version
    t: Micros
    """When the window ended, by the source's clock."""
    score: Real
    threshold: Real
    variant: Name | None = None
    source: Label = ""
    """Which source it came from."""
    source_ref: Label | None = None
    """Where in the source, for example a row of a replayed file."""
    contributions: Annotated[dict[Label, Real], Meta(max_length=4096)] = {}
    """Share of the score by channel; the shares add up to 1."""


class OutboxHealth(Struct, frozen=True, omit_defaults=True):
    """State of the device's outbox."""

    records: Count
    bytes: Count
    lost: Annotated[dict[Label, Count], Meta(max_length=100)] = {}
    """Records given up so far, by priority class."""


class Bypass(Struct, frozen=True, omit_defaults=True):
    """Somebody at the device has stopped all of its writes to controls of the plant."""

    since: Micros
    who: Label = ""
    why: Text = ""


class Ailing(Struct, frozen=True, omit_defaults=True):
    """What does not do what it should: a lane, its source, its machine's state, a sink, a served pipeline."""

    lane: Name
    """Of a pipeline its own name."""
    what: Literal["lane", "source", "machine", "sink", "pipeline"]
    state: Label
    """``failed`` and so on, as the device's own status has it; ``working`` where only ``lost`` speaks."""
    sink: Label = ""
    """The sink's name."""
    kind: Label = ""
    """Of the sink, for example ``mqtt``."""
    code: ErrorCode | None = None
    detail: Text = ""
    waiting: Count = 0
    """Messages that are kept until the sink takes them."""
    lost: Count = 0
    """Messages that nobody will get, since the sink began."""


class Health(Struct, frozen=True, omit_defaults=True, tag="health"):
    """How the device itself is."""

    uptime_s: Real
    cpu_percent: Real
    memory_percent: Real
    agent_pss_bytes: Count
    disk_free_bytes: Count
    outbox: OutboxHealth
    temperature_c: Real | None = None
    engine_restarts: Count = 0
    connected_s: Real | None = None
    clock_offset_s: Real | None = None
    load_1: Real | None = None
    bypass: Bypass | None = None
    """Set while controls are not written, by hand at the device."""
    ailing: Annotated[tuple[Ailing, ...], Meta(max_length=MAX_LISTED)] = ()
    """What does not work; empty where all does, or where the device does not say."""


class ModelSummary(Struct, frozen=True, omit_defaults=True, tag="summary"):
    """What one model did during one bucket of time."""

    model_name: Name
    version: Version
    bucket_start: Micros
    bucket_s: Annotated[float, Meta(gt=0, le=86400)]
    count: Count
    """Windows scored, or requests answered."""
    errors: Count = 0
    alarms: Count = 0
    missing: Count = 0
    """Samples that did not come, came late or were out of range."""
    suppressed: Count = 0
    """Alarms for which no ``Anomaly`` was sent, since there were too many at once."""
    muted: Count = 0
    """Windows that were not scored, since the machine did not run."""
    activation: Count = 0
    variant: Name | None = None
    accelerator: Label | None = None
    latency_us: Sketch | None = None
    score: Sketch | None = None
    queue: Count = 0
    source: Label = "lane"
    """``lane``, or ``serve`` for what applications asked of the model on the device."""


Body = Receipt | Reported | Anomaly | Health | ModelSummary


class Envelope(Struct, frozen=True, omit_defaults=True, rename={"priority": "class"}):
    """One record of the outbox.

    ``seq`` counts from 1 within (``epoch``, ``priority``); ``epoch`` is new
    when the outbox was lost. (device, epoch, class, seq) is unique for ever.
    """

    v: Count
    device: DeviceId
    priority: PriorityClass
    epoch: Annotated[str, Meta(min_length=1, max_length=64, pattern=NO_NUL)]
    seq: Annotated[int, Meta(ge=1, le=2**62)]
    boot_id: Label
    t_wall: Micros
    t_mono: Micros
    body: Body
    oldest: Count = 0
    """The smallest ``seq`` of this epoch and class that the device still holds: what is below was
    acknowledged or given up, so nobody need wait for it. 0 when the device does not say."""


class Status(Struct, frozen=True, omit_defaults=True):
    """Retained presence; the will says ``online`` = false."""

    v: Count
    device: DeviceId
    online: bool
    boot_id: Label
    t_wall: Micros


# --------------------------------------------------------------- control plane -> device


class AckRange(Struct, frozen=True, omit_defaults=True, rename={"priority": "class"}):
    """What is committed of one (epoch, class): all up to ``prefix``, and the closed ``ranges``."""

    epoch: Label
    priority: PriorityClass
    prefix: Count
    ranges: tuple[tuple[Count, Count], ...] = ()


class Ack(Struct, frozen=True, omit_defaults=True):
    """The device may delete these records: they are stored, or refused for good."""

    v: Count
    device: DeviceId
    acks: tuple[AckRange, ...]


class DesiredHint(Struct, frozen=True, omit_defaults=True):
    """A hint that the bundle changed. Never an order: the signed metadata decides."""

    v: Count
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
    manifest_path: Text
    """Target path of the manifest, the same in both repositories."""
    manifest_sha256: Sha256
    manifest_length: Count
    release_counter: Count
    activation: Count = 0
    """A higher number activates again, even the same version (sham restart)."""
    attempt: Count = 0
    """A higher number allows a rejected version once more."""
    rollout: Label | None = None


class Reporting(Struct, frozen=True, omit_defaults=True):
    """How often a device reports."""

    bucket_s: Annotated[float, Meta(ge=0.2, le=3600)] = 60.0
    health_s: Annotated[float, Meta(ge=0.5, le=3600)] = 60.0
    trial_s: Annotated[float, Meta(ge=0.5, le=86400)] = 30.0
    """How long a trial must be healthy before it is confirmed."""


class Desired(Struct, frozen=True, omit_defaults=True):
    """What a device shall be: the director's signed assignment (``custom`` of ``devices/<id>``)."""

    v: Count
    device: DeviceId
    revision: Count
    models: Annotated[tuple[ModelAssignment, ...], Meta(max_length=MAX_LISTED)] = ()
    reporting: Reporting = msgspec.field(default_factory=Reporting)
    agent_version: Label | None = None
