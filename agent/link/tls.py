"""TLS towards the plant for a device whose clock may stand at 1970."""

import socket
import ssl
from collections.abc import Callable
from typing import Any, Self

from agent.core.trusted_time import NO_CHECK_TIME


class DeviceContext(ssl.SSLContext):
    """Leaves the time out of the check of certificates as long as the clock is known to be wrong.

    All of them would count as not yet valid otherwise, and with them the
    signed time could never come. Their signatures and names are checked all
    the same. For one link.
    """

    def __new__(cls, _clock_is_right: Callable[[], bool]) -> Self:
        """Make a context for a client."""
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def __init__(self, clock_is_right: Callable[[], bool]) -> None:
        self._clock_is_right = clock_is_right
        self._checked = True

    @property
    def outdated(self) -> bool:
        """Whether the last connection was made without the time, and the time is known by now."""
        return not self._checked and self._clock_is_right()

    def wrap_socket(self, sock: socket.socket, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        """See ``ssl.SSLContext``."""
        self._checked = self._clock_is_right()
        if self._checked:
            self.verify_flags &= ~NO_CHECK_TIME
        else:
            self.verify_flags |= NO_CHECK_TIME
        return super().wrap_socket(sock, *args, **kwargs)


def outdated(context: ssl.SSLContext | None) -> bool:
    """Whether a connection of this context is to be made anew, since it can be checked better now."""
    return isinstance(context, DeviceContext) and context.outdated
