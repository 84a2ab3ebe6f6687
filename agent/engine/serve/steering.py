"""Which version answers a request that names none: by weight, by key, or by what each has earned.

Its shadow, where it has one, is asked the same. A model with such a table in
``serve.toml`` has one of these in the place of its default version. Requests
that name a version pass by it, and so do all other models.
"""

import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

from agent.engine.serve.alike import Face, apart
from agent.engine.serve.bandit import Arm, pull
from agent.engine.serve.catalogue import Catalogue
from agent.engine.serve.configuration import Model
from agent.engine.serve.entries import Entry
from agent.engine.serve.ledger import Ledger
from agent.engine.serve.repository import newest
from agent.engine.serve.requests import InferRequest, InferResponse
from agent.engine.serve.routing import Done, Held, Routed
from agent.engine.serve.shadow import Shadowing
from agent.engine.serve.split import choose, key_of, usable
from contract.errors import PitheadError

log = logging.getLogger(__name__)

MOST_UNREWARDED: Final = 10_000
"""Answers of a model that may wait for a reward; the oldest is forgotten."""
WORTHLESS: Final = frozenset(("inference.run_failed", "serve.model_lost", "serve.timeout", "internal.error"))
"""Answers that nobody can reward: a version that only fails must not be tried for ever."""


