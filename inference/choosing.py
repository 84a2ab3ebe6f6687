"""Which of the candidates that passed a device shall use: the cheapest that meets the budget. Pure.

Candidates are tried in the order of expectation: the manifest's preference,
then the accelerators in the variant's own order. Measurements of one model
differ by themselves; so a later candidate takes an earlier one's place only
where it is cheaper by a margin, and none is looked for once a run costs so
little that what surrounds it costs more.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from contract.errors import PitheadError
from contract.manifest import Budget, Manifest, Variant
from inference import registry
from inference.accelerators import Resources
from inference.reports import Choice, ProbeReport

NEGLIGIBLE_US: Final = 50.0
"""A lane or a server spends about this around one run; nobody can notice a gain below it."""
MARGIN: Final = 0.8
"""A later candidate must cost at most this share of an earlier one."""


def candidates(
    manifest: Manifest, variants: Sequence[str] | None, accelerators: Sequence[str], arch: str | None = None
) -> Iterator[tuple[Variant, str]]:
    """Yield (variant, accelerator) that could run here, the most preferred first.

    Variants by the manifest's preference, then accelerators in the variant's own order.
    ``arch`` is this machine's unless given; ``any`` takes every variant.
    """
    machine = arch or registry.arch()
    for variant in sorted(manifest.variants, key=lambda v: -v.preference):
        if variants is not None and variant.name not in variants:
            continue
        if machine != "any" and "any" not in variant.arch and machine not in variant.arch:
            continue
        for accelerator in variant.accelerators:
            if accelerator in accelerators:
                yield variant, accelerator


def over_budget(report: ProbeReport, budget: Budget, resources: Resources) -> str:
    """Return in which way a report breaks the manifest's or the device's budget, or an empty text."""
    if budget.latency_ms is not None and report.latency_p99_us > budget.latency_ms * 1000:
        return f"p99 {report.latency_p99_us / 1000:.3f} ms, the budget is {budget.latency_ms} ms"
    if budget.memory_mb is not None and report.memory_mb > budget.memory_mb:
        return f"{report.memory_mb:.1f} MB, the budget is {budget.memory_mb} MB"
    if resources.memory_mb is not None and report.memory_mb > resources.memory_mb:
        return f"{report.memory_mb:.1f} MB, the device gives {resources.memory_mb} MB"
    return ""


def settled(report: ProbeReport) -> bool:
    """Whether nothing better is possible than this candidate."""
    return report.passed and report.latency_p50_us <= NEGLIGIBLE_US


def cost(report: ProbeReport, *, energy: bool) -> float:
    """Return what one run costs: microjoules with ``energy``, else microseconds (p50)."""
    return report.energy_uj if energy and report.energy_uj is not None else report.latency_p50_us


def choose(reports: Sequence[ProbeReport], manifest: Manifest | None) -> Choice:
    """Return the cheapest of what passed; energy counts where it was measured for all, else time.

    Without a manifest the reports' own order is that of expectation.
    Raises the failure's own code when nothing passed and all failed alike,
    else ``probe.no_variant`` with every reason.
    """
    expected = [] if manifest is None else _expected(manifest)
    order = {pair: i for i, pair in enumerate(expected)}
    passed = sorted(
        (r for r in reports if r.passed), key=lambda r: order.get((r.variant, r.accelerator), len(order))
    )
    if not passed:
        reasons = "; ".join(f"{r.variant} on {r.accelerator}: {r.code} {r.detail}".rstrip() for r in reports)
        codes = {r.code for r in reports}
        code = codes.pop() if len(codes) == 1 else None
        raise PitheadError(code or "probe.no_variant", reasons or "no variant fits this machine")
    return best(passed)


def best(passed: Sequence[ProbeReport]) -> Choice:
    """Return the choice among what passed, in the order of expectation."""
    energy = all(r.energy_uj is not None for r in passed)
    found = passed[0]
    for report in passed:
        if cost(report, energy=energy) < MARGIN * cost(found, energy=energy):
            found = report
        if settled(report):
            break
    return Choice(found.variant, found.accelerator, found, _why(found, passed, energy=energy))


def _expected(manifest: Manifest) -> list[tuple[str, str]]:
    every = [a for v in manifest.variants for a in v.accelerators]
    return [(v.name, a) for v, a in candidates(manifest, None, every, "any")]


def _why(found: ProbeReport, passed: Sequence[ProbeReport], *, energy: bool) -> str:
    if len(passed) == 1:
        return "the only one that passed" if not settled(found) else _little(found)
    if settled(found):
        return _little(found)
    unit = "uJ" if energy else "us"
    others = [r for r in passed if r is not found]
    rival = min(others, key=lambda r: cost(r, energy=energy))
    mine, theirs = cost(found, energy=energy), cost(rival, energy=energy)
    name = f"{rival.variant} on {rival.accelerator}"
    if theirs < mine:
        return (
            f"preferred; {name} is cheaper by less than the margin ({theirs:.4g} against {mine:.4g} {unit})"
        )
    return f"the cheapest: {mine:.4g} {unit} a run, {name} {theirs:.4g}"


def _little(found: ProbeReport) -> str:
    return (
        f"a run takes {found.latency_p50_us:.1f} us; under {NEGLIGIBLE_US:.0f} us nobody notices a better one"
    )
