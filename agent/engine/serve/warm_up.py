"""Run a new session before anybody waits for it: it becomes fast, and shows what it is like.

Whether rows may be batched is not something that a model says. It is tried:
eight random rows at once must give what they give one by one, and must take
less time than that. A model that fails either is never batched.
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Final

import numpy as np

from agent.engine.serve.runner import Profile
from contract.errors import PitheadError
from contract.manifest import TensorSpec
from inference.made_up import made_up
from inference.session import Array, Session

ROWS: Final = 8
PAYS: Final = 0.85
"""Eight rows at once and one alone are worth it when they take less than this share of nine single ones."""
MAX_RUNS: Final = 30
MIN_RUNS: Final = 3
ENOUGH_S: Final = 0.15
_ATOL: Final = 1e-4
_RTOL: Final = 1e-3


def warm_up(session: Session, specs: Sequence[TensorSpec]) -> Profile:
    """Return what was measured. Never raises: a model that zeros do not suit may still be right."""
    try:
        return _measure(session, specs)
    finally:
        session.reset()


def _measure(session: Session, specs: Sequence[TensorSpec]) -> Profile:
    one = made_up(specs, 1)
    try:
        (alone,) = _times(session, [[one]])
    except PitheadError:
        return Profile(float("inf"))
    run_s = median(alone)
    if not _open_first(specs) or not _open_first(session.outputs):
        return Profile(run_s)
    try:
        # Another shape may cost a new allocation, so both are in what is measured; in turns, and by the
        # calmest of each: what others take of this machine must not decide.
        apart, together = _times(session, [[one], [made_up(specs, ROWS), one]])
        if min(together) > PAYS * (ROWS + 1) * min(*apart, *alone) or not _independent(session, specs):
            return Profile(run_s)
    except PitheadError:
        return Profile(run_s)
    more_s = (median(together) - 2 * median(apart)) / (ROWS - 1)
    return Profile(run_s, row_s=min(run_s, max(0.0, more_s)), batches=True)


def _open_first(specs: Sequence[TensorSpec]) -> bool:
    return all(spec.shape[:1] == (-1,) for spec in specs)


def _times(session: Session, plans: Sequence[Sequence[dict[str, Array]]]) -> list[list[float]]:
    """Return the times of each plan, a plan being inputs one after the other."""
    times: list[list[float]] = [[] for _ in plans]
    began = time.perf_counter()
    while len(times[0]) < MAX_RUNS and (len(times[0]) < MIN_RUNS or time.perf_counter() - began < ENOUGH_S):
        for plan, seen in zip(plans, times, strict=True):
            start = time.perf_counter()
            for feed in plan:
                session.run(feed)
            seen.append(time.perf_counter() - start)
    return times


def _independent(session: Session, specs: Sequence[TensorSpec]) -> bool:
    session.reset()
    feed = made_up(specs, ROWS, random=True)
    together = session.run(feed)
    for i in range(ROWS):
        alone = session.run({name: array[i : i + 1] for name, array in feed.items()})
        for name, array in together.items():
            if len(array) != ROWS or not _close(array[i : i + 1], alone[name]):
                return False
    return True


def _close(a: Array, b: Array) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype.kind == "f":
        return bool(np.allclose(a, b, rtol=_RTOL, atol=_ATOL, equal_nan=True))
    if a.dtype.kind in "iu" and a.dtype.itemsize == 1:
        # Quantised: kernels may differ by a step.
        return bool((np.abs(a.astype(np.int32) - b.astype(np.int32)) <= 1).all())
    return bool((a == b).all())
