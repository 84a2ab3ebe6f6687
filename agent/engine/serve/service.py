"""The use cases of serving. REST, gRPC and MQTT call these, and nothing else.

All methods belong to the thread of one event loop; ``infer_from`` alone may
be called from another. Nothing here knows a protocol's status codes: errors
are ``PitheadError``, of the codes ``serve.*`` and ``inference.*``.
"""

import asyncio
import concurrent.futures
import logging
import math
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Final

import msgspec
import numpy as np

from agent.engine.serve import describe, policies, tensors
from agent.engine.serve.catalogue import Catalogue, Limits
from agent.engine.serve.configuration import Configuration
from agent.engine.serve.describe import IndexEntry, ModelMetadata, ServerMetadata
from agent.engine.serve.entries import State, Version
from agent.engine.serve.ledger import Ledger
from agent.engine.serve.pipelines import Pipelines
from agent.engine.serve.rates import Rates
from agent.engine.serve.repository import Source, newest
from agent.engine.serve.requests import InferRequest, InferResponse, Region
from agent.engine.serve.routing import Done
from agent.engine.serve.runner import Policy
from agent.engine.serve.served import Live
from agent.engine.serve.settings import Settings
from agent.engine.serve.shared_memory import SharedMemory
from agent.engine.serve.steering import Steering
from contract.errors import PitheadError
from inference.session import Array

log = logging.getLogger(__name__)

TICK_S: Final = 0.1


