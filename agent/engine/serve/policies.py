"""What the configuration of a model comes to: which versions are served, and what its runs may take. Pure."""

from collections.abc import Sequence
from typing import Any, Final

from msgspec.structs import replace

from agent.engine.serve.configuration import Configuration, Model
from agent.engine.serve.repository import newest
from agent.engine.serve.runner import Policy

NOTHING: Final = Model()


def said_of(configuration: Configuration, name: str) -> Model:
    """Return what is said of a model."""
    return configuration.models.get(name, NOTHING)


def cache_bytes(said: Model) -> int:
    """Return what may be kept of answers, in bytes."""
    return round(said.cache_mb * 1024 * 1024)


def runs(said: Model, base: Policy) -> Policy:
    """Return ``base``, which holds for all models, with what is said of one."""
    changes: dict[str, Any] = {
        "max_batch": said.max_batch,
        "preferred": said.preferred_batches,
        "max_delay_us": None if said.max_delay_ms is None else round(said.max_delay_ms * 1000),
        "objective_s": None if said.objective_ms is None else said.objective_ms / 1000,
        "max_queue": said.max_queue,
        "max_wait_s": None if said.max_wait_ms is None else said.max_wait_ms / 1000,
        "timeout_s": said.timeout_s,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(base, **given) if given else base


def specific(said: Model) -> tuple[str, ...] | None:
    """Return the versions that are named as the only ones; None where they are chosen by their age."""
    return tuple(map(str, said.versions)) if isinstance(said.versions, tuple) else None


def served(said: Model, most: int, offered: Sequence[str]) -> list[str]:
    """Return which of the versions that there are the policy serves, the newest first.

    ``most`` is how many of the newest are served of a model of which nothing is said; 0: all.
    """
    ranked = newest(offered)
    only = specific(said)
    if only is not None:
        return [version for version in ranked if version in only]
    if said.versions == "all":
        return ranked
    count = said.versions if isinstance(said.versions, int) else most
    return ranked[: count or None]


def document(said: Model, most: int) -> dict[str, Any]:
    """Return the version policy in the form of Triton's ``ModelConfig``, whose versions are numbers."""
    only = specific(said)
    if only is not None:
        return {"specific": {"versions": [int(text) for text in only if text.isdecimal()]}}
    count = said.versions if isinstance(said.versions, int) else most
    if said.versions == "all" or not count:
        return {"all": {}}
    return {"latest": {"num_versions": count}}


_FROM_THE_START: Final = ("split", "shadow", "bandit")
_NOT_A_SESSIONS: Final = ("rate", "burst", "versions")


def anew(before: Model, after: Model) -> bool:
    """Whether sessions are to be opened again for what is said of their model now."""
    same = dict.fromkeys(_NOT_A_SESSIONS)
    return replace(before, **same) != replace(after, **same)


def carried(before: Configuration, after: Configuration) -> tuple[Configuration, list[str]]:
    """Return what of ``after`` may hold where ``before`` held at the start, and the tables that may not."""
    kept: dict[str, Model] = {}
    late = ["pipelines"] if before.pipelines != after.pipelines else []
    for name in dict.fromkeys((*before.models, *after.models)):
        old, new = said_of(before, name), said_of(after, name)
        first = {field: getattr(old, field) for field in _FROM_THE_START}
        late += [f"models.{name}.{field}" for field, value in first.items() if getattr(new, field) != value]
        kept[name] = replace(new, **first)
    return replace(after, models=kept, pipelines=before.pipelines), late
