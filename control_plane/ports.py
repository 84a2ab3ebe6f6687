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


class MetadataSigner(Protocol):
    """Signs update metadata with an online key that the caller never sees."""

    def sign(self, role: str, payload: bytes) -> tuple[str, str]:
        """Return ``(keyid, signature in hex)`` of a canonical payload.

        Raises ``signing.refused`` when the role may not sign it, and
        ``signing.unavailable``.
        """
