"""Cut a stream of rows into windows: the last ``window`` rows, each ``stride`` rows."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from contract.manifest import Channel

Rows = NDArray[np.float64]
"""(rows, channels) as the source gave them; NaN where a channel is missing."""
Values = NDArray[Any]
COUNTED: Final = 1024
"""Numbers that are kept ready, to count windows with."""
SIDE_BY_SIDE: Final = 64
"""Rows narrower than this many channels are compared several at once, which numpy does faster."""


class Bounds:
    """What a source may deliver on each channel."""

    def __init__(self, channels: tuple[Channel, ...]) -> None:
        # What is between the largest finite numbers is finite.
        most = np.finfo(np.float64).max
        low = [-most if c.minimum is None else c.minimum for c in channels]
        high = [most if c.maximum is None else c.maximum for c in channels]
        self._limits = np.array([low, high], np.float64)
        self._width = len(channels)
        self._side_by_side = max(1, SIDE_BY_SIDE // len(channels))
        self._many = np.tile(self._limits, self._side_by_side)

    def usable(self, rows: Rows) -> NDArray[np.bool_]:
        """Return for each row whether all its channels are finite and within their range."""
        n, k = len(rows), self._side_by_side
        if k > 1 and n and n % k == 0:
            low, high = self._many
            good = _between(rows.reshape(n // k, -1), low, high).reshape(n, self._width)
        else:
            low, high = self._limits
            good = _between(rows, low, high)
        # Nearly always all are, which is found out much faster than which.
        return np.ones(n, np.bool_) if good.all() else np.logical_and.reduce(good, axis=1)


def _between(rows: Rows, low: Rows, high: Rows) -> NDArray[np.bool_]:
    good = np.greater_equal(rows, low)
    good &= rows <= high
    return good


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows that one batch of rows completes."""

    parts: tuple[Rows, ...]
    """The rows that the windows need: those kept from before, then the batch."""
    starts: NDArray[np.intp]
    """Index into ``rows`` of each window's first row."""
    ends: NDArray[np.intp]
    """Index into the *batch* of each window's last row."""
    ordinals: NDArray[np.int64]
    """Number of each window; a hole is a window with an unusable row, or a break in the stream."""
    stride: int | None = None
    """Rows from one window to the next, where all are there; None where some were left out."""
    muted: int = 0
    """Windows that were left out because of a row that is muted."""

    @property
    def rows(self) -> Rows:
        """All ``parts`` in one, which may cost a copy."""
        return self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)

    def cut(self, values: Values, window: int) -> Values:
        """Return (windows, window, channels) of ``values``, which has one row for each of ``rows``.

        A view wherever no window was left out: read it only.
        """
        n, width = len(self.starts), values.shape[1]
        if not n:
            return np.empty((0, window, width), values.dtype)
        if self.stride is not None and values.flags.c_contiguous:
            row, item = values.strides
            return np.ndarray(
                (n, window, width),
                values.dtype,
                values,
                int(self.starts[0]) * row,
                (self.stride * row, row, item),
            )
        if window == 1:
            return values[self.starts][:, None, :]
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
        self._tail_muted: NDArray[np.bool_] | None = None
        """None where none is."""
        self._until_next = window
        self._ordinal = 0
        self._count = np.arange(COUNTED)

    @property
    def geometry(self) -> tuple[int, int, int]:
        """What two windowers must share for one to go on where the other stopped."""
        return self.window, self.stride, self.channels

    def push(
        self,
        rows: Rows,
        usable: NDArray[np.bool_],
        *,
        continues: bool = True,
        muted: NDArray[np.bool_] | None = None,
    ) -> Windows:
        """Return the windows that ``rows`` completes.

        ``continues`` False says that rows are missing before this batch, so
        no window may reach back over the gap. Rows that are ``muted`` are not
        usable, and their windows are counted.
        """
        if not continues:
            self.reset()
        if muted is not None and muted.any():
            usable = usable & ~muted
        kept, n, stride = len(self._tail), len(rows), self.stride
        quiet = self._quiet(kept, n, muted)
        good = np.concatenate([self._tail_usable, usable]) if kept else usable
        found = max(0, (n - self._until_next) // stride + 1)
        if found > len(self._count):
            self._count = np.arange(2 * found)
        count = self._count[:found]
        ends = (self._until_next - 1) + (count * stride if stride > 1 else count)
        ordinals = count + self._ordinal
        self._ordinal += found
        self._until_next += found * stride - n
        starts = ends + (kept - self.window + 1) if self.window > 1 else ends
        whole_grid, left_out = True, 0
        if found and not good.all():
            whole = ~_touched(starts, self.window, ~good)
            whole_grid = bool(whole.all())
            left_out = 0 if quiet is None else int(_touched(starts, self.window, quiet).sum())
            starts, ends, ordinals = starts[whole], ends[whole], ordinals[whole]
        parts = (self._tail, rows) if kept else (rows,)
        if self.window > 1:
            keep = min(self.window - 1, kept + n)
            some = rows[max(0, n - keep) :]
            self._tail = np.concatenate([self._tail[kept + len(some) - keep :], some])
            self._tail_usable = good[len(good) - keep :].copy()
            self._tail_muted = None if quiet is None else quiet[len(good) - keep :].copy()
        return Windows(parts, starts, ends, ordinals, stride if whole_grid else None, left_out)

    def _quiet(self, kept: int, n: int, muted: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """Return which of the rows at hand are muted, None where none is."""
        if muted is None and self._tail_muted is None:
            return None
        before = np.zeros(kept, np.bool_) if self._tail_muted is None else self._tail_muted
        now = np.zeros(n, np.bool_) if muted is None else muted
        return np.concatenate([before, now]) if before.any() or now.any() else None

    def reset(self) -> None:
        """Forget what came before; the next window needs ``window`` new rows."""
        self._tail = np.empty((0, self.channels))
        self._tail_usable = np.empty(0, np.bool_)
        self._tail_muted = None
        self._until_next = self.window
        self._ordinal += 1


def _touched(starts: NDArray[np.intp], window: int, rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which windows hold at least one of ``rows``."""
    before = np.concatenate([[0], np.cumsum(rows)])
    found: NDArray[np.bool_] = before[starts + window] != before[starts]
    return found
