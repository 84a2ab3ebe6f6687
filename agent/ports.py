"""What the parts of the agent say to each other, and the protocols by which the supervisor uses them.

Supervisor and engine are two processes on one Unix socket: each message is
a 4-byte big-endian length and one msgpack map. Both directions are
level-triggered or numbered, so either side may restart at any time.
"""

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from contract.messages import (
    Anomaly,
    Count,
    ErrorCode,
    Label,
    Micros,
    ModelSummary,
    Name,
    Sha256,
    Text,
    Version,
)
from inference.accelerators import Custom, Resources

MAX_IPC_MESSAGE: Final = 8 * 1024 * 1024


class FitResult(Struct, frozen=True):
    """A device's own normalisation and threshold, within the ranges that the manifest signs."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    threshold: float
    samples: Count
    t: Micros
    binding: Label = ""
    """The ``binding`` of the lane that was calibrated."""


class LaneSpec(Struct, frozen=True, omit_defaults=True):
    """One lane as it shall be: a source, a version of a model, and where its files lie.

    A change of ``digest``, ``variant``, ``accelerator`` (or its settings),
    ``resources``, ``activation`` or ``fit`` loads a new session beside the old one and then swaps. A lane
    whose manifest asks for a fit and that has none calibrates first; so does
    one whose ``binding`` changes.
    """

    lane: Name
    model_name: Name
    version: Version
    digest: Sha256
    """SHA-256 of the manifest."""
    manifest: str
    """Path of the manifest's object."""
    files: dict[str, str]
    """Path in the package -> path of the object."""
    variant: Name
    accelerator: str
    source: dict[str, str | int | float | bool | list[Any] | dict[str, Any] | None]
    """The lane's ``source`` table of the configuration; ``kind`` chooses the adapter."""
    activation: Count = 0
    fit: FitResult | None = None
    binding: Label = ""
    """What a fit holds for: changes with the source, and when a person asks for another calibration."""
    custom: dict[str, Custom] = {}
    """The device's own settings of ``accelerator``."""
    resources: Resources = Resources()


# --- supervisor -> engine


class Configure(Struct, frozen=True, tag="configure"):
    """Everything that the engine shall run. Lanes that are not named stop."""

    lanes: tuple[LaneSpec, ...]
    bucket_s: Annotated[float, Meta(gt=0)] = 60.0


class Stored(Struct, frozen=True, tag="stored"):
    """All products up to ``n`` are durable; the engine may forget them."""

    n: Count


# --- engine -> supervisor


class Hello(Struct, frozen=True, tag="hello"):
    """First message after each connect."""

    pid: int
    started_mono_us: Micros
    runtimes: dict[str, str]


class LaneState(Struct, frozen=True, omit_defaults=True, tag="lane"):
    """A lane as it is, sent on every change and at least once a second.

    ``digest`` and ``activation`` are those that are *serving*; ``wanted_*``
    those being loaded or that failed to load.
    """

    lane: Name
    model_name: Name
    state: Literal["loading", "calibrating", "running", "failed"]
    digest: Sha256 | None = None
    activation: Count = 0
    wanted_digest: Sha256 | None = None
    wanted_activation: Count = 0
    accelerator: str | None = None
    windows: Count = 0
    """Scored since this session began to serve."""
    errors: Count = 0
    progress: float = 1.0
    """Of a calibration, 0 to 1."""
    code: ErrorCode | None = None
    detail: Text = ""


class Fitted(Struct, frozen=True, tag="fitted"):
    """A calibration has ended; the supervisor keeps it and hands it back in the ``LaneSpec``."""

    lane: Name
    digest: Sha256
    fit: FitResult


class Product(Struct, frozen=True, tag="product"):
    """Something for the outbox; ``n`` counts from 1 in each engine process."""

    n: Annotated[int, Meta(ge=1)]
    t_wall: Micros
    t_mono: Micros
    body: Anomaly | ModelSummary


ToEngine = Configure | Stored
FromEngine = Hello | LaneState | Fitted | Product
