"""Cut a stream of rows into windows: the last ``window`` rows, each ``stride`` rows."""

from typing import Any, Final

import numpy as np
from msgspec import Struct
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from contract.manifest import Channel
from inference.arithmetic import Abreast

Rows = NDArray[np.float64]
"""(rows, channels) as the source gave them; NaN where a channel is missing."""
Values = NDArray[Any]
COUNTED: Final = 2048
"""Numbers that are kept ready, to count rows with."""
JOINED: Final = 4096
"""Values that are copied sooner than taken in two parts."""


class Bounds:
    """What a source may deliver on each channel."""

    def __init__(self, channels: tuple[Channel, ...]) -> None:
        # What is between the largest finite numbers is finite.
        most = np.finfo(np.float64).max
        low = [-most if c.minimum is None else c.minimum for c in channels]
        high = [most if c.maximum is None else c.maximum for c in channels]
        self._limits = Abreast(low, high)
        self._all = np.ones(0, np.bool_)

    def usable(self, rows: Rows) -> NDArray[np.bool_]:
        """Return for each row whether all its channels are finite and within their range; read it only."""
        abreast, (low, high) = self._limits.beside(rows)
        good = np.greater_equal(abreast, low)
        good &= abreast <= high
        # Nearly always all are, which is found out much faster than which.
        if np.count_nonzero(good) != good.size:
            some: NDArray[np.bool_] = np.logical_and.reduce(good.reshape(rows.shape), axis=1)
            return some
        if len(self._all) != len(rows):
            self._all = np.ones(len(rows), np.bool_)
            self._all.setflags(write=False)
        return self._all


class Windows(Struct, frozen=True):
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
    unusable: int = 0
    """Rows of the batch that are not usable."""

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
        if n == 1:
            start = int(self.starts[0])
            return values[None, start : start + window]
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
        self._tail_bad: NDArray[np.bool_] | None = None
        self._tail_muted: NDArray[np.bool_] | None = None
        """Which rows of the tail are; None where none is."""
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
        kept, n, stride = len(self._tail), len(rows), self.stride
        quiet = _flagged(kept, n, self._tail_muted, muted)
        unusable = n - int(np.count_nonzero(usable))
        bad = _flagged(kept, n, self._tail_bad, ~usable if unusable else None)
        if quiet is not None:
            bad = quiet if bad is None else bad | quiet
        if kept + n > len(self._count):
            self._count = np.arange(2 * (kept + n))
        found = max(0, (n - self._until_next) // stride + 1)
        first, count = self._until_next - 1, self._count
        ends = count[first : first + found * stride : stride]
        starts = ends
        if self.window > 1 and found:
            first += kept - self.window + 1
            starts = count[first : first + found * stride : stride]
        ordinals = np.arange(self._ordinal, self._ordinal + found)
        self._ordinal += found
        self._until_next += found * stride - n
        whole_grid, left_out = True, 0
        if found and bad is not None:
            whole = ~_touched(starts, self.window, bad)
            whole_grid = bool(whole.all())
            left_out = 0 if quiet is None else int(_touched(starts, self.window, quiet).sum())
            starts, ends, ordinals = starts[whole], ends[whole], ordinals[whole]
        parts, every = self._parts(rows, bad, quiet), stride if whole_grid else None
        return Windows(parts, starts, ends, ordinals, every, left_out, unusable)

    def _parts(
        self, rows: Rows, bad: NDArray[np.bool_] | None, quiet: NDArray[np.bool_] | None
    ) -> tuple[Rows, ...]:
        """Return the rows at hand, and keep those that later windows need."""
        kept, n = len(self._tail), len(rows)
        parts = (self._tail, rows) if kept else (rows,)
        if self.window == 1:
            return parts
        keep = min(self.window - 1, kept + n)
        if kept and (kept + n) * self.channels <= JOINED:
            parts = (np.concatenate(parts),)
            self._tail = parts[0][kept + n - keep :]
        else:
            some = rows[max(0, n - keep) :]
            self._tail = np.concatenate([self._tail[kept + len(some) - keep :], some])
        self._tail_bad = None if bad is None else bad[kept + n - keep :]
        self._tail_muted = None if quiet is None else quiet[kept + n - keep :]
        return parts

    def reset(self) -> None:
        """Forget what came before; the next window needs ``window`` new rows."""
        self._tail = np.empty((0, self.channels))
        self._tail_bad = self._tail_muted = None
        self._until_next = self.window
        self._ordinal += 1


def _flagged(
    kept: int, n: int, before: NDArray[np.bool_] | None, now: NDArray[np.bool_] | None
) -> NDArray[np.bool_] | None:
    """Return which of the rows are flagged, those kept ``before`` and those of ``now``; None: none."""
    if before is None and (now is None or not now.any()):
        return None
    old = np.zeros(kept, np.bool_) if before is None else before
    new = np.zeros(n, np.bool_) if now is None else now
    found = np.concatenate([old, new])
    return found if found.any() else None


def _touched(starts: NDArray[np.intp], window: int, rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which windows hold at least one of ``rows``."""
    before = np.concatenate([[0], np.cumsum(rows)])
    found: NDArray[np.bool_] = before[starts + window] != before[starts]
    return found
