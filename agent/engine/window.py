"""Cut a stream of rows into windows: the last ``window`` rows, each ``stride`` rows."""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from contract.manifest import Channel

Rows = NDArray[np.float64]
"""(rows, channels) as the source gave them; NaN where a channel is missing."""


class Bounds:
    """What a source may deliver on each channel."""

    def __init__(self, channels: tuple[Channel, ...]) -> None:
        self._low = np.array([-np.inf if c.minimum is None else c.minimum for c in channels])
        self._high = np.array([np.inf if c.maximum is None else c.maximum for c in channels])

    def usable(self, rows: Rows) -> NDArray[np.bool_]:
        """Return for each row whether all its channels are finite and within their range."""
        good = np.isfinite(rows) & (rows >= self._low) & (rows <= self._high)
        return np.asarray(good.all(axis=1), np.bool_)


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows that one batch of rows completes."""

    rows: Rows
    """The rows that the windows need: those kept from before, then the batch."""
    starts: NDArray[np.intp]
    """Index into ``rows`` of each window's first row."""
    ends: NDArray[np.intp]
    """Index into the *batch* of each window's last row."""
    ordinals: NDArray[np.int64]
    """Number of each window; a hole is a window with an unusable row, or a break in the stream."""

    def cut(self, values: NDArray[np.float32], window: int) -> NDArray[np.float32]:
        """Return (windows, window, channels) of ``values``, which has one row for each of ``rows``."""
        if window == 1:
            return values[self.starts][:, None, :]
        if not len(self.starts):
            return np.empty((0, window, values.shape[1]), np.float32)
        views = sliding_window_view(values, window, axis=0)[self.starts]
        return np.ascontiguousarray(views.transpose(0, 2, 1))


class Windower:
    """Keeps the rows that later windows still need.

    A window with a row that is not usable is left out; the grid of windows
    stays where it is, so that one bad row shifts nothing.
    """

    def __init__(self, window: int, stride: int, channels: int) -> None:
        self.window, self.stride, self.channels = window, stride, channels
        self._tail: Rows = np.empty((0, channels))
        self._tail_usable: NDArray[np.bool_] = np.empty(0, np.bool_)
        self._until_next = window
        self._ordinal = 0

    @property
    def geometry(self) -> tuple[int, int, int]:
        """What two windowers must share for one to go on where the other stopped."""
        return self.window, self.stride, self.channels

    def push(self, rows: Rows, usable: NDArray[np.bool_], *, continues: bool = True) -> Windows:
        """Return the windows that ``rows`` completes.

        ``continues`` False says that rows are missing before this batch, so
        no window may reach back over the gap.
        """
        if not continues:
            self.reset()
        kept = len(self._tail)
        block = np.concatenate([self._tail, rows]) if kept else rows
        good = np.concatenate([self._tail_usable, usable]) if kept else usable
        ends = np.arange(self._until_next - 1, len(rows), self.stride, dtype=np.intp)
        ordinals = self._ordinal + np.arange(len(ends), dtype=np.int64)
        if len(ends):
            self._until_next = int(ends[-1]) + 1 + self.stride
            self._ordinal += len(ends)
        self._until_next -= len(rows)
        starts = ends + (kept - self.window + 1)
        if len(ends) and not good.all():
            bad_before = np.concatenate([[0], np.cumsum(~good)])
            whole = bad_before[starts + self.window] == bad_before[starts]
            starts, ends, ordinals = starts[whole], ends[whole], ordinals[whole]
        keep = min(self.window - 1, len(block))
        self._tail = block[len(block) - keep :].copy()
        self._tail_usable = good[len(good) - keep :].copy()
        return Windows(block, starts, ends, ordinals)

    def reset(self) -> None:
        """Forget what came before; the next window needs ``window`` new rows."""
        self._tail = np.empty((0, self.channels))
        self._tail_usable = np.empty(0, np.bool_)
        self._until_next = self.window
        self._ordinal += 1
