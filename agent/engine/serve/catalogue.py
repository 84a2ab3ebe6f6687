"""All versions that are known, which of them are in memory, and how one takes another's place.

A swap never leaves a gap: the new session is loaded and warmed up beside the
old one, then takes its place in one assignment; the old one answers what it
has admitted, and is freed on a thread where nobody waits (TensorFlow
Serving's "availability preserving" policy, with counted handles).

Under a memory budget the version that was used least recently and answers
nobody leaves first. It stays known: its next request loads it.

All methods belong to the loop's thread.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from agent.engine.serve import loads, policies
from agent.engine.serve.background import Background
from agent.engine.serve.configuration import Configuration
from agent.engine.serve.entries import Entry, State, Version
from agent.engine.serve.leaving import Leaving, least_needed
from agent.engine.serve.repository import Candidate, Source, newest
from agent.engine.serve.requests import InferRequest
from agent.engine.serve.routing import Done, Routed
from agent.engine.serve.runner import Policy
from agent.engine.serve.served import Live
from contract.errors import PitheadError

log = logging.getLogger(__name__)


class Limits(Struct, frozen=True):
    """What is served, and within what."""

    policy: Policy = Policy()
    versions: int = 1
    """So many of the newest versions of each model; 0: all."""
    memory_bytes: int = 0
    """For all sessions together; 0: no limit."""
    lazy: bool = False
    """Load nothing before its first request."""
    configuration: Configuration = Configuration()
    """What ``serve.toml`` says."""
    learned: Path | None = None
    """The file where bandits keep what they have learned; None: not across restarts."""


class Catalogue:
    """The models."""

    def __init__(self, sources: Sequence[Source], limits: Limits) -> None:
        self._sources, self.limits = sources, limits
        self.entries: dict[str, Entry] = {}
        self.routes: dict[tuple[str, str], Routed] = {}
        """(model, version) -> what serves it now; version is empty for the default."""
        self.overlays: list[Callable[[dict[tuple[str, str], Routed]], None]] = []
        """What else names lead to: each is given all routes anew whenever one changes."""
        self.leaving = Leaving()
        self._loader = Background("loader")
        self._available: list[Candidate] = []
        self.found = False
        """Whether it is known yet what is to be served."""
        self.loads = self.evictions = 0
        self._tasks: set[asyncio.Task[PitheadError | None]] = set()

    # ---- finding

    def find(self, name: str, version: str) -> Version:
        """Return a version; raises ``serve.unknown_model``."""
        entry = self.entries.get(name)
        if entry is None or entry.unloaded:
            raise PitheadError("serve.unknown_model", f"no model {name[:200]!r} is served", model=name[:200])
        found = entry.versions.get(version) if version else entry.default
        if found is None and not version:
            raise PitheadError("serve.unknown_model", f"no version of model {name!r} is served", model=name)
        if found is None:
            raise PitheadError(
                "serve.unknown_model",
                f"model {name!r} has no version {version[:100]!r}; there are {newest(list(entry.versions))}",
                model=name,
            )
        return found

    def submit_elsewhere(self, request: InferRequest, done: Done) -> None:
        """Answer a request whose version is not in memory: load it first, or say why not."""
        version = self.find(request.model, request.version)
        if version.live is not None:
            version.live.submit(request, done)
            return
        if version.state is State.UNAVAILABLE:
            raise PitheadError(
                "serve.not_ready", f"{request.model} {version.candidate.version}: {version.reason}"
            )
        version.wait(request, done, self._policy(request.model, version).timeout_s)
        self._begin(self.entries[request.model], version)

    # ---- loading

    async def scan(self) -> list[Candidate]:
        """Look at the sources; raises ``serve.repository_unreadable``."""

        def all_of() -> list[Candidate]:
            return [candidate for source in self._sources for candidate in source.scan()]

        self._available = await asyncio.get_running_loop().run_in_executor(None, all_of)
        return self._available

    async def start(self) -> None:
        """Find everything, and begin to load what is wanted."""
        await self.scan()
        for name in dict.fromkeys(candidate.name for candidate in self._available):
            self._wish(name)
        if not self.limits.lazy:
            for entry in self.entries.values():
                for version in entry.versions.values():
                    self._begin(entry, version)
        self.found = True

    async def wake(self, name: str, version: str) -> None:
        """Return when a version that is idle, or being loaded, is in memory; raises ``serve.not_ready``."""
        found = self.find(name, version)
        if found.live is None and found.state in {State.IDLE, State.LOADING}:
            error = await asyncio.shield(self._begin(self.entries[name], found))
            if error is not None:
                raise PitheadError("serve.not_ready", f"{name}: {error}", model=name)

    async def reconfigure(self, configuration: Configuration) -> None:
        """Let another configuration hold: what it changes of a model is loaded anew, beside the old one."""
        before = self.limits.configuration
        self.limits = replace(self.limits, configuration=configuration)
        for name, entry in list(self.entries.items()):
            said, now = policies.said_of(before, name), policies.said_of(configuration, name)
            anew = policies.anew(said, now)
            if entry.unloaded or not (anew or said.versions != now.versions):
                continue
            # What is being loaded began with what was said before.
            loading = [v.loading for v in entry.versions.values() if v.loading is not None]
            await asyncio.gather(*loading)
            try:
                await self.load(name, anew=anew)
            except PitheadError as error:
                facts = {"facts": {"model": name, "why": error.detail}}
                log.warning("model.not_loaded", extra=facts)
            self._leave(entry)

    async def load(self, name: str, policy: Policy | None = None, *, anew: bool = False) -> None:
        """Serve the versions that the policy wants, loading again those whose bytes or policy have changed.

        ``anew`` loads all of them again.

        Returns when it is done. Raises ``serve.unknown_model``, or what loading raised.
        """
        await self.scan()
        entry = self._wish(name)
        if entry is None:
            raise PitheadError("serve.unknown_model", f"no model {name[:200]!r} is in the repository")
        entry.unloaded = False
        tasks = []
        there = {c.version: c for c in self._available if c.name == name}
        for text, version in entry.versions.items():
            current = there.get(text)
            if current is None:  # in service until another takes its place
                continue
            if policy is not None:
                version.policy = policy
            live = version.live
            changed = (
                live is None or live.candidate.identity != current.identity or policy is not None or anew
            )
            version.candidate = current
            if changed:
                tasks.append(self._load_anew(entry, version))
        for error in await asyncio.gather(*tasks):
            if error is not None:
                raise PitheadError("serve.not_ready", f"{name}: {error}", model=name)

    async def _load_anew(self, entry: Entry, version: Version) -> PitheadError | None:
        """Load what is there now; a load that is under way may have begun with the bytes before."""
        running = version.loading
        if running is not None and not running.done() and version.tried != version.candidate.identity:
            await asyncio.wait({running})
        return await asyncio.shield(self._begin(entry, version))

    def unload(self, name: str) -> None:
        """No longer serve a model; what was admitted is answered. Raises ``serve.unknown_model``."""
        entry = self.entries.get(name)
        if entry is None:
            raise PitheadError("serve.unknown_model", f"no model {name[:200]!r} is in the repository")
        entry.unloaded = True
        for version in entry.versions.values():
            self._drop(version)
            version.state, version.reason = State.UNAVAILABLE, "unloaded"
            version.tell(PitheadError("serve.unknown_model", f"{name} was unloaded", model=name))
        self.route()

    def _wish(self, name: str) -> Entry | None:
        """Bring an entry to what the version policy wants of what there is."""
        there = {c.version: c for c in self._available if c.name == name}
        if not there:
            return None
        said = policies.said_of(self.limits.configuration, name)
        entry = self.entries.setdefault(name, Entry(name, said.hidden))
        only = policies.specific(said) or ()
        if missing := [text for text in only if text not in there]:
            facts = {"facts": {"model": name, "versions": ", ".join(missing)}}
            log.warning("model.versions_missing", extra=facts)
        for text in self._kept(name, list(there)):
            if text not in entry.versions:
                entry.versions[text] = Version(there[text])
        for text, version in list(entry.versions.items()):
            if text not in there and (version.loading is None or version.loading.done()):
                self._forget(entry, version)
        return entry

    def _begin(self, entry: Entry, version: Version) -> "asyncio.Task[PitheadError | None]":
        if version.loading is None or version.loading.done():
            if version.live is None:
                version.state = State.LOADING
            version.tried = version.candidate.identity
            version.loading = asyncio.create_task(self._load(entry, version))
            self._tasks.add(version.loading)
            version.loading.add_done_callback(self._tasks.discard)
        return version.loading

    async def _load(self, entry: Entry, version: Version) -> PitheadError | None:
        """Return what went wrong; then what served before goes on."""
        candidate = version.candidate
        began = time.monotonic()
        said = policies.said_of(self.limits.configuration, candidate.name)
        cache_bytes = policies.cache_bytes(said)
        try:
            loaded = await self._loader.run(lambda: loads.load(candidate, cache_bytes))
        except PitheadError as error:
            version.reason = str(error)
            log.warning("model.not_loaded", extra={"facts": {"model": candidate.name, "why": str(error)}})
            if version.live is None:
                version.state = State.UNAVAILABLE
                version.tell(PitheadError("serve.not_ready", f"{candidate.name}: {error}"))
            return error
        opened, profile, memory, cache = loaded
        if entry.unloaded or not self._offered(candidate):
            self.leaving.free(opened)
            self._forget(entry, version)
            return None
        policy = self._policy(candidate.name, version)
        if opened.objective_ms is not None and version.policy is None and said.objective_ms is None:
            policy = replace(policy, objective_s=opened.objective_ms / 1000)
        old = version.live
        version.statistics = candidate.statistics or version.statistics
        version.live = Live(candidate, opened, profile, policy, memory, version.statistics, cache)
        version.state, version.reason = State.READY, ""
        self.loads += 1
        self._retire_others(entry, version, old)
        self._make_room(version.live)
        self.route()
        facts = {
            "model": candidate.name,
            "version": candidate.version,
            "accelerator": opened.session.accelerator,
            "runs": "inline" if version.live.runner.inline else "in a thread",
            "batches": version.live.runner.batches,
            "run_us": round(profile.run_s * 1e6, 1) if math.isfinite(profile.run_s) else None,
            "load_s": round(time.monotonic() - began, 3),
        }
        log.info("model.serves", extra={"facts": facts})
        version.begin(version.live)
        return None

    def _policy(self, name: str, version: Version) -> Policy:
        said = policies.said_of(self.limits.configuration, name)
        return version.policy or policies.runs(said, self.limits.policy)

    def _retire_others(self, entry: Entry, new: Version, old: Live | None) -> None:
        if old is not None:
            self.leaving.take(old)
        kept = self._kept_of(entry)
        for text, version in list(entry.versions.items()):
            if version is not new and text not in kept:
                self._drop(version)
                self._forget(entry, version)

    def _leave(self, entry: Entry) -> None:
        """Serve no more what the policy does not want, where something that it wants can answer."""
        kept = self._kept_of(entry)
        if not any(version.ready for text, version in entry.versions.items() if text in kept):
            return
        for text, version in list(entry.versions.items()):
            if text not in kept:
                self._drop(version)
                self._forget(entry, version)
        self.route()

    def _kept_of(self, entry: Entry) -> list[str]:
        offered = [text for text, v in entry.versions.items() if self._offered(v.candidate)]
        return self._kept(entry.name, offered)

    def _kept(self, name: str, offered: Sequence[str]) -> list[str]:
        """Return the versions that are served: by the policy, and those that the configuration steers to."""
        said = policies.said_of(self.limits.configuration, name)
        shown = [text for text in offered if text != said.hidden]
        ranked = policies.served(said, self.limits.versions, shown)
        return ranked + [text for text in offered if text in said.named and text not in ranked]

    def _offered(self, candidate: Candidate) -> bool:
        """Whether a source has this version, as these bytes or others."""
        return any((c.name, c.version) == (candidate.name, candidate.version) for c in self._available)

    def _forget(self, entry: Entry, version: Version) -> None:
        """A version that is not served any more; one in memory stays until another takes its place."""
        text = version.candidate.version
        if version.live is None and entry.versions.get(text) is version:
            del entry.versions[text]
            version.tell(PitheadError("serve.unknown_model", f"version {text} is not served any more"))

    # ---- leaving

    def _make_room(self, newcomer: Live | None = None) -> bool:
        """Return whether any left; ``newcomer``, or else what was used last, stays whatever its size."""
        budget = self.limits.memory_bytes
        if not budget:
            return False
        leaving = least_needed(self._versions(), budget, newcomer)
        for version in leaving:
            self._drop(version)
            version.state, version.reason = State.IDLE, "not in memory: its next request loads it"
            self.evictions += 1
            log.info("model.left_memory", extra={"facts": {"model": version.candidate.name}})
        return bool(leaving)

    def _drop(self, version: Version) -> None:
        live, version.live = version.live, None
        if live is not None:
            self.leaving.take(live)

    def route(self) -> None:
        """Make the routes anew."""
        routes: dict[tuple[str, str], Routed] = {}
        for entry in self.entries.values():
            routes |= entry.routes()
        for overlay in self.overlays:
            overlay(routes)
        self.routes = routes

    # ---- housekeeping

    def tick(self) -> None:
        """Look at deadlines and hung runs; call it a few times a second."""
        now = time.monotonic_ns()
        lost = False
        for version in self._versions():
            version.tell_late(now)
            live = version.live
            if live is None or not live.runner.busy:
                continue
            live.runner.tick(now)
            if live.runner.lost:
                version.live, version.state = None, State.UNAVAILABLE
                version.reason = "a run of it hangs; load it again"
                lost = True
        for live in self.leaving:
            live.runner.tick(now)
        # What was needed by a request when others were loaded may leave after it, and answers take room too.
        if self._make_room() or lost:
            self.route()

    def requests_wait(self) -> bool:
        """Whether any request waits for a run."""
        return any(version.live is not None and version.live.runner.waiting for version in self._versions())

    def _versions(self) -> list[Version]:
        return [version for entry in self.entries.values() for version in entry.versions.values()]

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; return whether that happened in time."""
        end = time.monotonic() + timeout_s
        while any(live.in_flight for live in [*self.routes.values(), *self.leaving]):
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.01)
        return True

    def close(self) -> None:
        """End loading; sessions go with the process."""
        for task in self._tasks:
            task.cancel()

    def release(self) -> None:
        """Let go of all sessions and threads, in a process that lives on; after ``close``."""
        for version in self._versions():
            self._drop(version)
        self._loader.stop(0.0)
        self.leaving.stop()
