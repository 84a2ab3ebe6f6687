"""What the services need from the world outside of the database, as protocols."""

from collections.abc import Callable, Sequence
from typing import Protocol

from contract.messages import Ack, DesiredHint

Clock = Callable[[], int]
"""Returns the time: microseconds since 1970-01-01 UTC."""


class Publisher(Protocol):
    """Sends messages to devices. No call waits for a device."""

    @property
    def connected(self) -> bool:
        """Whether the broker is there now."""

    def hints(self, hints: Sequence[DesiredHint]) -> frozenset[str]:
        """Publish retained hints; return the devices whose hint the broker has taken."""

    def acks(self, acks: Sequence[Ack]) -> None:
        """Publish acknowledgements. One that is lost does no harm: the device sends its records again."""


class MetadataSigner(Protocol):
    """Signs update metadata with an online key that the caller never sees."""

    def sign(self, role: str, payload: bytes) -> tuple[str, str]:
        """Return ``(keyid, signature in hex)`` of a canonical payload.

        Raises ``signing.refused`` when the role may not sign it, and
        ``signing.unavailable``.
        """
