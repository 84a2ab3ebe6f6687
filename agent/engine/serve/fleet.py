"""Serve what the slots hold: the supervisor says what, over and over, and this brings it about.

A new activation is loaded and warmed up beside the one that serves, takes its
place in one assignment, and the old one answers what it has admitted. What
cannot be loaded leaves the old one in service, and is reported as a lane
would report it.
"""

import asyncio
import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from agent.core.settings import Serve
from agent.engine.serve import app as apps
from agent.engine.serve import configuration, tokens
from agent.engine.serve.app import App, Listen
from agent.engine.serve.catalogue import Limits
from agent.engine.serve.entries import State, Version
from agent.engine.serve.fleet_pipelines import Watch
from agent.engine.serve.messages import Responder
from agent.engine.serve.offers import Offer, Watched, identity
from agent.engine.serve.repository import Memory
from agent.engine.serve.served import Live
from agent.engine.serve.service import Service
from agent.engine.serving import STATE_S, Serving, loading
from agent.engine.summary import bucket_start
from agent.ports import LaneState, ModelSpec, ServeState
from contract.errors import PitheadError
from contract.messages import Anomaly, ModelSummary

log = logging.getLogger(__name__)

LOAD_AGAIN_S: Final = 30.0
"""After this, what could not be loaded, or hung, is tried again: the reason may have passed."""
MOST_LOST: Final = 5
"""Sessions of one activation that may hang; each keeps its thread and its memory."""
_MB: Final = 1024 * 1024
_SWITCH_S: Final = 0.0005
"""A thread that computes in Python must not keep the loop waiting for the usual 5 ms."""


class Governed(Service):
    """What is served here is the fleet's decision."""

    @property
    def ready(self) -> bool:
        """Whether every model has a version that can be asked; one on trial need not."""
        defaults = [e.default for e in self.catalogue.entries.values() if not e.unloaded]
        pipelines = all(self.pipelines.ready(each) for each in self.pipelines)
        return self._serving and pipelines and all(v is not None and v.ready for v in defaults)

    async def load(self, name: str, config: str | None = None) -> None:  # noqa: ARG002 - of ``Service``
        """Refuse; raises ``serve.conflict``."""
        raise PitheadError("serve.conflict", f"{name[:200]}: what this device serves, its fleet decides")

    def unload(self, name: str) -> None:
        """Refuse; raises ``serve.conflict``."""
        raise PitheadError("serve.conflict", f"{name[:200]}: what this device serves, its fleet decides")


