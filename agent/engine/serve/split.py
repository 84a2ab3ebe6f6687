"""Share requests out over versions of a model, by weight. Pure.

A request that has a key goes where its key goes, each time: by rendezvous
hashing with weights (Thaler and Ravishankar 1998; the weights are those of
Schindelhauer and Schomaker 2005), so that a changed weight or a version that
comes or goes moves no more keys than it must.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Annotated, Final, TypeAlias

from msgspec import Meta, Struct

from agent.engine.serve.requests import InferRequest

Version = Annotated[str, Meta(min_length=1, max_length=200)]
Weight = Annotated[float, Meta(ge=0, le=1e9)]
Random: TypeAlias = Callable[[], float]
"""A number in [0, 1)."""

_SPAN: Final = 2.0**64


class Split(Struct, frozen=True, forbid_unknown_fields=True):
    """``[models.<name>.split]``."""

    weights: Annotated[dict[Version, Weight], Meta(min_length=1)]
    """By version; any scale."""
    key: str = "split_key"
    """The request's parameter whose value stays with one version; without it the request's id is taken."""


def key_of(request: InferRequest, parameter: str) -> str:
    """Return what a request is to be known by; empty where it says nothing."""
    given = request.parameters.get(parameter)
    return request.id if given is None else str(given)


def choose(weights: Sequence[tuple[str, float]], key: str, random: Random) -> str:
    """Return a version: that of the key, or any where the key is empty. Weights must not all be 0."""
    if key:
        return max(weights, key=lambda pair: _score(pair[1], pair[0], key))[0]
    at = random() * sum(weight for _, weight in weights)
    for version, weight in weights:
        at -= weight
        if at < 0:
            return version
    return next(version for version, weight in reversed(weights) if weight)


def usable(weights: Mapping[str, float], there: Callable[[str], bool]) -> list[tuple[str, float]]:
    """Return the weights of versions that are there and get anything."""
    return [(version, weight) for version, weight in weights.items() if weight > 0 and there(version)]


def _score(weight: float, version: str, key: str) -> float:
    digest = blake2b(f"{version}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return -weight / math.log((int.from_bytes(digest, "little") + 0.5) / _SPAN)
