"""Learn of new metadata: a thread that polls over HTTPS, woken early by a hint over MQTT."""

import logging
import threading
from collections.abc import Callable
from typing import Final

from agent.core import backoff
from agent.link.https import UpdateServer
from agent.service.events import BundlePolled, PollFailed, Post
from contract.errors import PitheadError

log = logging.getLogger(__name__)
RETRY_CAP_S: Final = 300.0


class Poller:
    """Asks the update server for its bundle, and posts ``BundlePolled`` or ``PollFailed``."""

    def __init__(
        self,
        server: UpdateServer,
        post: Post,
        *,
        etag: str | None,
        poll_s: float,
        fraction: Callable[[], float],
    ) -> None:
        self._server = server
        self._post = post
        self._poll_s = poll_s
        self._fraction = fraction
        self._lock = threading.Lock()
        self._etag = etag
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="poller", daemon=True)

    @property
    def etag(self) -> str | None:
        """The newest bundle that was judged."""
        with self._lock:
            return self._etag

    def judged(self, etag: str | None) -> None:
        """Do not fetch this bundle again; None asks for whatever there is."""
        with self._lock:
            self._etag = etag

    def start(self) -> None:
        """Begin, and return at once."""
        self._thread.start()

    def hint(self) -> None:
        """Ask now."""
        self._wake.set()

    def stop(self) -> None:
        """End; an exchange under way is not waited for."""
        self._stopping.set()
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                answer = self._server.bundle(self.etag)
            except PitheadError as error:
                self._failures += 1
                self._post(PollFailed(error))
            except Exception as error:  # nothing in an answer may end this thread
                log.exception("poll.failed")
                self._failures += 1
                self._post(PollFailed(PitheadError("internal.error", f"{type(error).__name__}: {error}")))
            else:
                self._failures = 0
                if answer is None:
                    self._post(BundlePolled(self.etag, None))
                else:
                    self._post(BundlePolled(answer.etag, answer.body, answer.date))
            self._wake.wait(self._pause())

    def _pause(self) -> float:
        """Spread over the fleet: the interval, less up to a tenth; longer and longer when nobody answers."""
        if self._failures == 0:
            return self._poll_s * (1 - 0.1 * self._fraction())
        cap = max(self._poll_s, min(RETRY_CAP_S, self._poll_s * 10))
        return backoff.delay(self._failures, self._fraction(), base_s=self._poll_s, cap_s=cap)