def run(board: Serving, settings: Serve) -> None:
    """Serve until ``board`` wants another listener; raises ``config.invalid`` where there can be none."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        apps.run(Fleet(board, settings).main())
    finally:
        sys.setswitchinterval(interval)


class Fleet:
    """One listener and what it serves. On the loop's thread."""

    def __init__(self, board: Serving, settings: Serve) -> None:
        self._board, self._settings = board, settings
        self._memory = Memory()
        self._offers: dict[str, Offer] = {}
        """What is wanted, by model."""
        self._leaving: list[Offer] = []
        """What was wanted before: it may serve still, and may be wanted again."""
        self._files = _Files(settings)
        self._bucket_s = board.wanted.bucket_s
        self._start = bucket_start(board.clock.wall(), self._bucket_s)
        self._said: ServeState | None = None
        self._said_at = 0.0
        self._changed: asyncio.Event
        self._app: App
        self._watch: Watch
        self._tokens: tokens.Tokens | None = None
        self._responder: Responder | None = None
        self._lost: dict[str, int] = {}

    async def main(self) -> None:
        """Serve until another listener is wanted."""
        loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._app = self._make()
        self._watch = Watch(self._app.service.pipelines)
        self._offer()
        try:
            await self._app.start()
            self._board.on_change(lambda: _tell(loop, self._changed))
            if self._settings.mqtt is not None:
                self._responder = Responder(self._settings.mqtt, self._app.service, self._board.clock)
            log.info("serving.listens", extra={"facts": {"url": self._app.url}})
            while self._board.goes_on(self._settings) and not self._files.certificate_changed():
                self._changed.clear()
                self._turn(loop.time())
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), self._pause())
        finally:
            self._board.on_change(None)
            if self._responder is not None:
                await self._responder.close()
            await self._app.stop()
            self._app.service.catalogue.release()
            self._report(self._bucket_s)
            log.info("serving.ended", extra={"facts": {"url": self._app.url}})

    def _turn(self, now: float) -> None:
        self._offer()
        for offer in self._offers.values():
            self._push(offer, now)
        self._leaving = [offer for offer in self._leaving if self._in_use(offer)]
        if self._responder is not None:
            self._responder.tick(now)
        if self._tokens is not None and self._files.tokens_changed():
            self._read_tokens(self._tokens)
        self._tick()
        self._watch.look({name: o.identity for name, o in self._offers.items() if o.settled})
        self._say(now)

    def _make(self) -> App:
        said = self._settings
        limits = Limits(
            memory_bytes=said.memory_budget_mb * _MB,
            configuration=configuration.of_device(said),
        )
        listen = Listen(
            host=said.host,
            http_port=said.http_port,
            grpc_port=said.grpc_port,
            certificate=None if said.tls_certificate_file is None else Path(said.tls_certificate_file),
            key=None if said.tls_key_file is None else Path(said.tls_key_file),
        )
        if said.token_file is not None:
            self._tokens = tokens.read(Path(said.token_file))
        return App([self._memory], limits, listen, self._tokens, Governed)

    def _read_tokens(self, held: tokens.Tokens) -> None:
        try:
            held.become(tokens.read(Path(self._settings.token_file or "")))
        except PitheadError as error:
            log.warning("serving.tokens_kept", extra={"facts": {"detail": error.detail}})
        else:
            log.info("serving.tokens_read")

    # ---- models

    def _offer(self) -> None:
        """Hold out what is wanted, and nothing else."""
        spec = self._board.wanted.spec
        wanted = {m.model_name: m for m in (spec.models if spec is not None else ())}
        for name in [name for name in self._offers if name not in wanted]:
            self._withdraw(name)
        for name, model in wanted.items():
            before = self._offers.get(name)
            if before is not None and before.identity == identity(model):
                continue
            offer = self._known(model)
            if before is not None:
                self._leaving.append(before)
                self._memory.take_away(name, before.spec.version)
            self._memory.put(offer.candidate)
            self._offers[name] = offer

    def _known(self, model: ModelSpec) -> Offer:
        wanted = identity(model)
        for offer in self._leaving:
            if offer.identity == wanted and offer.spec.model_name == model.model_name:
                self._leaving.remove(offer)
                offer.wanted_again()
                return offer
        return Offer(model)

    def _withdraw(self, name: str) -> None:
        offer = self._offers.pop(name)
        self._memory.take_away(name, offer.spec.version)
        self._leaving.append(offer)
        entries = self._app.service.catalogue.entries
        if name in entries:
            self._app.service.catalogue.unload(name)
            del entries[name]

    def _push(self, offer: Offer, now: float) -> None:
        """Load what is wanted and not there, unless that failed a moment ago."""
        version = self._version(offer)
        live = None if version is None else version.live
        if live is not None and live.candidate is offer.candidate and offer.settled:
            return
        if offer.settled and version is not None and version.state is State.UNAVAILABLE:
            self._hung(offer, version, now)
        idle = version is not None and version.state is State.IDLE
        if (offer.settled and idle) or (offer.loading is not None and not offer.loading.done()):
            return
        if offer.error is None or now >= offer.again:
            offer.loading = asyncio.create_task(self._load(offer))

    async def _load(self, offer: Offer) -> None:
        name = offer.spec.model_name
        now = asyncio.get_running_loop().time
        try:
            await self._app.service.catalogue.load(name)
        except PitheadError as error:
            offer.error, offer.again = offer.cause or error, now() + LOAD_AGAIN_S
        except Exception as error:
            log.exception("serving.load_failed")
            offer.error = PitheadError("internal.error", f"{type(error).__name__}: {error}"[:500])
            offer.again = now() + LOAD_AGAIN_S
        else:
            live = self._live(offer)
            if live is None or live.candidate is not offer.candidate:
                # Another activation of it was being loaded; this one's turn comes at the next look.
                return
            offer.settled, offer.error = True, None
            if isinstance(live.opened.session, Watched):
                live.opened.session.counts = True
        self._changed.set()

    def _hung(self, offer: Offer, version: Version, now: float) -> None:
        key = offer.identity
        self._lost[key] = self._lost.get(key, 0) + 1
        offer.settled = False
        offer.error = PitheadError("serve.model_lost", version.reason)
        offer.again = now + LOAD_AGAIN_S if self._lost[key] < MOST_LOST else float("inf")

    def _version(self, offer: Offer) -> Version | None:
        entry = self._app.service.catalogue.entries.get(offer.spec.model_name)
        return None if entry is None else entry.versions.get(offer.spec.version)

    def _live(self, offer: Offer) -> Live | None:
        version = self._version(offer)
        return None if version is None else version.live

    def _in_use(self, offer: Offer) -> bool:
        live = self._live(offer)
        answers = [*self._app.service.catalogue.leaving, *([] if live is None else [live])]
        return offer.record.anything or any(a.candidate is offer.candidate for a in answers)

    # ---- reports

    def _pause(self) -> float:
        end = self._start + round(self._bucket_s * 1e6)
        return max(0.0, min(STATE_S, (end - self._board.clock.wall()) / 1e6))

    def _tick(self) -> None:
        bucket_s = self._board.wanted.bucket_s
        start = bucket_start(self._board.clock.wall(), bucket_s)
        if (start, bucket_s) != (self._start, self._bucket_s):
            self._report(self._bucket_s)
            self._start, self._bucket_s = start, bucket_s

    def _report(self, bucket_s: float) -> None:
        """Say what was done in the bucket at hand: also that nothing was, by what is wanted."""
        wanted = list(self._offers.values())
        summaries: list[Anomaly | ModelSummary] = []
        for offer in [*wanted, *self._leaving]:
            if offer in wanted or offer.record.anything:
                live = self._live(offer)
                queue = 0 if live is None else live.runner.waiting
                summaries.append(offer.record.take(offer.head(self._start, bucket_s), queue))
        if summaries:
            self._board.outlet.products(summaries)

    def _say(self, now: float) -> None:
        mqtt = self._responder
        state = ServeState(
            "listening",
            url=self._app.url,
            grpc=self._app.grpc_address,
            mqtt="off" if mqtt is None else mqtt.state,
            mqtt_detail="" if mqtt is None else mqtt.detail,
            models=tuple(self._state(offer) for offer in self._offers.values()),
            pipelines=self._watch.states(),
        )
        if now - self._said_at < STATE_S and self._said is not None and _quiet(state) == _quiet(self._said):
            return
        self._said, self._said_at = state, now
        self._board.outlet.serve(state)

    def _state(self, offer: Offer) -> LaneState:
        """Return a model's state in the words of a lane."""
        serving = offer if offer.settled else self._instead(offer)
        state = loading(offer.spec)
        if offer.settled:
            state = replace(state, state="running", wanted_digest=None, wanted_activation=0)
        if serving is not None:
            state = replace(
                state,
                digest=serving.spec.digest,
                activation=serving.spec.activation,
                accelerator=serving.accelerator,
                windows=serving.record.answered,
                errors=serving.record.errors,
            )
        error, broken = offer.error, self._watch.broken.get(offer.spec.model_name)
        if error is None and broken is not None:
            error = PitheadError("serve.not_ready", broken)
        if error is not None:
            state = replace(state, state="failed", code=error.code, detail=error.detail[:2000])
        return state

    def _instead(self, offer: Offer) -> Offer | None:
        """Return what serves a model until ``offer`` does."""
        live = self._app.service.catalogue.routes.get((offer.spec.model_name, ""))
        if not isinstance(live, Live):
            return None
        return next((o for o in self._leaving if o.candidate is live.candidate), None)


