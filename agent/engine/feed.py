"""A lane's hold on its source: opens it, and opens it again when it fails."""

import logging
from dataclasses import replace
from typing import Final

from agent.engine.clock import Clock
from agent.engine.sources import open_source
from agent.engine.sources.base import Batch, Source, Table
from agent.engine.sources.marks import Marks
from contract.errors import PitheadError
from contract.features import Statistics
from contract.manifest import Pipeline

log = logging.getLogger(__name__)

FIRST_RETRY_S: Final = 0.5
LAST_RETRY_S: Final = 30.0
FRAMED: Final = ("images",)
"""Sources whose rows come in frames of one window."""


def needs(pipeline: Pipeline, table: Table) -> tuple[object, ...]:
    """What of a pipeline the source that ``table`` describes depends on; a rate of its own goes first."""
    rate = pipeline.sample_rate_hz if table.get("rate_hz") is None else None
    frame = (pipeline.window, pipeline.stride) if table.get("kind") in FRAMED else None
    return tuple((c.name, c.unit) for c in pipeline.channels), rate, frame


def _check_rate(table: Table, pipeline: Pipeline) -> None:
    """Features in Hz are wrong at any other rate than the manifest's, and a graph may be."""
    rate, made_for = table.get("rate_hz"), pipeline.sample_rate_hz
    if made_for is None or not isinstance(rate, int | float) or rate == made_for:
        return
    if any(not isinstance(f, Statistics) for f in pipeline.features):
        what = "bands in Hz are" if pipeline.graph is None else "graph is"
        raise PitheadError(
            "config.invalid",
            f"lanes.source.rate_hz is {rate}; the model's {what} for {made_for}",
            key="rate_hz",
        )


class Feed:
    """Used by the lane's thread alone."""

    def __init__(self, lane: str, clock: Clock) -> None:
        self._lane, self._clock = lane, clock
        self._table: Table | None = None
        self._pipeline: Pipeline | None = None
        self._marks: Marks | None = None
        self._key: tuple[object, ...] | None = None
        self._source: Source | None = None
        self._retry_s = FIRST_RETRY_S
        self._retry_at: int | None = 0
        self._fresh = True
        self.problem: PitheadError | None = None
        """Why there are no rows, until there are some again."""

    def poll(self, table: Table, pipeline: Pipeline, limit: int, marks: Marks | None = None) -> Batch | None:
        """Return rows of the source that ``table`` describes, for ``pipeline``'s channels, and ``marks``.

        Opens it first where that is needed; a failure is kept in ``problem``.
        """
        # All are frozen, and nearly always the very ones of the poll before.
        if table is not self._table or pipeline is not self._pipeline or marks is not self._marks:
            self._become(table, pipeline, marks)
        try:
            if self._source is None:
                _check_rate(table, pipeline)
                if self._retry_at is None or self._clock.mono() < self._retry_at:
                    return None
                self._source = open_source(table, pipeline, self._clock, marks)
                self._fresh = True
            batch = self._source.poll(limit)
        except PitheadError as error:
            self._failed(error)
            return None
        except (Exception, SystemExit) as error:
            log.exception("source.broke", extra={"facts": {"lane": self._lane}})
            self._failed(PitheadError("source.failed", f"{type(error).__name__}: {error}"))
            return None
        if batch is None:
            return None
        if self.problem is not None:
            log.info("source.recovered", extra={"facts": {"lane": self._lane}})
        self.problem, self._retry_s = None, FIRST_RETRY_S
        if self._fresh:
            self._fresh = False
            batch = replace(batch, continues=False)
        return batch

    def _become(self, table: Table, pipeline: Pipeline, marks: Marks | None) -> None:
        self._table, self._pipeline, self._marks = table, pipeline, marks
        key = table, needs(pipeline, table), marks
        if key != self._key:
            self.close()
            self._key, self._retry_at, self._retry_s, self.problem = key, 0, FIRST_RETRY_S, None

    def wait_s(self) -> float:
        """Return how long it pays to wait before the next ``poll``."""
        if self._source is not None:
            return self._source.wait_s()
        if self._retry_at is None:
            return LAST_RETRY_S
        return max(0.0, (self._retry_at - self._clock.mono()) / 1e6)

    def backlog(self) -> int:
        """Return how many rows wait to be taken."""
        return 0 if self._source is None else self._source.backlog()

    def close(self) -> None:
        """Give the source back; one that complains is let go all the same."""
        source, self._source = self._source, None
        if source is None:
            return
        try:
            source.close()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a third party's source may raise anything
            facts = {"lane": self._lane, "detail": f"{type(error).__name__}: {error}"}
            log.warning("source.not_closed", extra={"facts": facts})

    def _failed(self, error: PitheadError) -> None:
        self.close()
        if self.problem is None or str(self.problem) != str(error):
            log.warning(
                "source.failed",
                extra={"facts": {"lane": self._lane, "code": error.code, "detail": error.detail}},
            )
        self.problem = error
        if not error.retryable:
            self._retry_at = None
            return
        self._retry_at = self._clock.mono() + round(self._retry_s * 1e6)
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
