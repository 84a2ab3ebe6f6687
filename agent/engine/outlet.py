"""What the lanes have to say, kept until the supervisor has it.

Products are numbered and kept until it says ``Stored``. Lane states, fits and
the state of serving are level-triggered: only the last of each counts.
"""

import logging
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Final

import msgspec

from agent.core.frames import frame
from agent.engine.clock import Clock
from agent.ports import Fitted, FromEngine, LaneState, Product, ServeState
from contract.messages import Anomaly, ModelSummary

log = logging.getLogger(__name__)

MAX_PRODUCTS: Final = 20_000
MAX_BYTES: Final = 8 * 1024 * 1024
LOSS_REPORT_US: Final = 10_000_000
"""Losses are logged at most this often."""

_encoder = msgspec.msgpack.Encoder()


def encoded(message: FromEngine) -> bytes:
    """Return ``message`` as a frame."""
    return frame(_encoder.encode(message))


class Outlet:
    """Shared by the lanes' threads, which fill it, and the server's, which empties it."""

    def __init__(
        self,
        clock: Clock,
        wake: Callable[[], None],
        *,
        max_products: int = MAX_PRODUCTS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """``wake`` tells the server's thread that there is something to send."""
        self._clock, self._wake = clock, wake
        self._max_products, self._max_bytes = max_products, max_bytes
        self._lock = Lock()
        self._kept: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._n = 0
        self._sent = 0
        self._lost = 0
        self._lost_unreported = 0
        self._lost_logged_at = 0
        self._states: dict[str, LaneState] = {}
        self._fits: dict[str, Fitted] = {}
        self._serve: ServeState | None = None
        self._fresh: dict[tuple[str, str], None] = {}

    # ---- from the lanes

    def products(self, bodies: list[Anomaly | ModelSummary]) -> None:
        """Number and keep ``bodies``; the oldest ones are given up when there are too many."""
        wall, mono = self._clock.wall(), self._clock.mono()
        with self._lock:
            for body in bodies:
                self._n += 1
                data = encoded(Product(n=self._n, t_wall=wall, t_mono=mono, body=body))
                self._kept.append((self._n, data))
                self._bytes += len(data)
            while len(self._kept) > self._max_products or self._bytes > self._max_bytes:
                self._bytes -= len(self._kept.popleft()[1])
                self._lost += 1
                self._lost_unreported += 1
            self._log_losses(mono)
        self._wake()

    def state(self, state: LaneState) -> None:
        """Keep the last state of a lane."""
        with self._lock:
            self._states[state.lane] = state
            self._fresh["state", state.lane] = None
        self._wake()

    def fitted(self, fitted: Fitted) -> None:
        """Keep a fit until ``forget_fit``, since nobody else has it."""
        with self._lock:
            self._fits[fitted.lane] = fitted
            self._fresh["fit", fitted.lane] = None
        self._wake()

    def forget_fit(self, lane: str) -> None:
        """The supervisor has handed the fit back, or it is of no use any more."""
        with self._lock:
            self._fits.pop(lane, None)
            self._fresh.pop(("fit", lane), None)

    def forget_lane(self, lane: str) -> None:
        """The lane is gone."""
        self.forget_fit(lane)
        with self._lock:
            self._states.pop(lane, None)
            self._fresh.pop(("state", lane), None)

    # ---- from serving

    def serve(self, state: ServeState) -> None:
        """Keep the last state of serving."""
        with self._lock:
            self._serve = state
            self._fresh["serve", ""] = None
        self._wake()

    def forget_serve(self) -> None:
        """Nobody is served any more."""
        with self._lock:
            self._serve = None
            self._fresh.pop(("serve", ""), None)

    # ---- from the server

    def stored(self, n: int) -> None:
        """Forget all products up to ``n``."""
        with self._lock:
            while self._kept and self._kept[0][0] <= n:
                self._bytes -= len(self._kept.popleft()[1])

    def rewind(self) -> None:
        """A new supervisor is there: send everything that is kept again."""
        with self._lock:
            self._sent = 0
            self._fresh = {("fit", lane): None for lane in self._fits}
            self._fresh.update({("state", lane): None for lane in self._states})
            self._fresh["serve", ""] = None

    def take(self, room: int) -> bytes:
        """Return frames that are due to be sent, products up to about ``room`` bytes of them."""
        with self._lock:
            parts = [encoded(m) for kind, lane in self._fresh if (m := self._message(kind, lane)) is not None]
            self._fresh.clear()
            if self._kept and self._kept[-1][0] > self._sent:
                room = self._take_products(parts, room)
            return b"".join(parts)

    def _take_products(self, parts: list[bytes], room: int) -> int:
        first = self._kept[0][0]
        # Numbers in the buffer have no holes, so the next one's place is known.
        for i in range(max(0, self._sent + 1 - first), len(self._kept)):
            n, data = self._kept[i]
            if room <= 0:
                break
            parts.append(data)
            room -= len(data)
            self._sent = n
        return room

    @property
    def waiting(self) -> int:
        """Products that are not stored yet."""
        with self._lock:
            return len(self._kept)

    @property
    def lost(self) -> int:
        """Products that were given up so far."""
        with self._lock:
            return self._lost

    def _message(self, kind: str, lane: str) -> FromEngine | None:
        if kind == "serve":
            return self._serve
        return self._states.get(lane) if kind == "state" else self._fits.get(lane)

    def _log_losses(self, now: int) -> None:
        if self._lost_unreported and now - self._lost_logged_at >= LOSS_REPORT_US:
            log.warning(
                "engine.products_lost", extra={"facts": {"lost": self._lost_unreported, "total": self._lost}}
            )
            self._lost_unreported, self._lost_logged_at = 0, now
