"""The broker of this site, as the revocation lists see it."""

import datetime as dt
import logging
import time
from collections.abc import Sequence
from typing import Final

from control_plane.settings import Settings
from control_plane.wiring.layout import Layout
from provisioning import broker, pki
from provisioning.eviction import Canary, Proof, evict, make_canary, prove

log = logging.getLogger(__name__)

OBEY_S: Final = 10.0
"""How long a broker may take to read its files again."""
LOOK_AGAIN_S: Final = 0.1


class SiteBroker:
    """Implements ``workers.revocations.Broker``."""

    def __init__(self, layout: Layout, settings: Settings) -> None:
        self._layout = layout
        self._host = settings.broker
        self._port = settings.broker_port
        self._canary: Canary | None = None
        self._said: Proof | None = None

    def write(self, revoked: Sequence[pki.Revocation], now: dt.datetime) -> None:
        """Replace the files, with a new canary on the list."""
        self._canary = make_canary(self._layout.site, pki.utc_now())
        entries = [*revoked, pki.Revocation(self._canary.serial, now)]
        broker.write_revocations(self._layout.broker, self._layout.site.write_crl(entries, now))

    def apply(self) -> bool:
        """Have the files read, and prove it. A broker that read them and lets everybody in is ended."""
        assert self._canary is not None
        proof = prove(self._layout.site, self._canary, self._host, self._port)
        asked = proof is Proof.OPEN and broker.reload(self._layout.broker)
        deadline = time.monotonic() + OBEY_S
        while asked and proof is not Proof.IN_FORCE and time.monotonic() < deadline:
            time.sleep(LOOK_AGAIN_S)
            proof = prove(self._layout.site, self._canary, self._host, self._port)
        stopped = asked and proof is Proof.OPEN and broker.stop_running(self._layout.broker)
        if proof is not Proof.IN_FORCE and (stopped or proof is not self._said):
            log.error(
                "revocations.not_in_force",
                extra={"facts": {"broker": proof.value, "asked": asked, "stopped": stopped}},
            )
        self._said = proof
        return proof is Proof.IN_FORCE

    def evict(self, device: str) -> bool:
        """End the connection of ``device``."""
        return evict(self._layout.site, device, self._host, self._port)