class Steered:
    """One model. On the loop's thread only."""

    def __init__(self, name: str, given: Model, catalogue: Catalogue, ledger: Ledger) -> None:
        self.name, self.given = name, given
        self._catalogue, self._ledger = catalogue, ledger
        seed = None if given.bandit is None else given.bandit.seed
        self._random = random.Random(seed)  # noqa: S311 - shares of traffic are no secret
        self._weights: list[tuple[str, float]] = []
        self._versions: list[str] = []
        """That may answer, the newest first."""
        self._default = ""
        self.counts: dict[str, int] = {}
        """Requests by the version that they were sent to."""
        self.arms: dict[str, Arm] = {} if given.bandit is None else ledger.arms(name)
        self._unrewarded: dict[str, str] = {}
        self._faces: dict[str, tuple[str, Face]] = {}
        """What was seen of versions, with the identity of their bytes: of idle ones too."""
        self._strangers: dict[str, str] = {}
        """Versions that are not asked beside the others, and why."""
        self.shadowing: Shadowing | None = None
        if given.shadow is not None:
            self.shadowing = Shadowing(
                name, given.shadow, self._route, catalogue.requests_wait, self._random.random
            )

    def update(self, entry: Entry) -> bool:
        """Take note of the versions that there are; return whether any may answer."""
        ready = [text for text in newest(list(entry.versions)) if entry.versions[text].ready]
        self._versions = [text for text in ready if text != self.given.hidden]
        default = entry.default
        self._default = "" if default is None else default.candidate.version
        if self.given.split is not None:
            weights = dict(usable(self.given.split.weights, lambda version: version in ready))
            alike = self._alike(entry, sorted(weights, key=lambda text: -weights[text]))
            self._weights = [(text, weights[text]) for text in weights if text in alike]
        if self.given.bandit is not None:
            if self.given.bandit.versions:
                self._versions = [text for text in ready if text in self.given.bandit.versions]
            asked = {text: self.arms.get(text, Arm()).requests for text in self._versions}
            alike = self._alike(entry, sorted(asked, key=lambda text: -asked[text]))
            self._versions = [text for text in self._versions if text in alike]
        return bool(self._versions or self._weights)

    def _alike(self, entry: Entry, ranked: Iterable[str]) -> set[str]:
        """Return the versions that answer the same requests as the first one of which that is known."""
        first: Face | None = None
        alike: set[str] = set()
        strangers: dict[str, str] = {}
        for text in ranked:
            version = entry.versions[text]
            if (live := version.live) is not None:
                face = Face(live.opened.inputs, live.opened.outputs)
                self._faces[text] = (live.candidate.identity, face)
            identity, seen = self._faces.get(text, ("", None))
            if version.live is None and identity != version.candidate.identity:
                seen = None
            first = first or seen
            if first is not None and seen is not None and (why := apart(first, seen)):
                strangers[text] = why
            else:
                alike.add(text)
        for text, why in strangers.items():
            if self._strangers.get(text) != why:
                facts = {"model": self.name, "version": text, "why": why}
                log.warning("steering.version_left_out", extra={"facts": facts})
        self._strangers = strangers
        return alike

    # ---- Routed

    @property
    def in_flight(self) -> int:
        """See ``Routed``: its versions count them."""
        return 0

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """See ``Routed``."""
        routed = self._route(self._default)
        return {} if routed is None else routed.labels

    @property
    def batches(self) -> bool:
        """See ``Routed``."""
        routed = self._route(self._default)
        return routed is not None and routed.batches

    def submit(self, request: InferRequest, done: Done) -> None:
        """See ``Routed``."""
        version = self._choose(request)
        done = self._watched(request, version, done)
        routed = self._route(version)
        if routed is not None:
            routed.submit(request, done)
        else:
            request.version = version
            self._catalogue.submit_elsewhere(request, done)

    def hold(self, request: InferRequest) -> Held:
        """See ``Routed``."""
        version = self._choose(request)
        if self.given.bandit is not None and not request.id:
            request.id = os.urandom(16).hex()  # whole requests are answered with it, and so rewarded by it
        routed = self._route(version)
        return _Held(self, version, None if routed is None else routed.hold(request))

    def submit_held(self, request: InferRequest, version: str, held: Held | None, done: Done) -> None:
        """Submit to a version that was chosen before."""
        done = self._watched(request, version, done)
        if held is not None:
            held.submit(request, done)
        else:
            request.version = version
            self._catalogue.submit_elsewhere(request, done)

    def _route(self, version: str) -> Routed | None:
        return self._catalogue.routes.get((self.name, version)) if version else None

    # ---- who answers

    def _choose(self, request: InferRequest) -> str:
        given = self.given
        if self._weights and given.split is not None:
            return choose(self._weights, key_of(request, given.split.key), self._random.random)
        if given.bandit is not None and self._versions:
            if "reward_id" in request.parameters:
                self._reward_on_the_way(request)
            return pull(given.bandit, self._versions, self.arms, self._random)
        return self._default

    def _watched(self, request: InferRequest, version: str, done: Done) -> Done:
        self.counts[version] = self.counts.get(version, 0) + 1
        if self.shadowing is not None and version != self.given.hidden:
            done = self.shadowing.watch(request, done)
        return done if self.given.bandit is None else self._remembered(request, version, done)

    # ---- rewards

    def _remembered(self, request: InferRequest, version: str, done: Done) -> Done:
        """Let the answer's id lead to ``version``; a request without an id gets one."""
        if not request.id:
            request.id = os.urandom(16).hex()

        def finish(answer: InferResponse | PitheadError) -> None:
            if isinstance(answer, PitheadError):
                if answer.code in WORTHLESS:
                    self.arms.setdefault(version, Arm()).earn(0)
            else:
                self.arms.setdefault(version, Arm()).requests += 1
                self._unrewarded.pop(answer.id, None)
                self._unrewarded[answer.id] = version
                if len(self._unrewarded) > MOST_UNREWARDED:
                    del self._unrewarded[next(iter(self._unrewarded))]
            done(answer)

        return finish

    def _reward_on_the_way(self, request: InferRequest) -> None:
        """Count a reward that a later request brings, for protocols without a call of its own.

        One that is for nothing is passed over: this request is not to blame.
        """
        reward = request.parameters.get("reward")
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not 0 <= reward <= 1:
            raise PitheadError("serve.bad_request", "parameters.reward: must be a number from 0 to 1")
        if self.earn(str(request.parameters["reward_id"]), reward) is not None:
            self._ledger.begin()

    def earn(self, request_id: str, reward: float) -> str | None:
        """Count a reward, 0 to 1, once; return the version whose answer with this id waited for one."""
        version = self._unrewarded.pop(request_id, None)
        if version is not None:
            self.arms.setdefault(version, Arm()).earn(reward)
        return version

    def give_back(self, request_id: str, version: str, reward: float) -> None:
        """Let a reward that could not be kept be given again."""
        self.arms[version].give_back(reward)
        self._unrewarded.setdefault(request_id, version)

    def document(self) -> dict[str, Any]:
        """Return what it does and has done."""
        said: dict[str, Any] = {"model": self.name, "requests": dict(self.counts)}
        if self._strangers:
            said["left_out"] = dict(self._strangers)
        if self.given.split is not None:
            total = sum(weight for _, weight in self._weights)
            said["split"] = {version: weight / total for version, weight in self._weights}
        if self.shadowing is not None:
            said["shadow"] = {"version": self.shadowing.given.version, **self.shadowing.counts.document()}
        if self.given.bandit is not None:
            said["bandit"] = {
                "policy": self.given.bandit.policy,
                "versions": {
                    version: {
                        "requests": arm.requests,
                        "rewards": arm.rewards,
                        "reward": arm.reward,
                        "mean": arm.mean if arm.rewards else None,
                    }
                    for version, arm in self.arms.items()
                },
            }
        return said


