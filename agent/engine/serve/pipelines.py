"""The pipelines that are served, and whether the models that they are made of are there and fit together.

Each is planned anew when models come, go or are swapped, in the same turn of
the loop: a request finds either the old models with their plan or the new ones.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from agent.core.serve_models import PipelineSpec as Spec
from agent.engine.serve import describe
from agent.engine.serve.catalogue import Catalogue
from agent.engine.serve.describe import IndexEntry, ModelMetadata
from agent.engine.serve.entries import MAX_WAITING, State
from agent.engine.serve.pipeline import VERSION, Pipeline
from agent.engine.serve.pipeline_plan import Interface, Planned, plan
from agent.engine.serve.requests import InferRequest
from agent.engine.serve.routing import Done, Held, Routed
from contract.errors import PitheadError

log = logging.getLogger(__name__)


class Pipelines:
    """All of them. On the loop's thread only."""

    def __init__(self, specs: Mapping[str, Spec], catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        timeout_s = catalogue.limits.policy.timeout_s
        self._held = {
            name: Pipeline(name, spec, self._holds, self._missing, timeout_s) for name, spec in specs.items()
        }
        self._interfaces: dict[tuple[str, str], tuple[str, Interface]] = {}
        """What was seen of models, with the identity of their bytes: of idle ones too."""
        self._said: dict[str, str] = {}
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Pipeline]:
        return iter(self._held.values())

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def get(self, name: str, version: str = "") -> Pipeline | None:
        """Return a pipeline, None where there is none of that name; raises ``serve.unknown_model``."""
        found = self._held.get(name)
        if found is None:
            return None
        if found.unloaded or version not in {"", VERSION}:
            which = f"version {version[:100]!r} of " if version else ""
            raise PitheadError("serve.unknown_model", f"{which}pipeline {name!r} is not served")
        return found

    def named(self, name: str) -> Pipeline | None:
        """Return a pipeline, also one that is unloaded."""
        return self._held.get(name)

    def route(self, routes: dict[tuple[str, str], Routed]) -> None:
        """Plan each anew and add those that are served to ``routes``."""
        for pipeline in self._held.values():
            self._plan(pipeline)
            if not pipeline.unloaded:
                routes[pipeline.name, ""] = routes[pipeline.name, VERSION] = pipeline

    def _plan(self, pipeline: Pipeline) -> None:
        pipeline.plan, why = None, ""
        try:
            known = self._known(pipeline)
            if known is not None:
                pipeline.plan = plan(pipeline.name, pipeline.spec, known)
        except PitheadError as error:
            why = error.detail
        if why != self._said.get(pipeline.name, ""):
            self._said[pipeline.name] = why
            if why and self._catalogue.found:
                log.warning("pipeline.cannot_run", extra={"facts": {"pipeline": pipeline.name, "why": why}})

    def _known(self, pipeline: Pipeline) -> dict[tuple[str, str], Interface] | None:
        """Return what its models take and give; None where one has not been seen yet.

        Raises ``config.invalid`` for a name that is a model's too.
        """
        if pipeline.name in self._catalogue.entries:
            raise PitheadError("config.invalid", f"pipeline {pipeline.name}: a model has the same name")
        known: dict[tuple[str, str], Interface] = {}
        unseen = False
        for step in pipeline.spec.steps:
            key = (step.model, step.version)
            try:
                version = self._catalogue.find(*key)
            except PitheadError:
                continue  # the plan says which step lacks it
            live, identity = version.live, version.candidate.identity
            if live is not None:
                opened = live.opened
                seen = Interface(opened.inputs, opened.outputs, live.batches, live.labels)
                self._interfaces[key] = (live.candidate.identity, seen)
            before = self._interfaces.get(key)
            if before is not None and (live is not None or before[0] == identity):
                known[key] = before[1]
            else:
                unseen = True
        return None if unseen else known

    # ---- requests

    def _holds(self, step: Planned, request: InferRequest) -> Held:
        routed = self._catalogue.routes.get((step.model, step.version))
        return _Later(self._catalogue) if routed is None else routed.hold(request)

    def _missing(self, pipeline: Pipeline, request: InferRequest, done: Done) -> None:
        """Load what it needs, then answer, or say why not."""
        self._check(pipeline)
        if self._waiting >= MAX_WAITING:
            pipeline.statistics.refused += 1
            raise PitheadError("serve.overloaded", f"{MAX_WAITING} requests wait for models to load")
        self._waiting += 1
        deadline = time.monotonic() + (request.timeout_us * 1e-6 or pipeline.timeout_s)

        async def wait() -> None:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self.wake(pipeline)
                request.timeout_us = max(1, round((deadline - time.monotonic()) * 1e6))
                pipeline.submit(request, done)
            except TimeoutError:
                pipeline.statistics.failed(0, "serve.timeout")
                done(PitheadError("serve.timeout", f"the models of {pipeline.name} were not loaded in time"))
            except PitheadError as error:
                done(error)
            finally:
                self._waiting -= 1

        task = asyncio.get_running_loop().create_task(wait())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wake(self, pipeline: Pipeline) -> None:
        """Return when it has a plan; raises ``serve.not_ready``."""
        for step in pipeline.spec.steps:
            if pipeline.plan is not None:
                return
            self._check(pipeline)
            await self._catalogue.wake(step.model, step.version)
        if pipeline.plan is None:
            self._check(pipeline)
            raise PitheadError("serve.not_ready", f"{pipeline.name}: its models changed meanwhile")

    def _check(self, pipeline: Pipeline) -> None:
        why = self.reason(pipeline)
        if why:
            raise PitheadError("serve.not_ready", why, model=pipeline.name)

    # ---- what there is

    def reason(self, pipeline: Pipeline) -> str:
        """Return why it cannot be asked; empty where it can."""
        if pipeline.unloaded:
            return "unloaded"
        if why := self._said.get(pipeline.name):
            return why
        for i, step in enumerate(pipeline.spec.steps):
            label = f"pipeline {pipeline.name}: step {i + 1} ({step.model})"
            try:
                version = self._catalogue.find(step.model, step.version)
            except PitheadError as error:
                return f"{label}: {error.detail}"
            if version.state is State.UNAVAILABLE:
                return f"{label}: {version.reason}"
        return ""

    def ready(self, pipeline: Pipeline) -> bool:
        """Whether a request would be answered: all its models are ready and fit together."""
        return not self.reason(pipeline) and all(
            self._catalogue.find(step.model, step.version).ready for step in pipeline.spec.steps
        )

    async def metadata(self, pipeline: Pipeline) -> ModelMetadata:
        """Return what it takes and gives."""
        await self.wake(pipeline)
        assert pipeline.plan is not None
        return describe.pipeline_metadata(pipeline.name, VERSION, pipeline.plan)

    async def config(self, pipeline: Pipeline) -> dict[str, Any]:
        """Return its configuration in Triton's form."""
        await self.wake(pipeline)
        assert pipeline.plan is not None
        most = self._catalogue.limits.policy.max_batch
        return describe.pipeline_config(pipeline.name, pipeline.plan, most)

    def statistics(self, pipeline: Pipeline) -> dict[str, Any]:
        """Return its element of ``model_stats``."""
        last_ms = 0
        if pipeline.statistics.successes:
            last_ms = describe.wall_ms(pipeline.last_used_ns)
        return describe.model_statistics(pipeline.name, VERSION, pipeline.statistics, last_ms)

    def index(self, pipeline: Pipeline) -> IndexEntry:
        """Return its line in the repository's index."""
        ready = self.ready(pipeline)
        return IndexEntry(pipeline.name, VERSION, "READY" if ready else "UNAVAILABLE", self.reason(pipeline))

    async def load(self, pipeline: Pipeline) -> None:
        """Serve it, loading its models anew where they have changed; raises ``serve.not_ready``."""
        pipeline.unloaded = False
        for model in dict.fromkeys(step.model for step in pipeline.spec.steps):
            try:
                await self._catalogue.load(model)
            except PitheadError as error:
                raise PitheadError("serve.not_ready", f"pipeline {pipeline.name}: {error.detail}") from error
        self._catalogue.route()
        await self.wake(pipeline)

    def unload(self, pipeline: Pipeline) -> None:
        """Serve it no more; its models stay."""
        pipeline.unloaded = True
        self._catalogue.route()


class _Later:
    """A step whose model is not in memory: it is loaded when its turn comes."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def submit(self, request: InferRequest, done: Done) -> None:
        """See ``Held``."""
        routed = self._catalogue.routes.get((request.model, request.version))
        if routed is None:
            self._catalogue.submit_elsewhere(request, done)
        else:
            routed.submit(request, done)

    def release(self) -> None:
        """See ``Held``."""
