"""What every sensor source gives to its lane."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.engine.clock import Clock
from contract.errors import PitheadError
from contract.manifest import Pipeline

Table = dict[str, str | int | float | bool | list[Any] | dict[str, Any] | None]
"""The lane's ``source`` table of the configuration."""
Settings = TypeVar("Settings", bound=msgspec.Struct)
TICK_S = 0.1
"""How long a lane gathers rows before it takes them all at once."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows in the order of the source."""

    values: NDArray[np.float64]
    """(rows, channels); NaN where a channel is missing."""
    t: NDArray[np.int64]
    """When each row was taken, microseconds UTC."""
    refs: NDArray[np.int64] | None = None
    """Where in the source each row stands, if it can say."""
    lost: int = 0
    """Samples that should have come before or among these and did not."""
    continues: bool = True
    """False when this batch does not follow on the one before without a gap."""
    marks: NDArray[np.float64] | None = None
    """(rows, marks): what was read beside the channels; see ``sources.marks``."""


class Source(Protocol):
    """A stream of samples with the channels of one pipeline. Used by one thread.

    ``poll`` never blocks for long; it raises ``source.failed`` when the
    sensor is gone, and is then closed and opened again after a while.
    """

    def poll(self, limit: int) -> Batch | None:
        """Return at most ``limit`` rows that are there by now, or None."""

    def wait_s(self) -> float:
        """Return how long it pays to wait before the next ``poll``, in seconds."""

    def backlog(self) -> int:
        """Return how many rows wait to be taken."""

    def close(self) -> None:
        """Give back what is held; more than once is harmless."""


Opener = Callable[[Table, Pipeline, Clock], Source]


def settings(table: Table, kind: type[Settings]) -> Settings:
    """Return ``table`` as ``kind``; ``config.invalid`` names the key that is wrong or unknown."""
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise PitheadError("config.invalid", f"lanes.source: {error}") from error


def sample_rate(rate_hz: float | None, pipeline: Pipeline, default: float | None = None) -> float:
    """Return the rate of a source in Hz: as configured, else the manifest's, else ``default``."""
    rate = rate_hz or pipeline.sample_rate_hz or default
    if rate is None:
        raise PitheadError(
            "config.invalid",
            "lanes.source.rate_hz is missing, and the model's manifest has no sample rate",
            key="rate_hz",
        )
    return rate
