"""Results of optimising for people: rows of a table, one JSON document, and a plot as SVG."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any, Final

import msgspec

from models.optimise.produce import Candidate, Result

HEAD: Final = (
    *("variant", "result", "mean diff", "max diff", "÷ deviation", "flips", "AUC"),
    *("bytes", "after zstd", "p50 µs", "p99 µs", "load ms", "on"),
)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 420, 80, 60
_RIGHT, _TOP = 30, 40
_MAX_RADIUS, _MIN_RADIUS = 34.0, 6.0
_STEPS: Final = {3.0: (1.0,), 1.0: (1.0, 2.0, 5.0)}
"""By decades of an axis, above which these numbers of each are shown."""
_FINEST: Final = tuple(i / 2 for i in range(2, 20))
_EXACT: Final = 1e-6
"""Differences are shown from here on: a logarithm knows no 0."""


def cells(candidate: Candidate, result: Result) -> tuple[str, ...]:
    """Return a line of the table, in the order of ``HEAD``; sizes and times beside the original's."""
    loss, original = candidate.loss, result.candidates[0]
    verdict = "original" if candidate is original else "kept" if candidate.kept else "refused"
    found: tuple[str, ...]
    if loss is None:
        others = [c.loss.auc_original for c in result.candidates if c.loss is not None]
        auc = next((f"{a:.5f}" for a in others if a is not None and candidate is original), "")
        found = ("", "", "", "", auc)
    else:
        auc = "" if loss.auc is None else f"{loss.auc:.5f}"
        flips = "" if loss.flips is None else f"{loss.flips:.3%}"
        found = (f"{loss.mean_abs:.3g}", f"{loss.max_abs:.3g}", f"{loss.mean:.2%}", flips, auc)
    if not candidate.bytes:
        return (candidate.name, verdict, *found, *("",) * 6)
    measured = (
        _beside(candidate.bytes, original.bytes, ","),
        _beside(candidate.compressed, original.compressed, ","),
        _beside(candidate.p50_us, original.p50_us, ".1f") if candidate.p50_us else "",
        f"{candidate.p99_us:.1f}" if candidate.p50_us else "",
        f"{candidate.load_ms:.1f}" if candidate.p50_us else "",
        candidate.accelerator,
    )
    return (candidate.name, verdict, *found, *measured)


def _beside(value: float, original: float, form: str) -> str:
    share = "" if value == original or not original else f" ({value / original:.0%})"
    return f"{value:{form}}{share}"


def facts(result: Result) -> dict[str, Any]:
    """Return the JSON document."""
    return {
        "directory": None if result.directory is None else str(result.directory),
        "data": result.division,
        "tolerances": msgspec.to_builtins(result.tolerances),
        "variants": [
            {
                "name": c.name,
                "technique": c.technique or None,
                "explanation": c.explanation,
                "kept": c.kept,
                "code": c.code,
                "detail": c.detail,
                "bytes": c.bytes,
                "zstd_bytes": c.compressed,
                "loss": None if c.loss is None else msgspec.to_builtins(c.loss),
                "accelerator": c.accelerator,
                "latency_p50_us": c.p50_us,
                "latency_p99_us": c.p99_us,
                "load_ms": c.load_ms,
            }
            for c in result.candidates
        ],
    }


def svg(result: Result, title: str) -> str:
    """Return a plot of difference by latency; a bubble's area is its file's size. Refused ones are hollow."""
    shown = [c for c in result.candidates if c.p50_us > 0]
    x_ends = _ends([c.p50_us for c in shown])
    y_ends = _ends([_difference(c) for c in shown])
    largest = max((c.bytes for c in shown), default=1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        '<g font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="22" font-size="14" font-weight="bold">{escape(title)}</text>',
        *_axis(x_ends, along=True),
        *_axis(y_ends, along=False),
        _label(_WIDTH / 2, _HEIGHT - 12, "latency p50, µs (logarithmic)"),
        f'<g transform="translate(18 {_HEIGHT / 2}) rotate(-90)">',
        _label(0, 0, "mean difference ÷ deviation (logarithmic)") + "</g>",
    ]
    # Large ones first, so that small ones stay visible.
    for one in sorted(shown, key=lambda c: -c.bytes):
        x = _place(one.p50_us, x_ends, _LEFT, _WIDTH - _RIGHT)
        y = _place(_difference(one), y_ends, _HEIGHT - _BOTTOM, _TOP)
        radius = max(_MIN_RADIUS, _MAX_RADIUS * math.sqrt(one.bytes / largest))
        colour = "#555" if not one.technique else "#1f77b4" if one.kept else "#d62728"
        fill = colour if one.kept else "none"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" fill-opacity="0.35" '
            f'stroke="{colour}"><title>{one.bytes:,} bytes, {one.p50_us:.1f} µs</title></circle>'
        )
        parts.append(_label(x, y + 4, f"{one.name}{'' if one.kept else ' (refused)'}"))
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def _difference(candidate: Candidate) -> float:
    return max(_EXACT, candidate.loss.mean if candidate.loss is not None else 0.0)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Return an axis's ends, a fifth beyond the values in decades, as powers of ten's exponents."""
    low, high = math.log10(min(values, default=1.0)), math.log10(max(values, default=1.0))
    space = max(0.15, 0.2 * (high - low))
    return low - space, high + space


def _place(value: float, ends: tuple[float, float], start: float, stop: float) -> float:
    return start + (math.log10(value) - ends[0]) / (ends[1] - ends[0]) * (stop - start)


def _ticks(ends: tuple[float, float]) -> list[float]:
    """Return round numbers along an axis: the fewer decades it has, the more in each."""
    decades = range(math.floor(ends[0]), math.ceil(ends[1]) + 1)
    span = ends[1] - ends[0]
    steps = next((s for most, s in _STEPS.items() if span > most), _FINEST)
    found = [step * 10.0**decade for decade in decades for step in steps]
    return [value for value in found if ends[0] <= math.log10(value) <= ends[1] and value >= _EXACT]


def _axis(ends: tuple[float, float], *, along: bool) -> list[str]:
    parts = []
    for value in _ticks(ends):
        text = "equal" if value <= _EXACT * 1.01 and not along else f"{value:g}"
        if along:
            at = _place(value, ends, _LEFT, _WIDTH - _RIGHT)
            parts.append(f'<path d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#ddd"/>')
            parts.append(_label(at, _HEIGHT - _BOTTOM + 18, text))
        else:
            at = _place(value, ends, _HEIGHT - _BOTTOM, _TOP)
            parts.append(f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    return parts


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'
