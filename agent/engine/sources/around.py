"""What stands between a source and its lane: units converted, and foreign code held to its word."""

from dataclasses import replace
from typing import Any

import numpy as np

from agent.engine.sources.base import Batch, Source
from agent.engine.sources.tags import Conversion
from contract.errors import PitheadError


class Converted:
    """A source whose values are in the units of the manifest."""

    def __init__(self, source: Source, conversion: Conversion) -> None:
        self._source, self._conversion = source, conversion
        self.wait_s, self.backlog, self.close = source.wait_s, source.backlog, source.close

    def poll(self, limit: int) -> Batch | None:
        """See ``Source``."""
        batch = self._source.poll(limit)
        return None if batch is None else replace(batch, values=self._conversion.apply(batch.values))


class Checked:
    """A source of a third party. What it gives that no lane can use is ``source.failed``."""

    def __init__(self, kind: str, source: Any, width: int) -> None:
        self._kind, self._source, self._width = kind, source, width
        for name in ("poll", "wait_s", "backlog", "close"):
            if not callable(getattr(source, name, None)):
                raise PitheadError("source.plugin_broken", f"source {kind!r}: what it opened has no {name}")

    def poll(self, limit: int) -> Batch | None:
        """See ``Source``."""
        batch = self._source.poll(limit)
        if batch is None or self._sound(batch):
            return batch  # type: ignore[no-any-return]
        raise PitheadError(
            "source.failed",
            f"source {self._kind!r} gave no Batch of float64 values (rows, {self._width}) "
            "and int64 times (rows)",
        )

    def wait_s(self) -> float:
        """See ``Source``; at least a millisecond, so that no lane spins."""
        return max(0.001, float(self._source.wait_s()))

    def backlog(self) -> int:
        """See ``Source``."""
        return int(self._source.backlog())

    def close(self) -> None:
        """See ``Source``."""
        self._source.close()

    def _sound(self, batch: Any) -> bool:
        if not isinstance(batch, Batch):
            return False
        for array, kind in ((batch.values, np.float64), (batch.t, np.int64)):
            if not isinstance(array, np.ndarray) or array.dtype != kind:
                return False
        return batch.values.shape == (len(batch.t), self._width)
