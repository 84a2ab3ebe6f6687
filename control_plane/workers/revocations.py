"""Keeps the broker's revocation list fresh: a list past its date would lock out the whole fleet."""

import datetime as dt
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

from control_plane.ports import Clock
from provisioning import pki

log = logging.getLogger(__name__)

REISSUE_US: Final = 24 * 3600 * 1_000_000


class RevocationLists:
    """Writes the lists when something was revoked, and daily."""

    def __init__(
        self,
        revocations: Callable[[], Sequence[pki.Revocation]],
        publish: Callable[[Sequence[pki.Revocation], dt.datetime], object],
        clock: Clock,
    ) -> None:
        self._revocations = revocations
        self._publish = publish
        self._clock = clock
        self._written: tuple[int, tuple[pki.Revocation, ...]] | None = None
        self._lock = threading.Lock()

    def tick(self) -> bool:
        """Write the lists when it is time; say whether it was."""
        with self._lock:
            now = self._clock()
            revoked = tuple(sorted(self._revocations()))
            if self._is_written(revoked, now):
                return False
            self._publish(revoked, pki.moment(now))
            self._written = (now, revoked)
        log.info("revocations.published", extra={"facts": {"revoked": len(revoked)}})
        return True

    def _is_written(self, revoked: tuple[pki.Revocation, ...], now: int) -> bool:
        if self._written is None:
            return False
        at, earlier = self._written
        return earlier == revoked and now - at < REISSUE_US
