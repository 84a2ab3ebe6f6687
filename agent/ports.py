"""What the parts of the agent say to each other, and the protocols by which the supervisor uses them.

Supervisor and engine are two processes on one Unix socket: each message is
a 4-byte big-endian length and one msgpack map. Both directions are
level-triggered or numbered, so either side may restart at any time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from agent.core.machine import Machine
from agent.core.settings import Serve
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


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Yield an address to bind or connect to the Unix socket at ``path``, however deep that lies.

    An address may have 107 bytes (unix(7)); by way of the directory's
    descriptor it is short. Raises ``OSError`` when there is no such directory.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class FitResult(Struct, frozen=True):
    """A device's own normalisation and threshold, within the ranges that the manifest signs."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    threshold: float
    samples: Count
    t: Micros
    binding: Label = ""
    """The ``binding`` of the lane that was calibrated."""


class ModelSpec(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A version of a model, how to open it, and where its files lie.

    A change of ``digest``, ``variant``, ``accelerator`` (or its settings),
    ``resources`` or ``activation`` loads a new session beside the old one and then swaps.
    """

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
    activation: Count = 0
    custom: dict[str, Custom] = {}
    """The device's own settings of ``accelerator``."""
    resources: Resources = Resources()


class LaneSpec(ModelSpec, frozen=True, omit_defaults=True, kw_only=True):
    """One lane as it shall be: a source, and the version that watches it.

    A change of ``fit`` loads a new session too. A lane whose manifest asks for a fit and
    that has none calibrates first; so does one whose ``binding`` changes.
    """

    lane: Name
    source: dict[str, str | int | float | bool | list[Any] | dict[str, Any] | None]
    """The lane's ``source`` table of the configuration; ``kind`` chooses the adapter."""
    fit: FitResult | None = None
    binding: Label = ""
    """What a fit holds for: changes with the source, and when a person asks for another calibration."""
    sinks: tuple[dict[str, Any], ...] = ()
    """The lane's ``sinks`` tables; a change of them loads and fits nothing anew."""
    bypass: str = ""
    """While this file exists, no control is written."""
    machine: Machine | None = None
    """What mutes the lane; a change of it loads and fits nothing anew."""


class ServeSpec(Struct, frozen=True, omit_defaults=True):
    """What is served to applications as it shall be.

    A change of ``settings`` ends the listener and begins another one; a change of ``models`` does not.
    """

    settings: Serve
    """Its files by absolute paths."""
    models: tuple[ModelSpec, ...] = ()
    """One for each model that has a version in service, with a lane or without."""


# --- supervisor -> engine


class Configure(Struct, frozen=True, tag="configure"):
    """Everything that the engine shall run. Lanes that are not named stop; so does serving."""

    lanes: tuple[LaneSpec, ...]
    bucket_s: Annotated[float, Meta(gt=0)] = 60.0
    serve: ServeSpec | None = None


class Stored(Struct, frozen=True, tag="stored"):
    """All products up to ``n`` are durable; the engine may forget them."""

    n: Count


# --- engine -> supervisor


class Hello(Struct, frozen=True, tag="hello"):
    """First message after each connect."""

    pid: int
    started_mono_us: Micros
    runtimes: dict[str, str]


class SinkState(Struct, frozen=True, omit_defaults=True):
    """A sink of a lane as it is."""

    name: str
    kind: str
    state: Literal["starting", "working", "failed", "bypassed"]
    sent: Count = 0
    """Messages, or writes of a control, that the other side has taken."""
    lost: Count = 0
    """Messages that nobody will get."""
    waiting: Count = 0
    code: ErrorCode | None = None
    detail: Text = ""


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
    machine: Literal["runs", "stopped", "settling", "unknown"] | None = None
    """None where the lane knows of no machine."""
    muted: Text = ""
    """Why nothing is scored; empty while windows are."""
    sinks: tuple[SinkState, ...] = ()
    """As they were when the state was sent; what ails them is no fault of the lane."""


class PipelineState(Struct, frozen=True, omit_defaults=True):
    """A pipeline of served models as it is."""

    name: Name
    detail: Text = ""
    """Why it cannot be asked; empty where it can."""
    requests: Count = 0
    """Answered, since the listener began."""
    errors: Count = 0


class ServeState(Struct, frozen=True, omit_defaults=True, tag="serve"):
    """Serving as it is, sent on every change and at least once a second while there is to be any."""

    state: Literal["starting", "listening", "failed"]
    url: str = ""
    grpc: str = ""
    """host:port; empty where there is no gRPC."""
    mqtt: Literal["off", "connecting", "connected", "failed"] = "off"
    mqtt_detail: Text = ""
    models: tuple[LaneState, ...] = ()
    """Serving counts as a lane of each of its models: its windows are requests that were answered.

    ``errors`` are those that the model is to blame for.
    """
    pipelines: tuple[PipelineState, ...] = ()
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
FromEngine = Hello | LaneState | ServeState | Fitted | Product