class _Files:
    """Notices that files were replaced."""

    def __init__(self, settings: Serve) -> None:
        self._certificate = tuple(
            Path(p) for p in (settings.tls_certificate_file, settings.tls_key_file) if p is not None
        )
        self._token = () if settings.token_file is None else (Path(settings.token_file),)
        self._seen = {paths: _look(paths) for paths in (self._certificate, self._token)}

    def certificate_changed(self) -> bool:
        """Whether another certificate is there than when the listener began."""
        return self._other(self._certificate)

    def tokens_changed(self) -> bool:
        """Whether the tokens are others than at the call before."""
        return self._other(self._token)

    def _other(self, paths: tuple[Path, ...]) -> bool:
        before, self._seen[paths] = self._seen[paths], _look(paths)
        return self._seen[paths] != before


def _look(paths: tuple[Path, ...]) -> tuple[object, ...]:
    found: list[object] = []
    for path in paths:
        try:
            stat = path.stat()
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError as error:
            found.append(error.errno)
    return tuple(found)


def _quiet(state: ServeState) -> ServeState:
    """Return the state without what changes all the time."""
    return replace(
        state,
        models=tuple(replace(m, windows=0, errors=0) for m in state.models),
        pipelines=tuple(replace(p, requests=0, errors=0) for p in state.pipelines),
    )


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop has ended; nobody waits
        loop.call_soon_threadsafe(event.set)
