"""What a client of HTTP/2 may cost: the numbers, and the count of frames that only cost. Pure.

The count is as nghttp2's of resets and glitches: so many at once, then so many a second. What an honest
client sends beside its calls, it sends for the answers it gets (a PING to measure, a reset that crosses an
answer, a wider window), so each answer gives one back, and nothing raises the count above its start.
"""

from typing import Final

from agent.engine.serve import http2_frames as h2
from agent.engine.serve.http import SWEEP_S

STREAMS: Final = 256
"""Of one connection at once; clients keep more waiting."""
STREAM_WINDOW: Final = 256 * 1024
CONNECTION_WINDOW: Final = 1024 * 1024
FRAME: Final = 64 * 1024
"""Bytes of the largest frame that is taken."""
MAX_CONTINUATIONS: Final = 16
IDLE_S: Final = 600.0
"""Of a connection without a call, and of a stream that is asked nothing."""
PING_S: Final = 30.0
PING_TIMEOUT_S: Final = 20.0
LINGER_S: Final = 2.0
OUT: Final = 64 * 1024
"""Bytes that are written before the transport is asked whether it has enough."""
TURN: Final = 1024
"""Frames of one client that are taken before it is the others' turn."""
CALL: Final = 16
"""Frames that a call counts for."""
LARGE: Final = 16 * 1024
"""Bytes; answers below it are bounded by the number of calls."""
NEVER: Final = float("inf")

AT_ONCE: Final = 1000
"""Frames that want an answer or undo work: PING, SETTINGS, resets, empty DATA, calls without a message."""
A_SECOND: Final = 100
CHEAP: Final = 0.01
"""What a frame counts that is only read: WINDOW_UPDATE, PRIORITY, an acknowledgement, a few bytes of DATA."""
SMALL: Final = 64
"""Bytes of DATA, sent or received; a frame with fewer does little but cost."""


class Patience:
    """What a connection may still cost without being of use."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left: float = AT_ONCE

    def take(self, cost: float) -> None:
        """Count a frame; raises ``BrokenError``."""
        self.left -= cost
        if self.left < 0:
            raise h2.BrokenError(h2.ENHANCE_YOUR_CALM, "too many frames that only cost")

    def give(self) -> None:
        """Count an answer."""
        if self.left < AT_ONCE:
            self.left += 1

    def sweep(self) -> None:
        """Count the time from one sweep to the next."""
        self.left = min(AT_ONCE, self.left + A_SECOND * SWEEP_S)
