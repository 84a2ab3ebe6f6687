"""Keeps the broker's revocation lists fresh and in force, and those who are revoked outside.

A list past its date would lock out the whole fleet, and one that the broker
has not read keeps nobody out: so it is written daily, and it counts only
when the broker has been seen to obey it.
"""

import datetime as dt
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from control_plane.ports import Clock
from provisioning import pki

log = logging.getLogger(__name__)

DAY_US: Final = 24 * 3600 * 1_000_000
REISSUE_US: Final = DAY_US
ALARM_US: Final = (pki.CRL_DAYS - 5) * DAY_US
"""Age of the list in force at which people must hear of it: five days before everybody is locked out."""


class Broker(Protocol):
    """What is needed of the broker."""

    def write(self, revoked: Sequence[pki.Revocation], now: dt.datetime) -> None:
        """Replace the files of the lists."""

    def apply(self) -> bool:
        """Let the broker read the files; whether it was seen to obey them."""

    def evict(self, device: str) -> bool:
        """End the connection of ``device``; whether it could be done."""


class RevocationLists:
    """Brings to the broker what is revoked, again and again until it is there."""

    def __init__(
        self, revocations: Callable[[], Sequence[pki.Revocation]], broker: Broker, clock: Clock
    ) -> None:
        self._revocations = revocations
        self._broker = broker
        self._clock = clock
        self._lock = threading.Lock()
        self._written: tuple[int, tuple[pki.Revocation, ...]] | None = None
        self._in_force = False
        self._proven = clock()
        self._alarmed = 0
        self._outstanding: set[str] = set()

    @property
    def in_force(self) -> bool:
        """Whether the broker obeys the newest lists, and no revoked device is left inside."""
        return self._in_force and not self._outstanding

    def evict_later(self, devices: Iterable[str]) -> None:
        """End the connections of these devices, at the next tick and until it is done."""
        with self._lock:
            self._outstanding.update(devices)

    def revoked(self, device: str) -> bool:
        """Shut out a device that was just revoked; False when that is still to come. Never raises."""
        try:
            self.evict_later([device])
            self.tick()
        except Exception:
            log.exception("revocations.failed", extra={"facts": {"device": device}})
        with self._lock:
            return self._in_force and device not in self._outstanding

    def tick(self) -> bool:
        """Do what is to be done; whether nothing is left."""
        with self._lock:
            now = self._clock()
            revoked = tuple(sorted(self._revocations()))
            if self._is_due(revoked, now):
                self._in_force = False
                self._broker.write(revoked, pki.moment(now))
                self._written = (now, revoked)
                log.info("revocations.written", extra={"facts": {"revoked": len(revoked)}})
            if not self._in_force:
                self._in_force = self._broker.apply()
                if self._in_force:
                    self._proven = now
                    log.info("revocations.in_force", extra={"facts": {"revoked": len(revoked)}})
            if self._in_force:
                self._outstanding -= {device for device in self._outstanding if self._broker.evict(device)}
            self._alarm(now)
            return self.in_force

    def _is_due(self, revoked: tuple[pki.Revocation, ...], now: int) -> bool:
        if self._written is None:
            return True
        at, earlier = self._written
        return earlier != revoked or now - at >= REISSUE_US

    def _alarm(self, now: int) -> None:
        if now - self._proven > ALARM_US and now - self._alarmed > DAY_US:
            self._alarmed = now
            days = pki.CRL_DAYS - (now - self._proven) // DAY_US
            log.error("revocations.expiring", extra={"facts": {"days_left": days}})
