"""What a request is handed to once its name has been looked up, whatever stands behind that name.

One session, several versions of a model, and a pipeline of models look alike
from outside, so that the look-up stays the only thing in a request's way.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

from agent.engine.serve.requests import InferRequest, InferResponse
from contract.errors import PitheadError

Done: TypeAlias = Callable[[InferResponse | PitheadError], None]


class Held(Protocol):
    """What would answer a request now, kept in memory until it is released, whatever takes its place."""

    def submit(self, request: InferRequest, done: Done) -> None:
        """See ``Routed``."""
        ...

    def release(self) -> None:
        """It is not needed any more; call it once."""
        ...


class Routed(Protocol):
    """What a name leads to. On the loop's thread only."""

    def submit(self, request: InferRequest, done: Done) -> None:
        """Answer ``request`` through ``done``, once, perhaps before this returns.

        Raises ``PitheadError`` instead where that is known at once.
        """
        ...

    def hold(self, request: InferRequest) -> Held:
        """Return what would answer ``request`` now."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests that are not answered."""
        ...

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the classes, by output."""
        ...

    @property
    def batches(self) -> bool:
        """Whether the first dimension counts examples that do not depend on each other."""
        ...
