"""How often the gate halts harmless releases and finds harmful ones, beside two gates that are common.

Peers, on the same traces and at the same looks: a Mann-Whitney test of the
pooled samples of canaries and controls, repeated at each look at 5 %, and a
fixed threshold on the difference of the means. Traces: 20 to 100 devices,
12 hours before and 12 after in minutes; each device has a level of its own,
AR(1) noise (0.9), a common daily cycle and heavy tails (Student t, 3).

The first lines spend all of alpha on one comparison and halt on any harm, so
that gates are compared on equal terms. The "live" lines measure what decides
in a rollout: the first stage's share of alpha, and a minimum harm and margin.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
import numpy as np
from scipy import signal, stats

from control_plane.core.gate import Evidence, Outcome, assess
from control_plane.core.gate.design import alpha_shares
from control_plane.core.gate.spending import schedule
from control_plane.core.policy import Metric, Policy

BEFORE: Final = 720
AFTER: Final = 720
ALPHA: Final = 0.05
THRESHOLD: Final = 0.5
"""Of the fixed threshold, in standard deviations between devices."""
FLAWLESS: Final = 1e-6
"""A margin that no release can refute, so that only halting is measured."""

Values = np.ndarray[Any, np.dtype[np.float64]]
Gate = Callable[[Evidence, Policy], int | None]


class Cell(msgspec.Struct, frozen=True):
    """One line of the table."""

    name: str
    devices: int = 20
    canaries: int = 3
    harm: float = 0.0
    metrics: int = 1
    onset: int = 0
    die: float = 0.0
    """Share of the canaries that falls silent, each at a moment of its own."""
    strata: tuple[tuple[int, int, float], ...] = ()
    """(devices, canaries, drift after the activation of both arms)."""
    margin: float = FLAWLESS
    minimum_harm: float = 0.0
    share: float = 1.0
    """Of alpha."""


def live(name: str, harm: float, devices: int = 20, canaries: int = 3) -> Cell:
    share = alpha_shares(len(Policy().stages))[0][0]
    return Cell(
        f"live: {name}, {devices}/{canaries}",
        devices=devices,
        canaries=canaries,
        harm=harm,
        minimum_harm=0.2,
        margin=0.5,
        share=share,
    )


CELLS: Final = (
    Cell("harmless, 20/3"),
    Cell("harmless, 100/5", devices=100, canaries=5),
    Cell(
        "harmless, strata drift apart", devices=60, canaries=10, strata=((30, 2, 0), (20, 5, 3), (10, 3, -2))
    ),
    Cell("+0.3 sd, 20/3", harm=0.3),
    Cell("+0.3 sd, 100/5", devices=100, canaries=5, harm=0.3),
    Cell("+0.6 sd from minute 360, 20/3", harm=0.6, onset=360),
    Cell("5 metrics, one +0.6 sd, 20/3", harm=0.6, metrics=5),
    Cell("half of the canaries die, 60/6", devices=60, canaries=6, die=0.5),
    live("harmless", 0.0),
    live("at the minimum harm", 0.2),
    live("+0.6 sd", 0.6),
    live("+0.6 sd", 0.6, devices=100, canaries=5),
)
NO_ALPHA: Final = 1e-9
AT_MARGIN: Final = Cell("exactly at the margin, 20/3", harm=0.5, margin=0.5, minimum_harm=0.5, share=NO_ALPHA)
"""Nothing may halt, so that only growth is measured."""


def trace(rng: np.random.Generator, cell: Cell) -> Evidence:
    n, t = cell.devices, BEFORE + AFTER
    strata = np.repeat(np.arange(max(1, len(cell.strata))), [s[0] for s in cell.strata] or [n])
    treated = np.zeros(n, dtype=bool)
    for index, canaries in enumerate([s[1] for s in cell.strata] or [cell.canaries]):
        members = np.flatnonzero(strata == index)
        treated[rng.permutation(members)[:canaries]] = True
    series = {}
    for metric in range(cell.metrics):
        steps = rng.standard_t(3, (n, t)) / np.sqrt(3) * 0.5 * np.sqrt(1 - 0.9**2)
        values: Values = signal.lfilter([1], [1, -0.9], steps, axis=1)
        values += rng.normal(0, 0.5, (n, 1)) * 0.9 ** np.arange(1, t + 1)
        values += rng.normal(0, 1, (n, 1)) + rng.standard_t(3, (n, t)) * 0.3
        values += np.sin(2 * np.pi * np.arange(t) / 1440 + rng.uniform(0, 2 * np.pi))
        for index, (_, _, drift) in enumerate(cell.strata):
            values[strata == index, BEFORE:] += drift * np.arange(AFTER) / AFTER
        if metric == 0:
            values[treated, BEFORE + cell.onset :] += cell.harm
        series[f"m{metric}"] = values
    for device in rng.permutation(np.flatnonzero(treated))[: round(cell.die * treated.sum())]:
        moment = BEFORE + rng.integers(0, 600)
        for values in series.values():
            values[device, moment:] = np.nan
    return Evidence(
        seed=str(rng.integers(1 << 60)),
        devices=tuple(f"d{k}" for k in range(n)),
        treated=tuple(bool(one) for one in treated),
        strata=tuple(str(s) for s in strata),
        pre=BEFORE,
        series=series,
        alpha_share=cell.share,
    )


def policy_of(cell: Cell) -> Policy:
    metrics = tuple(
        Metric(name=f"m{k}", minimum_harm=cell.minimum_harm, margin=cell.margin) for k in range(cell.metrics)
    )
    return Policy(metrics=metrics, max_soak_buckets=AFTER, min_soak_buckets=0, permutations=2000, alpha=ALPHA)


def joint_permutation(evidence: Evidence, policy: Policy) -> int | None:
    verdict = assess(evidence, policy)
    return verdict.bucket if verdict.verdict is Outcome.HALT else None


def repeated_mann_whitney(evidence: Evidence, policy: Policy) -> int | None:
    treated = np.array(evidence.treated)
    for bucket in schedule(policy.first_look, policy.look_growth, AFTER):
        for values in evidence.series.values():
            after = values[:, BEFORE : BEFORE + bucket]
            a, b = (x[~np.isnan(x)] for x in (after[treated].ravel(), after[~treated].ravel()))
            if len(a) and stats.mannwhitneyu(a, b, alternative="greater", method="asymptotic").pvalue < ALPHA:
                return bucket
    return None


def fixed_threshold(evidence: Evidence, policy: Policy) -> int | None:
    treated = np.array(evidence.treated)
    for bucket in schedule(policy.first_look, policy.look_growth, AFTER):
        for values in evidence.series.values():
            after = values[:, BEFORE : BEFORE + bucket]
            if np.nanmean(after[treated]) - np.nanmean(after[~treated]) > THRESHOLD:
                return bucket
    return None


GATES: Final[dict[str, Gate]] = {
    "joint permutation": joint_permutation,
    "repeated Mann-Whitney": repeated_mann_whitney,
    "fixed threshold": fixed_threshold,
}


def measure(cell: Cell, seconds: float, most: int) -> dict[str, Any]:
    """Run until ``seconds`` are over, at most ``most`` rollouts."""
    policy = policy_of(cell)
    found: dict[str, list[int | None]] = {name: [] for name in GATES}
    start = time.monotonic()
    for run in range(most):
        evidence = trace(np.random.default_rng([len(cell.name), run]), cell)
        for name, gate in GATES.items():
            found[name].append(gate(evidence, policy))
        if time.monotonic() - start > seconds:
            break
    runs = len(found["joint permutation"])
    row: dict[str, Any] = {"cell": cell.name, "runs": runs}
    for name, buckets in found.items():
        hits = [bucket for bucket in buckets if bucket is not None]
        row[name] = {
            "halted_percent": round(100 * len(hits) / runs, 1),
            "median_minutes": float(np.median(hits)) if hits else None,
        }
    return row


def at_margin(seconds: float, most: int) -> dict[str, Any]:
    """How often a release exactly at the margin may grow."""
    policy = policy_of(AT_MARGIN)
    start = time.monotonic()
    advanced = runs = 0
    while runs < most and time.monotonic() - start < seconds:
        evidence = trace(np.random.default_rng([99, runs]), AT_MARGIN)
        advanced += assess(evidence, policy).verdict is Outcome.ADVANCE
        runs += 1
    return {"cell": AT_MARGIN.name, "runs": runs, "advanced_percent": round(100 * advanced / runs, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=110.0, help="for the whole table")
    parser.add_argument("--runs", type=int, default=400, help="at most, for each line")
    options = parser.parse_args()
    share = options.seconds / (len(CELLS) + 1)
    print(f"halted, % (median minute); alpha {ALPHA:.0%}; chance alone moves 5 % by about 2 at 100 runs\n")
    print(f"{'':32}{'runs':>5}" + "".join(f"{name:>24}" for name in GATES))
    rows = []
    for cell in CELLS:
        row = measure(cell, share, options.runs)
        rows.append(row)
        cells = "".join(f"{_shown(row[name]):>24}" for name in GATES)
        print(f"{cell.name:32}{row['runs']:>5}{cells}", flush=True)
    last = at_margin(share, options.runs)
    print(f"\n{last['cell']}: {last['advanced_percent']} % of {last['runs']} advance; wanted: at most 5")
    print("The peers' early halts are mostly chance: see how often they halt what is harmless.")
    print(json.dumps({"benchmark": "gate_error_rates", "alpha": ALPHA, "rows": [*rows, last]}))


def _shown(result: dict[str, Any]) -> str:
    median = "-" if result["median_minutes"] is None else f"{result['median_minutes']:.0f}"
    return f"{result['halted_percent']:.1f} ({median})"


if __name__ == "__main__":
    main()
