"""What stands between a source and its lane: units converted, and foreign code held to its word."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from agent.engine.sources.base import TICK_S, Batch, Source
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
            f"source {self._kind!r} gave no Batch of float64 values (rows, {self._width}), "
            "int64 times (rows), and a number of lost samples",
        )

    def wait_s(self) -> float:
        """See ``Source``; at least a millisecond, so that no lane spins."""
        try:
            wait_s = float(self._source.wait_s())
        except Exception:  # noqa: BLE001 - a poll will say what is wrong, if anything is
            return TICK_S
        return TICK_S if math.isnan(wait_s) else max(0.001, wait_s)

    def backlog(self) -> int:
        """See ``Source``."""
        try:
            return max(0, int(self._source.backlog()))
        except Exception:  # noqa: BLE001 - nobody but the status asks
            return 0

    def close(self) -> None:
        """See ``Source``."""
        self._source.close()

    def _sound(self, batch: Any) -> bool:
        if not isinstance(batch, Batch) or not isinstance(batch.lost, int) or batch.lost < 0:
            return False
        for array, kind in ((batch.values, np.float64), (batch.t, np.int64)):
            if not isinstance(array, np.ndarray) or array.dtype != kind:
                return False
        return batch.values.shape == (len(batch.t), self._width)