class Service:
    """What this process serves."""

    def __init__(
        self, sources: Sequence[Source], limits: Limits, shared_memory: SharedMemory | None = None
    ) -> None:
        self.catalogue = Catalogue(sources, limits)
        self.pipelines = Pipelines(limits.configuration.pipelines, self.catalogue)
        learns = any(model.bandit is not None for model in limits.configuration.models.values())
        ledger = Ledger(limits.learned if learns else None)
        self.steering = Steering(limits.configuration.models, self.catalogue, ledger)
        self.catalogue.overlays += (self.steering.route, self.pipelines.route)
        self.shared_memory = shared_memory or SharedMemory()
        self.rates = Rates.of(limits.configuration.models, limits.configuration.clients)
        """Limits of who may ask how often; None where there are none."""
        self.settings = Settings()
        self.started = time.time()
        self.grpc_answers: dict[str, int] = {}
        """By status; empty where nobody asks over gRPC."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._stopping = False

    async def start(self) -> None:
        """Find the models and begin to load them; raises ``serve.repository_unreadable``."""
        self._loop = asyncio.get_running_loop()
        await self.catalogue.start()
        self.catalogue.route()
        self._tick()

    async def stop(self, drain_s: float = 5.0) -> None:
        """Answer what was admitted, then let go of everything."""
        self._stopping = True
        await self.catalogue.drain(drain_s)
        if self._ticker is not None:
            self._ticker.cancel()
        await self.steering.close()
        self.catalogue.close()
        self.shared_memory.close()

    def _tick(self) -> None:
        assert self._loop is not None
        self.catalogue.tick()
        self.steering.tick()
        self._ticker = self._loop.call_later(TICK_S, self._tick)

    async def reconfigure(self, said: Configuration) -> None:
        """Let another configuration hold, but for what a server has from its start; the log names that."""
        given, late = policies.carried(self.catalogue.limits.configuration, said)
        if late:
            facts = {"facts": {"tables": ", ".join(late)}}
            log.warning("serving.needs_a_restart", extra=facts)
        if self.rates is None:
            self.rates = Rates.of(given.models, given.clients)
        else:
            self.rates.become(given.models, given.clients)
        await self.catalogue.reconfigure(given)
        log.info("serving.reconfigured")

    # ---- inference

    def submit(self, request: InferRequest, done: Done) -> None:
        """Answer ``request`` by calling ``done`` once, perhaps before this returns. Never raises."""
        try:
            if self.rates is not None:
                self.rates.admit(request.client, request.model)
            if request.shared is not None:
                self._fetch(request)
            if request.outputs and any(o.classes or o.region for o in request.outputs):
                done = self._afterwards(request, done)
            live = self.catalogue.routes.get((request.model, request.version))
            if live is not None:
                live.submit(request, done)
            else:
                self.catalogue.submit_elsewhere(request, done)
        except PitheadError as error:
            done(error)

    async def infer(self, request: InferRequest) -> InferResponse:
        """Return the answer, or raise it."""
        waiter = _Waiter()
        self.submit(request, waiter)
        if (answer := waiter.answer) is None:
            waiter.future = asyncio.get_running_loop().create_future()
            answer = await waiter.future
        if isinstance(answer, PitheadError):
            raise answer
        return answer

    def infer_from(self, request: InferRequest) -> "concurrent.futures.Future[InferResponse]":
        """Return a future of the answer, from any thread."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(self.infer(request), self._loop)

    def _fetch(self, request: InferRequest) -> None:
        for name, shared in (request.shared or {}).items():
            field = f"input {name!r}"
            tensors.check_size(shared.datatype, shared.shape, shared.region.size, field)
            data = self.shared_memory.read(shared.region)
            request.inputs[name] = tensors.from_binary(shared.datatype, shared.shape, data, field)

    def _afterwards(self, request: InferRequest, done: Done) -> Done:
        """Return what classifies and writes to shared memory before it hands the answer on."""

        def finish(answer: InferResponse | PitheadError) -> None:
            if not isinstance(answer, PitheadError):
                try:
                    self._finish(request, answer)
                except PitheadError as error:
                    answer = error
                except Exception:
                    log.exception("serving.answer_failed")
                    answer = PitheadError("internal.error", "the answer cannot be finished")
            done(answer)

        return finish

    def _finish(self, request: InferRequest, answer: InferResponse) -> None:
        routes = self.catalogue.routes
        # Another version than the default may have answered; one that has just left is there no more.
        routed = routes.get((request.model, answer.version)) or routes.get((request.model, request.version))
        labels = {} if routed is None else routed.labels
        batches = routed is not None and routed.batches
        outputs = dict(answer.outputs)
        written: dict[str, Region] = {}
        for wanted in request.outputs:
            if wanted.classes:
                outputs[wanted.name] = classify(
                    outputs[wanted.name], wanted.classes, labels.get(wanted.name, ()), rows=batches
                )
            if wanted.region is not None:
                raw = tensors.to_binary(outputs[wanted.name])
                self.shared_memory.write(wanted.region, raw)
                written[wanted.name] = msgspec.structs.replace(wanted.region, size=len(raw))
        answer.outputs = outputs
        answer.written = written or None

    # ---- what there is

    def server_metadata(self) -> ServerMetadata:
        """Return name, version and extensions."""
        return ServerMetadata(describe.SERVER_NAME, version(), describe.EXTENSIONS)

    @property
    def _serving(self) -> bool:
        return self.catalogue.found and not self._stopping

    @property
    def ready(self) -> bool:
        """Whether every model that is to be served can be asked."""
        models = (
            version.ready
            or (text == entry.hidden and version.state is State.UNAVAILABLE)  # it answers nobody
            for entry in self.catalogue.entries.values()
            if not entry.unloaded
            for text, version in entry.versions.items()
        )
        pipelines = (self.pipelines.ready(each) for each in self.pipelines if not each.unloaded)
        return self._serving and all(models) and all(pipelines)

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether a request would be answered; raises ``serve.unknown_model``."""
        pipeline = self.pipelines.get(name, version)
        if pipeline is not None:
            return self.pipelines.ready(pipeline)
        return self.catalogue.find(name, version).ready

    async def metadata(self, name: str, version: str = "") -> ModelMetadata:
        """Return what a model takes and gives; an idle one is loaded to find out."""
        pipeline = self.pipelines.get(name, version)
        if pipeline is not None:
            return await self.pipelines.metadata(pipeline)
        live = await self._live(name, version)
        entry = self.catalogue.entries[name]
        served = tuple(sorted(entry.versions, key=newest(list(entry.versions)).index))
        return describe.model_metadata(live, served)

    async def config(self, name: str, version: str = "") -> dict[str, Any]:
        """Return a model's configuration in the form of Triton's; an idle one is loaded to find out."""
        pipeline = self.pipelines.get(name, version)
        if pipeline is not None:
            return await self.pipelines.config(pipeline)
        live, limits = await self._live(name, version), self.catalogue.limits
        said = policies.said_of(limits.configuration, name)
        return describe.model_config(live, policies.document(said, limits.versions))

    def statistics(self, name: str = "", version: str = "") -> list[dict[str, Any]]:
        """Return what all models, a model or a version have done; raises ``serve.unknown_model``.

        Without a name pipelines come first; what their steps do, the models count.
        """
        pipeline = self.pipelines.get(name, version)
        if pipeline is not None:
            return [self.pipelines.statistics(pipeline)]
        if name:
            found = self.catalogue.find(name, version)
            entry = self.catalogue.entries[name]
            versions = [found] if version else list(entry.versions.values())
        else:
            versions = [v for e in self.catalogue.entries.values() for v in e.versions.values()]
        pipelines = [] if name else [self.pipelines.statistics(p) for p in self.pipelines if not p.unloaded]
        return pipelines + [
            describe.model_statistics(v.candidate.name, v.candidate.version, v.statistics, _last_ms(v))
            for v in versions
        ]

    async def _live(self, name: str, version: str) -> Live:
        found = self.catalogue.find(name, version)
        if found.live is None and found.state in {State.IDLE, State.LOADING}:
            await self.catalogue.load(name)
            found = self.catalogue.find(name, version)
        if found.live is None:
            raise PitheadError("serve.not_ready", f"{name} {found.candidate.version}: {found.reason}")
        return found.live

    # ---- the repository

    async def index(self, *, ready_only: bool = False) -> list[IndexEntry]:
        """Return every version that is there, and whether it is served."""
        available = await self.catalogue.scan()
        lines: dict[tuple[str, str], IndexEntry] = {}
        for candidate in available:
            key = (candidate.name, candidate.version)
            lines[key] = IndexEntry(candidate.name, candidate.version, "UNAVAILABLE", "not loaded")
        for entry in self.catalogue.entries.values():
            for text, version in entry.versions.items():
                state = "READY" if version.ready and not entry.unloaded else version.state
                lines[entry.name, text] = IndexEntry(entry.name, text, str(state), version.reason)
        for pipeline in self.pipelines:
            lines[pipeline.name, ""] = self.pipelines.index(pipeline)
        return [line for line in lines.values() if not ready_only or line.state == "READY"]

    async def load(self, name: str, config: str | None = None) -> None:
        """Load a model, or load it again where it has changed; ``config`` is Triton's, as JSON text.

        Of that the batching is taken. Raises ``serve.unknown_model``, ``serve.bad_request``,
        ``serve.not_ready``.
        """
        pipeline = self.pipelines.named(name)
        if pipeline is not None:
            if config is not None:
                raise PitheadError("serve.unsupported", "parameters.config: a pipeline has none to change")
            await self.pipelines.load(pipeline)
            return
        policy = None if config is None else policy_of(config, self.catalogue.limits.policy)
        await self.catalogue.load(name, policy)

    def trace(self, model: str = "") -> dict[str, Any]:
        """Return the settings of tracing; raises ``serve.unknown_model``."""
        if model and self.pipelines.get(model) is None:
            self.catalogue.find(model, "")
        return self.settings.trace(model)

    def change_trace(self, changes: Mapping[str, object], model: str = "") -> dict[str, Any]:
        """Change and return them; raises ``serve.unknown_model``, ``serve.bad_request``."""
        if model and self.pipelines.get(model) is None:
            self.catalogue.find(model, "")
        return self.settings.change_trace(changes, model)

    def unload(self, name: str) -> None:
        """No longer serve a model or a pipeline; raises ``serve.unknown_model``."""
        pipeline = self.pipelines.named(name)
        if pipeline is not None:
            self.pipelines.unload(pipeline)
        else:
            self.catalogue.unload(name)


def version() -> str:
    """Return this program's version."""
    try:
        return metadata.version("pithead")
    except metadata.PackageNotFoundError:
        return "0"


