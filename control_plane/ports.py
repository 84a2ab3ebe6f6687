"""What the services need from the world outside of the database, as protocols."""

from collections.abc import Callable
from typing import Protocol

from contract.messages import Ack, DesiredHint

Clock = Callable[[], int]
"""Returns the time: microseconds since 1970-01-01 UTC."""


class Publisher(Protocol):
    """Sends messages to devices. Neither call waits for the device."""

    def hint(self, hint: DesiredHint) -> bool:
        """Publish a retained hint; False when the broker cannot be reached now."""

    def ack(self, ack: Ack) -> bool:
        """Publish an acknowledgement; False when the broker cannot be reached now."""
