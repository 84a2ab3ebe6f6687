"""Fit normalisation and threshold to one device, within the ranges that the manifest signs.

A calibration meets the device as it is, perhaps while an update installs or
a backup runs. So nothing in a fit follows the largest values: the middle and
the spread are medians, and the threshold a quantile of the scores below the
top, as far below as the manifest says.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.engine.window import Rows, Windows
from agent.ports import FitResult
from contract.errors import PitheadError
from contract.manifest import Fit
from inference.arithmetic import normalise
from inference.scoring import Scorer

TO_DEVIATION: Final = 1.4826
"""Standard deviation over median absolute deviation, of a normal distribution."""
ENOUGH: Final = 0.5
"""Share of the calibration's windows that must get a score."""


class Calibration:
    """Collects windows of the live source until there are enough for a fit."""

    def __init__(self, fit: Fit, window: int) -> None:
        self.fit = fit
        self._window = window
        self._parts: list[Rows] = []
        self._count = 0

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return min(1.0, self._count / self.fit.samples)

    @property
    def complete(self) -> bool:
        """Whether ``result`` may be asked for."""
        return self._count >= self.fit.samples

    def add(self, windows: Windows) -> None:
        """Take the windows that are still needed."""
        needed = self.fit.samples - self._count
        if needed <= 0 or not len(windows.starts):
            return
        index = windows.starts[:needed, None] + np.arange(self._window)
        self._parts.append(windows.rows[index])
        self._count += min(needed, len(windows.starts))

    def result(self, scorer: Scorer, now: int) -> FitResult:
        """Return the fit; leaves ``scorer`` with the fitted normalisation.

        The mean is the median of all samples in the windows, the scale their
        median absolute deviation in terms of a standard deviation, the
        threshold ``margin`` times the quantile of the scores that the model
        then gives; each is clamped into its signed range. Raises
        ``inference.not_finite`` when the model scores too few of the windows.
        """
        raw: Rows = np.concatenate(self._parts)
        middle = np.median(raw, axis=(0, 1))
        spread = TO_DEVIATION * np.median(np.abs(raw - middle), axis=(0, 1))
        mean, scale = _clamp(middle, self.fit.mean_range), _clamp(spread, self.fit.scale_range)
        scorer.normalise_by(tuple(mean.tolist()), tuple(scale.tolist()))
        scored = scorer.run_cut(normalise(raw, mean, scale, scorer.pipeline.clip))
        values = scored.scores[scored.good]
        if len(values) < ENOUGH * len(raw):
            raise scored.error or PitheadError("inference.not_finite", "the calibration has no scores")
        low, high = self.fit.threshold_range
        threshold = self.fit.margin * float(np.quantile(values, self.fit.quantile))
        return FitResult(
            mean=scorer.mean,
            scale=scorer.scale,
            threshold=min(max(threshold, low), high),
            samples=len(raw),
            t=now,
        )


def check_fit(fit: FitResult, signed: Fit | None, channels: int) -> None:
    """Raise ``config.invalid`` unless ``fit`` lies in the ranges of the manifest."""
    if signed is None:
        raise PitheadError("config.invalid", "a fit is given, and the manifest allows none")
    if len(fit.mean) != channels or len(fit.scale) != channels:
        raise PitheadError("config.invalid", f"the fit is not for {channels} channels")
    low, high = signed.threshold_range
    inside = (
        _inside(fit.mean, signed.mean_range)
        and _inside(fit.scale, signed.scale_range)
        and low <= fit.threshold <= high
    )
    if not inside:
        raise PitheadError("config.invalid", "the fit lies outside of the ranges that the manifest signs")


def _clamp(values: NDArray[np.float64], ranges: tuple[tuple[float, float], ...]) -> NDArray[np.float64]:
    limits = np.asarray(ranges, np.float64)
    clamped: NDArray[np.float64] = np.clip(values, limits[:, 0], limits[:, 1])
    return clamped


def _inside(values: tuple[float, ...], ranges: tuple[tuple[float, float], ...]) -> bool:
    return all(low <= v <= high for v, (low, high) in zip(values, ranges, strict=True))
