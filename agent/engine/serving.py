"""Serving in the engine: a thread beside the lanes, which neither waits for them nor takes them with it.

What serves is imported when it is first wanted, and in that thread: an engine
that serves nobody holds none of it.
"""

import logging
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from agent.core.settings import Serve
from agent.engine.clock import Clock
from agent.engine.outlet import Outlet
from agent.ports import LaneState, ModelSpec, ServeSpec, ServeState
from contract.errors import PitheadError

log = logging.getLogger(__name__)

STATE_S: Final = 1.0
"""The state is sent at least this often."""
RETRY_S: Final = 5.0
"""After this, what failed is tried again: the port may be free by now."""
NAME: Final = "serving"
"""Stands where a lane's name would."""


class Wanted(NamedTuple):
    """The last order."""

    spec: ServeSpec | None
    bucket_s: float


class Serving:
    """``configure`` and ``stop`` come from the server's thread; all else belongs to the thread of serving."""

    def __init__(self, outlet: Outlet, clock: Clock) -> None:
        self.outlet, self.clock = outlet, clock
        self._wanted = Wanted(None, 60.0)
        self._stopping = False
        self._changed = threading.Event()
        self._call: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=NAME, daemon=True)

    # ---- from the server's thread

    def configure(self, spec: ServeSpec | None, bucket_s: float) -> None:
        """Serve ``spec`` as soon as possible; None serves nobody."""
        self._wanted = Wanted(spec, bucket_s)
        if spec is not None and self._thread.ident is None:
            self._thread.start()
        self._wake()

    def stop(self) -> None:
        """End after the requests at hand; ``join`` waits for it."""
        self._stopping = True
        self._wake()

    def join(self, timeout_s: float) -> bool:
        """Return whether the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ---- from the thread of serving

    @property
    def wanted(self) -> Wanted:
        """What was ordered last."""
        return self._wanted

    def goes_on(self, settings: Serve) -> bool:
        """Whether a listener with these settings is still wanted."""
        spec = self._wanted.spec
        return not self._stopping and spec is not None and spec.settings == settings

    def on_change(self, call: Callable[[], None] | None) -> None:
        """Call ``call``, from another thread, whenever there is a new order."""
        with self._lock:
            self._call = call

    def _wake(self) -> None:
        self._changed.set()
        with self._lock:
            if self._call is not None:
                self._call()

    def _run(self) -> None:
        failure: PitheadError | None = None
        while not self._stopping:
            self._changed.clear()
            spec = self._wanted.spec
            if spec is None:
                failure = None
                self.outlet.forget_serve()
                self._changed.wait()
                continue
            if failure is None:
                self._say(ServeState("starting", models=tuple(map(loading, spec.models))))
            failure = self._serve(spec, failure)
            if failure is not None:
                self._fail(spec.settings, failure)

    def _serve(self, spec: ServeSpec, before: PitheadError | None) -> PitheadError | None:
        """Serve until another listener is wanted; return what ended it, if anything did."""
        try:
            from agent.engine.serve.fleet import run  # noqa: PLC0415 - nothing of it without serving

            run(self, spec.settings)
        except ImportError as error:
            failure = PitheadError("config.invalid", f"serve.enabled: install pithead[serve]: {error}")
        except PitheadError as error:
            failure = error
        except Exception as error:
            log.exception("serving.broke")
            failure = PitheadError("internal.error", f"{type(error).__name__}: {error}"[:500])
        else:
            return None
        if before is None or (before.code, before.detail) != (failure.code, failure.detail):
            log.error("serving.failed", extra={"facts": {"code": failure.code, "detail": failure.detail}})
        return failure

    def _fail(self, settings: Serve, failure: PitheadError) -> None:
        """Say so until it is time to try again, or there is another order."""
        until = self.clock.mono() + round(RETRY_S * 1e6)
        while self.goes_on(settings) and self.clock.mono() < until:
            spec = self._wanted.spec
            models = tuple(map(loading, spec.models if spec is not None else ()))
            self._say(ServeState("failed", models=models, code=failure.code, detail=failure.detail[:2000]))
            self._changed.wait(STATE_S)
            self._changed.clear()

    def _say(self, state: ServeState) -> None:
        self.outlet.serve(state)


def loading(spec: ModelSpec) -> LaneState:
    """Return the state of a model that is wanted and of which nothing else is known."""
    return LaneState(
        lane=NAME,
        model_name=spec.model_name,
        state="loading",
        wanted_digest=spec.digest,
        wanted_activation=spec.activation,
    )
