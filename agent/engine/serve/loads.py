"""Load a version where nobody waits: open it, warm it up, and find out what it takes."""

import logging
from pathlib import Path
from typing import NamedTuple

from agent.engine.serve.cache import Cache, why_not
from agent.engine.serve.opening import Opened
from agent.engine.serve.repository import Candidate
from agent.engine.serve.runner import Profile
from agent.engine.serve.warm_up import warm_up

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What is ready to serve."""

    opened: Opened
    profile: Profile
    memory_bytes: int
    """By which this process has grown, and no less than the model's file."""
    cache: Cache | None


def load(candidate: Candidate, cache_bytes: int) -> Loaded:
    """Raise ``PitheadError`` for what cannot be loaded."""
    before = _rss()
    opened = candidate.open()
    profile = warm_up(opened.session, opened.inputs)
    cache = Cache(cache_bytes) if cache_bytes else None
    if cache is not None and (why := why_not(opened.session, opened.inputs)):
        log.warning("model.answers_not_kept", extra={"facts": {"model": candidate.name, "why": why}})
        cache = None
    return Loaded(opened, profile, max(opened.bytes, _rss() - before), cache)


def _rss() -> int:
    pages = Path("/proc/self/statm").read_bytes().split()[1]
    return int(pages) * 4096
