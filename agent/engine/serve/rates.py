"""How often a client, and all together a model, may be asked: so many requests a second, and some at once.

The generic cell rate algorithm (ITU-T I.371): a limit is one moment, the one
at which all that was taken is paid off. A request that is refused costs
nothing, and is told when the next one would be taken. What is limited are
requests as clients make them: a batch counts once, an answer that was kept
counts as any, and what a pipeline asks of its models does not count.
"""

import math
import time
from collections.abc import Mapping
from typing import Final

from agent.core.serve_models import Limited
from contract.errors import PitheadError

EACH: Final = "*"
"""The table of clients that have none of their own: each has a limit of its own, of that size."""


class Bucket:
    """One limit. Times are ns of the monotonic clock."""

    __slots__ = ("_gap", "_paid", "_slack", "given")

    def __init__(self, given: Limited) -> None:
        assert given.rate is not None
        self.given = given
        burst = given.burst or max(1, math.ceil(given.rate))
        self._gap = 1e9 / given.rate
        self._slack = self._gap * (burst - 1)
        self._paid = -math.inf

    def wait(self, now: float) -> float:
        """Return the ns until a request would be taken; 0 or less: it would be now."""
        return self._paid - self._slack - now

    def take(self, now: float) -> None:
        """Count a request that is taken."""
        self._paid = max(self._paid, now) + self._gap


class Rates:
    """All limits. On the loop's thread only."""

    def __init__(self, models: Mapping[str, Limited], clients: Mapping[str, Limited]) -> None:
        self._clients: dict[str, Bucket | None] = {}
        self._models: dict[str, Bucket] = {}
        self._each: Limited | None = None
        self.refused: dict[tuple[str, str], int] = {}
        """Requests that were refused, by (``client`` or ``model``, name)."""
        self.become(models, clients)

    @classmethod
    def of(cls, models: Mapping[str, Limited], clients: Mapping[str, Limited]) -> "Rates | None":
        """Return the limits; None where there are none, so that nobody has to look."""
        limited = any(given.rate is not None for given in (*models.values(), *clients.values()))
        return cls(models, clients) if limited else None

    def become(self, models: Mapping[str, Limited], clients: Mapping[str, Limited]) -> None:
        """Have these limits; what was taken under one that stays the same still counts."""
        held = self._models
        self._models = {n: _bucket(g, held.get(n)) for n, g in models.items() if g.rate is not None}
        before = self._clients
        self._clients = {
            name: None if given.rate is None else _bucket(given, before.get(name))
            for name, given in clients.items()
            if name != EACH
        }
        self._each = clients.get(EACH)
        for name, bucket in before.items():
            if name not in clients and bucket is not None and bucket.given == self._each:
                self._clients[name] = bucket

    def admit(self, client: str, model: str) -> None:
        """Count a request, or raise ``serve.rate_limited``, which counts for neither limit."""
        now = time.monotonic_ns()
        of_client, of_model = self._client(client), self._models.get(model)
        if of_client is not None and (wait := of_client.wait(now)) > 0:
            raise self._refusal("client", client, of_client, wait)
        if of_model is not None:
            if (wait := of_model.wait(now)) > 0:
                raise self._refusal("model", model, of_model, wait)
            of_model.take(now)
        if of_client is not None:
            of_client.take(now)

    def _client(self, name: str) -> Bucket | None:
        if name in self._clients:
            return self._clients[name]
        each = self._each
        made = None if each is None or each.rate is None else Bucket(each)
        self._clients[name] = made
        return made

    def _refusal(self, kind: str, name: str, bucket: Bucket, wait_ns: float) -> PitheadError:
        self.refused[kind, name] = self.refused.get((kind, name), 0) + 1
        wait, may = wait_ns * 1e-9, "may ask" if kind == "client" else "may be asked"
        return PitheadError(
            "serve.rate_limited",
            f"{kind} {name!r} {may} {bucket.given.rate:g} times a second; again in {wait:.3f} s",
            retry_after_s=wait,
        )


def _bucket(given: Limited, before: Bucket | None) -> Bucket:
    return before if before is not None and before.given == given else Bucket(given)