class Steering:
    """All steered models."""

    def __init__(self, models: Mapping[str, Model], catalogue: Catalogue, ledger: Ledger) -> None:
        self._catalogue, self._ledger = catalogue, ledger
        self._given = {name: model for name, model in models.items() if model.steers}
        self._held: dict[str, Steered] = {}

    def __iter__(self) -> Iterator[Steered]:
        return iter(self._held.values())

    def route(self, routes: dict[tuple[str, str], Routed]) -> None:
        """Stand before the default versions."""
        for name, given in self._given.items():
            entry = self._catalogue.entries.get(name)
            if entry is None or entry.unloaded:
                continue
            steered = self._held.get(name)
            if steered is None:
                steered = self._held[name] = Steered(name, given, self._catalogue, self._ledger)
            if steered.update(entry):
                routes[name, ""] = steered
            else:
                routes.pop((name, ""), None)

    def find(self, name: str) -> Steered:
        """Return a steered model; raises ``serve.unknown_model``, ``serve.not_found``."""
        self._catalogue.find(name, "")
        found = self._held.get(name)
        if found is None:
            raise PitheadError("serve.not_found", f"{name} has no split, shadow or bandit")
        return found

    async def reward(self, name: str, request_id: str, reward: float) -> None:
        """Count a reward and see it on the disk; raises ``serve.not_found``, ``serve.state_unwritable``."""
        steered = self.find(name)
        if steered.given.bandit is None:
            raise PitheadError("serve.not_found", f"{name} has no bandit")
        version = steered.earn(request_id, reward)
        if version is None:
            which = f"{request_id[:100]!r} of {name}"
            raise PitheadError("serve.not_found", f"no answer {which} waits for a reward")
        try:
            await self._ledger.keep()
        except PitheadError:
            steered.give_back(request_id, version, reward)
            raise

    def tick(self) -> None:
        """See ``Shadowing.tick``."""
        for steered in self._held.values():
            if steered.shadowing is not None:
                steered.shadowing.tick()

    async def close(self) -> None:
        """Write down what was counted."""
        if any(steered.given.bandit is not None for steered in self._held.values()):
            with suppress(PitheadError):  # the ledger has said it
                await self._ledger.keep()
        self._ledger.close(5.0)


class _Held:
    """A version that was chosen, and stays until it is released."""

    def __init__(self, steered: Steered, version: str, held: Held | None) -> None:
        self._steered, self._version, self._held = steered, version, held

    def submit(self, request: InferRequest, done: Done) -> None:
        """See ``Held``."""
        self._steered.submit_held(request, self._version, self._held, done)

    def release(self) -> None:
        """See ``Held``."""
        if self._held is not None:
            self._held.release()
