"""From evidence to a verdict: one joint permutation test for harm, one test per metric for its absence.

HALT: the largest standardised rank sum over metrics x {since activation,
last third} and silence, after the minimum harm has been taken from the
canaries, with the error spent over the looks.
ADVANCE: non-inferiority. The margin is taken from the canaries, and the test
asks whether they are then better than the controls. Every metric must pass,
so each may be tested at full alpha (intersection-union; Berger 1982).

HALT goes first, over all looks: an early ADVANCE must not hide harm that came
later. That costs no error, since alpha is spent over the whole schedule of
looks whether or not the gate would have advanced meanwhile. ADVANCE is of the
latest look only: each metric must have been refuted by its sequential test,
which alone keeps the error at alpha, *and* at the latest look too. The second
condition can only take an ADVANCE away, so it adds no error either.
"""

import itertools
from typing import Final

import msgspec
import numpy as np

from control_plane.core.gate import design, spending
from control_plane.core.gate.evidence import (
    Booleans,
    Evidence,
    Floats,
    Look,
    MetricLook,
    Outcome,
    Verdict,
    hold,
)
from control_plane.core.gate.permutation import Allocations
from control_plane.core.gate.scores import (
    SILENCE_FROM,
    Column,
    Panel,
    Strata,
    column,
    contrast,
    muted,
    presence,
    recent_silence,
    silence_column,
)
from control_plane.core.gate.spending import Table
from control_plane.core.policy import Metric, Policy

DECIMALS: Final = 4
"""z is rounded to this, so that ties are ties on every machine."""
AXES: Final = 2
MISSING: Final = ", missing"
"""Ends the name of the comparison of who no longer gives a metric."""


def assess(evidence: Evidence, policy: Policy) -> Verdict:
    """Return the gate's answer to all of ``evidence``.

    Fails closed: evidence that is absent, empty or unreadable holds, with
    the reason.
    """
    problem = _unreadable(evidence, policy)
    if problem is not None:
        return hold(problem)
    verdict = _Comparison(evidence, policy).verdict()
    few = _too_few(evidence, policy)
    if few is not None and verdict.verdict is Outcome.HOLD:
        return msgspec.structs.replace(verdict, reason=few, too_few=True)
    return verdict


def examine(evidence: Evidence, policy: Policy) -> tuple[Look, ...]:
    """Return every look that ``evidence`` allows, up to the one that halted."""
    return assess(evidence, policy).looks


