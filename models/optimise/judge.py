"""How far a variant is from the original, and whether that is too far. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from contract.errors import PitheadError
from contract.manifest import Score
from inference.arithmetic import scores
from models.backtest import judged

PREFIX: Final = "tolerance."
"""Of ``provenance.parameters`` in a manifest."""
DEFAULTS: Final[Mapping[str, float]] = {"mean": 0.1, "flips": 0.01, "auc": 0.005}
KINDS: Final = ("mean", "max", "flips", "auc")
_SUM_TOLERANCE: Final = 0.02

Answers = Mapping[str, NDArray[Any]]


class Tolerances(Struct, frozen=True):
    """The most that a variant may lose, and who said so."""

    limits: dict[str, float]
    origin: dict[str, Literal["command line", "manifest", "default"]]

    @property
    def text(self) -> str:
        """For people."""
        return ", ".join(f"{kind} {limit:g} ({self.origin[kind]})" for kind, limit in self.limits.items())


class Loss(Struct, frozen=True, omit_defaults=True):
    """Differences from the original on the same windows, of scores where there are any, else of outputs."""

    of: Literal["scores", "outputs"]
    max_abs: float
    mean_abs: float
    mean: float
    """``mean_abs`` divided by the standard deviation of the original's values; the worst output counts."""
    flips: float | None = None
    """Share of decisions that changed: alarms at the threshold, or a classifier's best class."""
    auc: float | None = None
    auc_original: float | None = None

    @property
    def measured(self) -> dict[str, float]:
        """What tolerances are about, by kind."""
        lost = None if self.auc is None or self.auc_original is None else self.auc_original - self.auc
        found = {"mean": self.mean, "max": self.max_abs, "flips": self.flips, "auc": lost}
        return {kind: value for kind, value in found.items() if value is not None}


def tolerances(given: Sequence[str], parameters: Mapping[str, object]) -> Tolerances:
    """Return the limits: of the command line, else of the manifest's parameters, else of ``DEFAULTS``.

    Raises ``config.invalid`` for what is none of ``KINDS`` or no number.
    """
    said: dict[str, float] = {}
    for text in given:
        for part in filter(None, text.split(",")):
            kind, _, value = part.strip().partition("=")
            said[kind] = _limit(kind, value)
    limits: dict[str, float] = {}
    origin: dict[str, Literal["command line", "manifest", "default"]] = {}
    for kind in KINDS:
        stated = parameters.get(PREFIX + kind)
        if kind in said:
            limits[kind], origin[kind] = said[kind], "command line"
        elif isinstance(stated, int | float):
            limits[kind], origin[kind] = float(stated), "manifest"
        elif kind in DEFAULTS:
            limits[kind], origin[kind] = DEFAULTS[kind], "default"
    return Tolerances(limits, origin)


def _limit(kind: str, value: str) -> float:
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if kind not in KINDS or not limit >= 0 or math.isinf(limit):
        raise PitheadError(
            "config.invalid",
            f"--tolerance {kind}={value}: write {'|'.join(KINDS)}=NUMBER, for example flips=0.01",
        )
    return limit


def compare(
    want: Answers, got: Answers, x: NDArray[Any] | None, score: Score | None, label: NDArray[np.bool_] | None
) -> Loss:
    """Return the loss of ``got`` against ``want``, the answers of two models to the same windows.

    ``x`` are the normalised windows that ``score`` needs. Raises ``inference.not_finite`` for answers
    that are no numbers, ``inference.bad_input`` for a number of outputs that differs.
    """
    if len(want) != len(got) or any(
        a.shape != b.shape for a, b in zip(want.values(), got.values(), strict=True)
    ):
        raise PitheadError("inference.bad_input", "the variant's outputs are not those of the original")
    pairs = list(zip(want.values(), got.values(), strict=True))
    if score is not None:
        assert x is not None
        _fits(score, x, pairs[0][0])
        pairs = [(scores(score, x, a)[:, None], scores(score, x, b)[:, None]) for a, b in pairs[:1]]
    if not all(np.isfinite(a).all() for a, _ in pairs):
        raise PitheadError("inference.not_finite", "the original gives NaN or infinity on the given data")
    if not all(np.isfinite(b).all() for _, b in pairs):
        raise PitheadError("inference.not_finite", "the variant gives NaN or infinity on the given data")
    deltas = [np.abs(a.astype(np.float64) - b) for a, b in pairs]
    first, second = pairs[0]
    auc = auc_original = None
    if label is not None and score is not None:
        auc_original, auc = (_auc(label, some[:, 0], score.threshold) for some in (first, second))
    return Loss(
        of="outputs" if score is None else "scores",
        max_abs=max(float(d.max()) for d in deltas),
        mean_abs=max(float(d.mean()) for d in deltas),
        mean=max(float(d.mean()) / _spread(a) for d, (a, _) in zip(deltas, pairs, strict=True)),
        flips=_flips(first, second, score),
        auc=auc,
        auc_original=auc_original,
    )


def _fits(score: Score, x: NDArray[Any], output: NDArray[Any]) -> None:
    """Raise where an output is none that the score is made of."""
    if score.method == "reconstruction_mse" and output.size != x.size:
        raise PitheadError(
            "config.invalid",
            f"reconstruction_mse compares the first output with the first input, but a window has "
            f"{x.size // len(x)} values and its output {output.size // len(x)}",
        )


def _spread(values: NDArray[Any]) -> float:
    return float(values.std()) or float(np.abs(values).max()) or 1.0


def _flips(first: NDArray[Any], second: NDArray[Any], score: Score | None) -> float | None:
    if score is not None:
        return float(((first > score.threshold) != (second > score.threshold)).mean())
    # A classifier is known by its answers: they are shares of one.
    shares = first.shape[1] > 1 and first.min() >= -_SUM_TOLERANCE
    if shares and np.abs(first.sum(axis=1) - 1).max() <= _SUM_TOLERANCE:
        return float((first.argmax(axis=1) != second.argmax(axis=1)).mean())
    return None


def _auc(label: NDArray[np.bool_], values: NDArray[np.float64], threshold: float) -> float | None:
    return judged(label, values, values > threshold).get("auc")


def excess(loss: Loss, allowed: Tolerances) -> str:
    """Return what is lost beyond the tolerances, for people; empty where nothing is."""
    measured = loss.measured
    return "; ".join(
        f"{kind} {measured[kind]:.4g} is more than {limit:g} ({allowed.origin[kind]})"
        for kind, limit in allowed.limits.items()
        if kind in measured and not measured[kind] <= limit
    )