def _last_ms(version: Version) -> int:
    if version.live is None or not version.statistics.successes:
        return 0
    return describe.wall_ms(version.live.last_used_ns)


class _Waiter:
    """What ``done`` is for a coroutine; most answers come at once, and need no future."""

    __slots__ = ("answer", "future")

    def __init__(self) -> None:
        self.answer: InferResponse | PitheadError | None = None
        self.future: asyncio.Future[InferResponse | PitheadError] | None = None

    def __call__(self, answer: InferResponse | PitheadError) -> None:
        self.answer = answer
        if self.future is not None and not self.future.done():
            self.future.set_result(answer)


def classify(array: Array, classes: int, labels: Sequence[str], *, rows: bool) -> Array:
    """Return the ``classes`` largest values as texts ``value:index`` or ``value:index:label``.

    One row for each row of the batch where the model batches, else one for all.
    """
    if array.dtype == tensors.TEXT:
        raise tensors.refuse("outputs", "texts cannot be classified")
    count = len(array) if rows and array.ndim else 1
    flat = array.reshape(count, array.size // count if count else math.prod(array.shape[1:]))
    most = min(classes, flat.shape[1])
    order = np.argsort(-flat.astype(np.float64), axis=1, kind="stable")[:, :most]
    texts = np.empty((len(flat), most), tensors.TEXT)
    for i, best in enumerate(order):
        for j, at in enumerate(best):
            value = flat[i, at]
            text = f"{float(value):f}" if array.dtype.kind == "f" else str(int(value))
            label = f":{labels[at]}" if at < len(labels) else ""
            texts[i, j] = f"{text}:{at}{label}".encode()
    return texts if rows else texts[0]


def policy_of(config: str, base: Policy) -> Policy:
    """Return ``base`` with what a configuration in Triton's form says of batching and queues.

    Raises ``serve.bad_request``.
    """
    try:
        said = msgspec.json.decode(config.encode(), type=_Config)
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError) as error:
        raise PitheadError("serve.bad_request", f"parameters.config: {error}") from error
    changes: dict[str, Any] = {}
    if said.max_batch_size is not None:
        changes["max_batch"] = min(max(1, said.max_batch_size), 4096)
    batching = said.dynamic_batching
    if batching is not None:
        changes["preferred"] = tuple(n for n in batching.preferred_batch_size if 0 < n <= 4096)  # noqa: PLR2004
        changes["max_delay_us"] = min(max(0, batching.max_queue_delay_microseconds), 10_000_000)
        queue = batching.default_queue_policy
        if queue is not None and queue.max_queue_size > 0:
            changes["max_queue"] = min(queue.max_queue_size, 1_000_000)
        if queue is not None and queue.default_timeout_microseconds > 0:
            changes["timeout_s"] = min(queue.default_timeout_microseconds * 1e-6, 3600.0)
    return msgspec.structs.replace(base, **changes)


class _Queue(msgspec.Struct):
    max_queue_size: int = 0
    default_timeout_microseconds: int = 0


class _Batching(msgspec.Struct):
    preferred_batch_size: list[int] = []
    max_queue_delay_microseconds: int = 0
    default_queue_policy: _Queue | None = None


class _Config(msgspec.Struct):
    max_batch_size: int | None = None
    dynamic_batching: _Batching | None = None