class _Comparison:
    """One comparison of canaries with controls, all looks at once."""

    def __init__(self, evidence: Evidence, policy: Policy) -> None:
        self.evidence = evidence
        self.policy = policy
        self.treated: Booleans = np.asarray(evidence.treated, dtype=bool)
        labels = np.unique(np.asarray(evidence.strata), return_inverse=True)[1]
        self.strata = Strata(labels)
        self.scored = presence(evidence)
        self.muted = muted(evidence)
        self.panels = {metric.name: Panel(evidence, metric) for metric in policy.metrics}
        buckets = self.scored.shape[1] - evidence.pre
        self.last = evidence.last or policy.max_soak_buckets
        planned = spending.schedule(policy.first_look, policy.look_growth, self.last)
        self.looks = [bucket for bucket in planned if bucket <= buckets]
        self.allocations = Allocations(self.treated, labels, seed=evidence.seed, limit=policy.permutations)

    def verdict(self) -> Verdict:
        """Return the verdict and the looks that led to it."""
        if not self.looks:
            return hold(f"soaking: first look at bucket {self.policy.first_look}")
        harm_columns = [self._harm_columns(bucket) for bucket in self.looks]
        margin_columns = [
            [self._margin_column(metric, bucket) for bucket in self.looks] for metric in self.policy.metrics
        ]
        tables = self._permute(harm_columns, margin_columns)
        return self._decide(harm_columns, *tables)

    def _harm_columns(self, bucket: int) -> list[Column]:
        spans = [("", 0)]
        if bucket >= self.policy.last_third_after:
            spans.append((", last third", bucket * 2 // 3))
        columns = []
        for metric in self.policy.metrics:
            shift = np.where(self.treated, metric.shift(metric.minimum_harm), 0.0)
            for label, start in spans:
                scores = self.panels[metric.name].adjusted(start, bucket, shift, self.strata)
                columns.append(column(metric.name + label, scores, self.treated, self.strata))
        overall = self._silence(bucket)
        columns.append(silence_column("silence", overall, self.treated, self.strata))
        for metric in self.policy.metrics:
            missing = self._missing(metric, bucket)
            if not np.array_equal(missing, overall):
                name = metric.name + MISSING
                columns.append(silence_column(name, missing, self.treated, self.strata))
        return [found for found in columns if found is not None]

    def _margin_column(self, metric: Metric, bucket: int) -> Column | None:
        shift = np.where(self.treated, metric.shift(metric.margin), 0.0)
        scores = self.panels[metric.name].adjusted(0, bucket, shift, self.strata)
        # Whoever does not give this metric now ranks worst, canary or not: the dead must not vote for
        # the release, nor may a version pass by not being measured.
        scores = np.where(self._missing(metric, bucket) >= SILENCE_FROM, np.inf, scores)
        return column(metric.name, -scores, self.treated, self.strata)

    def _silence(self, bucket: int) -> Floats:
        """Return how silent each device was lately, in all metrics together."""
        present = self.scored | self.muted
        return recent_silence(present, self.evidence.pre, bucket, self.policy.silent_buckets)

    def _missing(self, metric: Metric, bucket: int) -> Floats:
        """Return how silent each device was lately in one metric."""
        accounted = self.panels[metric.name].accounted
        return recent_silence(accounted, self.evidence.pre, bucket, self.policy.silent_buckets)

    def _permute(
        self, harm: list[list[Column]], margins: list[list[Column | None]]
    ) -> tuple[Table, list[Table]]:
        """Return (choices x looks of the largest z for harm, the same of z against the margin by metric)."""
        flat = [found for columns in harm for found in columns]
        flat += [found for columns in margins for found in columns if found is not None]
        n, looks = self.allocations.count, len(self.looks)
        harm_table = np.full((n, looks), -np.inf, np.float32)
        margin_tables = [np.full((n, looks), -np.inf, np.float32) for _ in margins]
        if not flat:
            return harm_table, margin_tables
        weights = np.stack([found.weights for found in flat], axis=1).astype(np.float32)
        row = 0
        for choices in self.allocations.chunks():
            z = np.round(choices @ weights, DECIMALS)
            rows = slice(row, row + len(choices))
            row += len(choices)
            at = 0
            for index, columns in enumerate(harm):
                if columns:
                    harm_table[rows, index] = z[:, at : at + len(columns)].max(axis=1)
                at += len(columns)
            for table, found in zip(margin_tables, margins, strict=True):
                for index, one in enumerate(found):
                    if one is not None:
                        table[rows, index] = z[:, at]
                        at += 1
        return harm_table, margin_tables

    def _decide(self, harm: list[list[Column]], harm_table: Table, margin_tables: list[Table]) -> Verdict:
        policy = self.policy
        alpha = policy.alpha * self.evidence.alpha_share
        halted_at, limits = self._crossing(harm_table, alpha)
        refuted = [self._crossing(table, policy.alpha)[0] for table in margin_tables]
        looks: list[Look] = []
        for index, bucket in enumerate(self.looks):
            metrics = tuple(
                self._metric_look(metric, bucket, table[:, index], refuted=at is not None and at <= index)
                for metric, table, at in zip(policy.metrics, margin_tables, refuted, strict=True)
            )
            worst = self._worst(harm[index])
            outcome, reason = self._outcome(index, halted_at, metrics, worst)
            z = float(harm_table[0, index])
            looks.append(
                Look(
                    bucket=bucket,
                    verdict=outcome,
                    reason=reason,
                    harm_z=z if np.isfinite(z) else None,
                    harm_p=_p(harm_table[:, index]),
                    harm_limit=limits[index] if np.isfinite(limits[index]) else None,
                    worst=worst,
                    alpha_spent=alpha * spending.spent(bucket, policy.first_look, self.last),
                    metrics=metrics,
                )
            )
            if outcome is Outcome.HALT:
                break
        final = looks[-1]
        return Verdict(
            verdict=final.verdict,
            reason=final.reason,
            bucket=_decided_at(looks),
            looks=tuple(looks),
            permutations=self.allocations.count,
            exact=self.allocations.exact,
            exhausted=final.bucket >= self.last,
        )

    def _outcome(
        self, index: int, halted_at: int | None, metrics: tuple[MetricLook, ...], worst: str | None
    ) -> tuple[Outcome, str]:
        bucket = self.looks[index]
        if index == halted_at:
            return Outcome.HALT, _harm_words(worst, metrics)
        if not self.evidence.may_advance:
            return Outcome.HOLD, "no harm shown; this comparison only watches"
        absent = self._absent(bucket) or self._standing(bucket)
        if absent is not None:
            return Outcome.HOLD, absent
        open_metrics = [look.metric for look in metrics if not look.passed]
        if open_metrics:
            return Outcome.HOLD, f"harm of the margin is not refuted yet: {', '.join(open_metrics)}"
        if bucket < self.policy.shortest_soak:
            return Outcome.HOLD, f"soaking until bucket {self.policy.shortest_soak}"
        return Outcome.ADVANCE, "harm of the margin is refuted in every metric"

    def _absent(self, bucket: int) -> str | None:
        kinds = [("are silent", self._silence(bucket))]
        kinds += [(f"do not give {m.name}", self._missing(m, bucket)) for m in self.policy.metrics]
        for words, silence in kinds:
            speaking = silence < SILENCE_FROM
            for arm, members in (("canaries", self.treated), ("controls", ~self.treated)):
                if float(speaking[members].mean()) < self.policy.min_coverage:
                    return (
                        f"{int((members & ~speaking).sum())} of {int(members.sum())} {arm} {words}; "
                        f"{self.policy.min_coverage:.0%} must report"
                    )
        return None

    def _standing(self, bucket: int) -> str | None:
        """Return why the gate waits for machines that stand, or None.

        What a machine's rest takes from the soak has to be made up for.
        """
        start, policy = self.evidence.pre, self.policy
        stood = self.muted[:, start : start + bucket].sum(axis=1)
        least = max(1, policy.shortest_soak)
        short = (stood > 0) & (bucket - stood < least)
        recent = self.scored[:, start + bucket - min(bucket, policy.silent_buckets) : start + bucket]
        lately = np.any(recent, axis=1)
        for arm, members in (("canaries", self.treated), ("controls", ~self.treated)):
            if stood[members].any() and not lately[members].any():
                return f"nothing is scored: the machines of all {arm} stand, or they are silent"
            if float((~short[members]).mean()) < policy.min_coverage:
                return (
                    f"the machines of {int((members & short).sum())} of {int(members.sum())} {arm} stood: "
                    f"{policy.min_coverage:.0%} must run for {least} buckets"
                )
        return None

    def _metric_look(self, metric: Metric, bucket: int, table: Table, *, refuted: bool) -> MetricLook:
        p = _p(table)
        scores = self.panels[metric.name].adjusted(0, bucket, np.zeros(len(self.treated)), self.strata)
        return MetricLook(
            metric=metric.name,
            shift=contrast(scores, self.treated, self.strata),
            margin_p=p,
            passed=refuted and p is not None and p <= self.policy.alpha,
        )

    def _worst(self, columns: list[Column]) -> str | None:
        if not columns:
            return None
        return max(columns, key=lambda found: float(found.weights[self.treated].sum())).name

    def _crossing(self, table: Table, alpha: float) -> tuple[int | None, list[float]]:
        return spending.first_crossing(
            table, self.looks, alpha=alpha, first=self.policy.first_look, last=self.last
        )


def _p(column: Table) -> float | None:
    if not np.isfinite(column[0]):
        return None
    return float((column >= column[0]).mean())


def _decided_at(looks: list[Look]) -> int | None:
    """Return the bucket of the halt, or from which on every look advanced; None while it holds."""
    final = looks[-1]
    if final.verdict is not Outcome.ADVANCE:
        return final.bucket if final.verdict is Outcome.HALT else None
    run = itertools.takewhile(lambda look: look.verdict is Outcome.ADVANCE, reversed(looks))
    return min(look.bucket for look in run)


def _harm_words(worst: str | None, metrics: tuple[MetricLook, ...]) -> str:
    if worst == "silence":
        return "harm shown: more canaries than controls fell silent"
    if worst is not None and worst.endswith(MISSING):
        return f"harm shown: fewer canaries than controls give {worst.removesuffix(MISSING)}"
    for look in metrics:
        if worst is not None and worst.startswith(look.metric) and look.shift is not None:
            return f"harm above the minimum shown in {worst} (canaries {look.shift:+.4g} against controls)"
    return f"harm above the minimum shown in {worst}"


def _unreadable(evidence: Evidence, policy: Policy) -> str | None:
    """Return why nothing can be concluded from ``evidence``, or None when it can be read."""
    n = len(evidence.devices)
    if n == 0:
        return "no evidence: no devices"
    if len(evidence.treated) != n or len(evidence.strata) != n:
        return "unreadable evidence: devices, treated and strata differ in length"
    if not any(evidence.treated) or all(evidence.treated):
        return f"no evidence: no {'controls' if any(evidence.treated) else 'canaries'}"
    shapes = {np.shape(evidence.series.get(metric.name, ())) for metric in policy.metrics}
    shapes |= set() if evidence.muted is None else {np.shape(evidence.muted)}
    absent = [metric.name for metric in policy.metrics if metric.name not in evidence.series]
    if absent:
        return f"no evidence for {', '.join(absent)}"
    shape = shapes.pop()
    if shapes or len(shape) != AXES or shape[0] != n or not 0 <= evidence.pre <= shape[1]:
        return "unreadable evidence: a metric is not an array of devices x buckets like the others"
    return _unusable(evidence, policy)


def _unusable(evidence: Evidence, policy: Policy) -> str | None:
    for metric in policy.metrics:
        values = np.asarray(evidence.series[metric.name], dtype=np.float64)
        after = values[:, evidence.pre :]
        if np.isinf(values).any():
            return f"unreadable evidence: {metric.name} has infinite values"
        if metric.logarithmic and metric.higher_is_worse and (values <= 0).any():
            return f"unreadable evidence: {metric.name} has values of 0 or less on the log scale"
        if after.shape[1] >= policy.first_look and np.isnan(after).all():
            stand = muted(evidence)[:, evidence.pre :].any()
            why = ": machines stand, and nothing is scored" if stand else ""
            return f"no evidence for {metric.name} since the activation{why}"
    return None


def _too_few(evidence: Evidence, policy: Policy) -> str | None:
    sizes: dict[str, tuple[int, int]] = {}
    for treated, stratum in zip(evidence.treated, evidence.strata, strict=True):
        canaries, devices = sizes.get(stratum, (0, 0))
        sizes[stratum] = (canaries + treated, devices + 1)
    if design.can_decide(list(sizes.values()), alpha=policy.alpha):
        return None
    canaries = sum(evidence.treated)
    controls = len(evidence.treated) - canaries
    more = design.canaries_needed(controls, alpha=policy.alpha)
    others = design.controls_needed(canaries, alpha=policy.alpha)
    ways = []
    if more is not None and more > canaries:
        ways.append(f"at least {more} canaries beside {controls} controls")
    if others is not None and others > controls:
        ways.append(f"at least {others} controls beside {canaries} canaries")
    return (
        f"too few devices for a decision (canaries: {canaries}, controls: {controls}): needs "
        f"{' or '.join(ways) or 'larger strata'}"
    )
