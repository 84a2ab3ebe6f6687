"""What the supervisor's helpers put into its queue. The loop alone acts on it."""

from collections.abc import Callable

from msgspec import Struct

from agent.core.plan import Fetch, Probe
from agent.link.mqtt import LinkEvent
from agent.ports import FromEngine
from contract.errors import PitheadError
from contract.messages import Desired
from inference.probing import Choice


class EngineStarted(Struct, frozen=True):
    """A new engine process was started, since none answered."""

    pid: int
    ended: str = ""
    """How the one before it ended, as far as that is known: ``died of SIGSEGV``."""


class EngineSaid(Struct, frozen=True):
    """A message of the engine."""

    connection: int
    message: FromEngine


class EngineLost(Struct, frozen=True):
    """The connection to the engine ended; it may still be alive."""

    connection: int
    detail: str


class BundlePolled(Struct, frozen=True):
    """The update server answered. ``body`` is None when nothing changed."""

    etag: str | None
    body: bytes | None
    date: str | None = None


class PollFailed(Struct, frozen=True):
    """The update server did not answer well."""

    error: PitheadError


class Refreshed(Struct, frozen=True):
    """The update process has judged a bundle."""

    etag: str | None
    result: Desired | PitheadError


class Fetched(Struct, frozen=True):
    """A fetch ended."""

    step: Fetch
    error: PitheadError | None = None


class Probed(Struct, frozen=True):
    """A probe ended."""

    step: Probe
    result: Choice | PitheadError


Event = (
    EngineStarted
    | EngineSaid
    | EngineLost
    | BundlePolled
    | PollFailed
    | Refreshed
    | Fetched
    | Probed
    | LinkEvent
)
Post = Callable[[Event], None]
"""Puts an event into the queue; may be called in any thread."""
