"""The gate: its error rates, and that it fails closed."""

import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.core.gate import Evidence, Outcome, assess, design, trace
from control_plane.core.gate.permutation import Allocations, possible
from control_plane.core.gate.spending import first_crossing, schedule, spent
from control_plane.core.policy import Metric, Policy

Floats = np.ndarray[Any, np.dtype[np.float64]]


def one_metric(**changes: Any) -> Policy:
    metric = Metric(name="m", minimum_harm=0.0, margin=0.5)
    return msgspec.structs.replace(
        Policy(metrics=(metric,), max_soak_buckets=60, min_soak_buckets=0, permutations=1000), **changes
    )


def evidence(
    rng: np.random.Generator,
    *,
    devices: int = 20,
    canaries: int = 3,
    pre: int = 60,
    post: int = 60,
    harm: float = 0.0,
    strata: list[str] | None = None,
    names: tuple[str, ...] = ("m",),
) -> Evidence:
    """Devices with levels of their own, noise that depends on the bucket before, and a common wave."""
    treated = np.zeros(devices, dtype=bool)
    treated[rng.permutation(devices)[:canaries]] = True
    series = {}
    for name in names:
        values = rng.normal(0, 1, (devices, 1)) + np.sin(np.arange(pre + post) / 20)
        drift = np.zeros(devices)
        noise = np.empty((devices, pre + post))
        for bucket in range(pre + post):
            drift = 0.9 * drift + rng.normal(0, 0.2, devices)
            noise[:, bucket] = drift + rng.standard_t(3, devices) * 0.3
        values = values + noise
        values[treated, pre:] += harm
        series[name] = values
    return Evidence(
        seed=str(rng.integers(1 << 30)),
        devices=tuple(f"d{n}" for n in range(devices)),
        treated=tuple(bool(t) for t in treated),
        strata=tuple(strata or ["all"] * devices),
        pre=pre,
        series=series,
    )


def no_halt(made: Evidence) -> Evidence:
    """Leave no error to spend on halting, so that only growth is measured."""
    return msgspec.structs.replace(made, alpha_share=1e-9)


def outcomes(runs: int, policy: Policy, make: Callable[[np.random.Generator], Evidence]) -> list[Outcome]:
    return [assess(make(np.random.default_rng([7, run])), policy).verdict for run in range(runs)]


def test_harmless_releases_are_rarely_halted():
    """At most 5 % of 200, and a little for chance: the 99.9 % quantile of the binomial is 21."""
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=0.0, margin=1e-6),))
    found = outcomes(200, policy, evidence)
    assert found.count(Outcome.HALT) <= 21


def test_strata_that_drift_apart_do_not_halt():
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=0.0, margin=1e-6),))

    def make(rng: np.random.Generator) -> Evidence:
        strata = ["a"] * 20 + ["b"] * 10
        made = evidence(rng, devices=30, canaries=6, strata=strata)
        treated = np.zeros(30, dtype=bool)
        treated[rng.permutation(20)[:2]] = True
        treated[20 + rng.permutation(10)[:4]] = True
        made.series["m"][20:, made.pre :] += np.linspace(0, 3, 60)
        return msgspec.structs.replace(made, treated=tuple(bool(t) for t in treated))

    assert outcomes(100, policy, make).count(Outcome.HALT) <= 13


def test_harm_is_found():
    policy = one_metric()
    found = outcomes(20, policy, lambda rng: evidence(rng, harm=1.0))
    assert found.count(Outcome.HALT) >= 18


def test_harm_below_the_minimum_is_not_shown():
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=1.5, margin=1.5),))
    assert Outcome.HALT not in outcomes(20, policy, lambda rng: evidence(rng, harm=0.7))


def test_a_release_at_the_margin_rarely_advances():
    """Non-inferiority at 5 %: of 100 at the margin no more than 13 (99.9 %)."""
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=0.5, margin=0.5),))
    found = outcomes(100, policy, lambda rng: no_halt(evidence(rng, harm=0.5)))
    assert found.count(Outcome.ADVANCE) <= 13


def test_a_good_release_advances():
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=0.3, margin=1.2),))
    found = outcomes(20, policy, evidence)
    assert found.count(Outcome.ADVANCE) >= 18


def test_harm_that_comes_after_an_advance_halts():
    """The worker was away, or the rollout paused: its old word must not hide what it sees now."""
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=0.3, margin=1.2),))
    made = evidence(np.random.default_rng(10), canaries=5)
    early = msgspec.structs.replace(made, series={"m": made.series["m"][:, : made.pre + 30]})
    assert assess(early, policy).verdict is Outcome.ADVANCE
    made.series["m"][np.asarray(made.treated), made.pre + 30 :] += 20
    verdict = assess(made, policy)
    assert verdict.verdict is Outcome.HALT
    assert verdict.bucket is not None
    assert 30 < verdict.bucket <= 45
    assert any(look.verdict is Outcome.ADVANCE for look in verdict.looks), "an early look had advanced"


def test_only_the_latest_look_advances():
    """What was refuted once must still be refuted: here harm of the margin comes back, and none can halt."""
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=0.3, margin=1.2),))
    made = no_halt(evidence(np.random.default_rng(10), canaries=5))
    made.series["m"][np.asarray(made.treated), made.pre + 30 :] += 20
    verdict = assess(made, policy)
    assert verdict.verdict is Outcome.HOLD
    assert any(look.verdict is Outcome.ADVANCE for look in verdict.looks)


def test_an_advance_counts_from_the_look_since_which_all_advanced():
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=0.3, margin=1.2),))
    policy = msgspec.structs.replace(policy, min_soak_buckets=10)
    verdict = assess(evidence(np.random.default_rng(10), canaries=5), policy)
    assert verdict.verdict is Outcome.ADVANCE
    since = [
        look.verdict is Outcome.ADVANCE for look in verdict.looks if look.bucket >= (verdict.bucket or 0)
    ]
    assert all(since)
    assert verdict.looks[-len(since) - 1].verdict is Outcome.HOLD


@pytest.mark.parametrize("missing", [1, 4, 10, 19, 20])
def test_a_metric_that_canaries_do_not_give_never_advances(missing: int):
    """Not to be measured is not to pass."""
    metrics = tuple(Metric(name=name, minimum_harm=0.3, margin=1.2) for name in ("a", "b"))
    made = evidence(np.random.default_rng(6), devices=60, canaries=20, names=("a", "b"))
    policy = one_metric(metrics=metrics, min_coverage=0.96)
    assert assess(made, policy).verdict is Outcome.ADVANCE
    made.series["b"][np.flatnonzero(made.treated)[:missing], made.pre :] = np.nan
    verdict = assess(made, policy)
    assert verdict.verdict is not Outcome.ADVANCE
    assert "b" in verdict.reason.replace(";", " ").split()


def test_dead_metrics_rank_worst_below_the_coverage_too():
    """Half of the canaries no longer give the metric; the other half is much better than the controls."""
    made = no_halt(evidence(np.random.default_rng(4), canaries=4, names=("a", "b"), harm=-5.0))
    made.series["b"][np.flatnonzero(made.treated)[:2], made.pre :] = np.nan
    metrics = tuple(Metric(name=name, minimum_harm=0.1, margin=0.1) for name in ("a", "b"))
    verdict = assess(made, one_metric(metrics=metrics, min_coverage=0.01))
    assert verdict.verdict is Outcome.HOLD
    assert verdict.reason == "harm of the margin is not refuted yet: b"


def test_a_metric_that_canaries_no_longer_give_is_harm():
    made = evidence(np.random.default_rng(6), canaries=5, names=("a", "b"))
    made.series["b"][np.asarray(made.treated), made.pre + 10 :] = np.nan
    metrics = tuple(Metric(name=name, minimum_harm=9.0, margin=9.0) for name in ("a", "b"))
    verdict = assess(made, one_metric(metrics=metrics))
    assert verdict.verdict is Outcome.HALT
    assert verdict.reason == "harm shown: fewer canaries than controls give b"


def test_nothing_is_worse_than_zero_where_lower_is_worse_on_the_log_scale():
    """A throughput that stands still every second bucket is harm, not a gap."""
    metric = Metric(name="m", minimum_harm=0.1, margin=0.3, scale="log", higher_is_worse=False)
    made = evidence(np.random.default_rng(2), canaries=5)
    made.series["m"][:] = np.exp(made.series["m"])
    made.series["m"][np.asarray(made.treated), made.pre :: 2] = 0.0
    assert assess(made, one_metric(metrics=(metric,))).verdict is Outcome.HALT


def test_zero_on_the_log_scale_cannot_be_read_where_higher_is_worse():
    metric = Metric(name="m", minimum_harm=0.1, margin=0.3, scale="log")
    made = evidence(np.random.default_rng(2), canaries=5)
    made.series["m"][:] = np.exp(made.series["m"])
    made.series["m"][3, made.pre + 2] = 0.0
    verdict = assess(made, one_metric(metrics=(metric,)))
    assert (verdict.verdict, verdict.looks) == (Outcome.HOLD, ())
    assert "log scale" in verdict.reason


def test_every_metric_must_pass():
    metrics = tuple(Metric(name=name, minimum_harm=1.2, margin=1.2) for name in ("a", "b"))
    policy = one_metric(metrics=metrics)
    made = no_halt(evidence(np.random.default_rng(5), names=("a", "b")))
    assert assess(made, policy).verdict is Outcome.ADVANCE
    made.series["b"][np.asarray(made.treated), made.pre :] += 1.2
    verdict = assess(made, policy)
    assert verdict.verdict is Outcome.HOLD
    assert "b" in verdict.reason


def test_one_bad_metric_of_five_is_enough():
    names = tuple("abcde")
    policy = one_metric(metrics=tuple(Metric(name=name, minimum_harm=0.0, margin=0.5) for name in names))
    made = evidence(np.random.default_rng(3), names=names)
    made.series["c"][np.asarray(made.treated), made.pre :] += 2.0
    verdict = assess(made, policy)
    assert verdict.verdict is Outcome.HALT
    assert verdict.looks[-1].worst == "c"


def test_lower_can_be_worse():
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=0.0, margin=0.5, higher_is_worse=False),))
    rng = np.random.default_rng(1)
    assert assess(evidence(rng, harm=-1.5), policy).verdict is Outcome.HALT


def test_log_scale_is_relative():
    metric = Metric(name="m", minimum_harm=0.3, margin=0.5, scale="log")
    made = evidence(np.random.default_rng(2), harm=np.log(2.5))
    made.series["m"][:] = np.exp(made.series["m"])
    assert assess(made, one_metric(metrics=(metric,))).verdict is Outcome.HALT


@pytest.mark.parametrize("dead", [2, 3])
def test_canaries_that_die_halt(dead: int):
    """Silence is an outcome: whoever died must not drop out of the comparison."""
    made = evidence(np.random.default_rng(4), devices=40, canaries=3)
    made.series["m"][np.flatnonzero(made.treated)[:dead], made.pre + 10 :] = np.nan
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=9.0, margin=9.0),))
    verdict = assess(made, policy)
    assert verdict.verdict is Outcome.HALT
    assert "silent" in verdict.reason


def test_harm_is_found_beside_machines_that_stand():
    """Canaries that stand say nothing, and those that run are judged as ever."""

    def make(rng: np.random.Generator) -> Evidence:
        made = evidence(rng, canaries=6, harm=1.0)
        muted = np.zeros((20, 120), dtype=bool)
        muted[np.flatnonzero(made.treated)[:2], made.pre :] = True
        made.series["m"][muted] = np.nan
        return msgspec.structs.replace(made, muted=muted)

    assert outcomes(20, one_metric(), make).count(Outcome.HALT) >= 18
    made = make(np.random.default_rng(1))
    short = msgspec.structs.replace(made, muted=np.zeros((20, 1), dtype=bool))
    assert "unreadable" in assess(short, one_metric()).reason


def test_silent_canaries_never_advance():
    """One of three is dead from the start, the others are far better than the controls."""
    made = evidence(np.random.default_rng(4), harm=-5.0)
    made.series["m"][np.flatnonzero(made.treated)[0], made.pre :] = np.nan
    verdict = assess(made, one_metric())
    assert verdict.verdict is not Outcome.ADVANCE


def test_when_all_fall_silent_it_holds():
    made = evidence(np.random.default_rng(4))
    made.series["m"][:, made.pre + 10 :] = np.nan
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=9.0, margin=9.0),), min_soak_buckets=40)
    verdict = assess(made, policy)
    assert verdict.verdict is Outcome.HOLD
    assert "silent" in verdict.reason


@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_random_gaps_never_break_it(share: float, seed: int):
    rng = np.random.default_rng(seed)
    made = evidence(rng, pre=20, post=30)
    made.series["m"][rng.random(made.series["m"].shape) < share] = np.nan
    verdict = assess(made, one_metric(max_soak_buckets=30))
    assert verdict.reason


def test_no_period_before():
    rng = np.random.default_rng(9)
    made = evidence(rng, pre=0, harm=8.0)
    assert assess(made, one_metric()).verdict is Outcome.HALT


def test_the_same_evidence_gives_the_same_verdict_and_text_is_the_same_evidence():
    made = evidence(np.random.default_rng(11), devices=30, canaries=5, strata=["a"] * 15 + ["b"] * 15)
    made.series["m"][3, 70] = np.nan
    policy = one_metric()
    lines = list(trace.write(made, bucket_s=1.0, directions={"m": True}))
    again = trace.read(lines)
    assert again.directions == {"m": True}
    first = assess(made, policy)
    assert first == assess(again.evidence, policy)
    assert first.looks
    assert list(trace.write(again.evidence, bucket_s=1.0, directions={"m": True})) == lines


def test_later_buckets_do_not_change_earlier_looks():
    made = evidence(np.random.default_rng(12), harm=0.2)
    policy = one_metric(metrics=(Metric(name="m", minimum_harm=0.0, margin=0.1),))
    whole = assess(made, policy)
    part = msgspec.structs.replace(made, series={"m": made.series["m"][:, : made.pre + 25]})
    looks = assess(part, policy).looks
    assert looks == whole.looks[: len(looks)]


def test_evidence_that_cannot_be_read_holds():
    made = evidence(np.random.default_rng(13), harm=50.0)
    policy = one_metric()
    replace = msgspec.structs.replace
    infinite = made.series["m"].copy()
    infinite[0, 0] = np.inf
    cases = {
        "no devices": replace(made, devices=(), treated=(), strata=()),
        "no canaries": replace(made, treated=(False,) * 20),
        "no controls": replace(made, treated=(True,) * 20),
        "no evidence for m": replace(made, series={"other": made.series["m"]}),
        "since the activation": replace(made, series={"m": np.full((20, 120), np.nan)}),
        "infinite": replace(made, series={"m": infinite}),
        "differ in length": replace(made, strata=("a",)),
        "devices x buckets": replace(made, series={"m": made.series["m"][:5]}),
        "like the others": replace(made, pre=500),
    }
    for words, case in cases.items():
        verdict = assess(case, policy)
        assert verdict.verdict is Outcome.HOLD
        assert words in verdict.reason


def test_before_the_first_look_it_holds():
    made = evidence(np.random.default_rng(14), post=4, harm=50)
    verdict = assess(made, one_metric())
    assert (verdict.verdict, verdict.looks) == (Outcome.HOLD, ())


def test_too_few_devices_says_how_many_are_needed():
    made = evidence(np.random.default_rng(15), devices=4, canaries=1, harm=50)
    verdict = assess(made, one_metric())
    assert verdict.verdict is Outcome.HOLD
    assert verdict.too_few
    assert "at least 3 canaries beside 3 controls" in verdict.reason
    assert "at least 19 controls beside 1 canaries" in verdict.reason


@given(controls=st.integers(1, 100), alpha=st.sampled_from([0.01, 0.05, 0.1]))
def test_needed_numbers_are_the_smallest(controls: int, alpha: float):
    needed = design.canaries_needed(controls, alpha=alpha)
    if needed is not None:
        assert possible([(needed, needed + controls)]) * alpha >= 1
        assert possible([(needed - 1, needed - 1 + controls)]) * alpha < 1


@given(st.integers(1, 12))
def test_shares_of_alpha_add_up(stages: int):
    shares = design.alpha_shares(stages)
    assert len(shares) == stages
    late = sum(design.late_share(number) for number in range(1, 100))
    assert sum(own + watch for own, watch in shares) + late == pytest.approx(1)


@given(st.lists(st.floats(0, 40), min_size=1, max_size=8))
def test_no_late_watch_of_a_rollout_has_the_number_of_another(soaks: list[float]):
    """``soaks``: how long each stage was watched, in longest soaks, until the next one was activated."""
    numbers = []
    before = 0.0
    for soak in soaks:
        begun = [p for p in range(1, 10) if design.period(p, 100)[0] <= soak * 100]
        numbers += [design.late_number(before, p) for p in begun]
        before += soak
    assert len(numbers) == len(set(numbers))


def test_periods_follow_each_other():
    spans = [design.period(number, 12) for number in range(6)]
    assert [start + length for start, length in spans[:-1]] == [start for start, _ in spans[1:]]


def test_all_choices_are_written_down_or_sampled_alike():
    strata = np.array([0] * 6 + [1] * 4)
    treated = np.zeros(10, dtype=bool)
    treated[[0, 3, 7]] = True
    exact = Allocations(treated, strata, seed="s", limit=1000)
    rows = np.concatenate(list(exact.chunks()))
    assert exact.exact
    assert rows.shape == (15 * 4, 10)
    assert len(np.unique(rows, axis=0)) == 60
    assert (rows[0] == treated).all()
    sample = Allocations(treated, strata, seed="s", limit=50)
    drawn = np.concatenate(list(sample.chunks()))
    assert drawn.shape == (51, 10)
    assert (drawn[:, :6].sum(axis=1) == 2).all()
    assert (drawn[:, 6:].sum(axis=1) == 1).all()
    again = np.concatenate(list(Allocations(treated, strata, seed="s", limit=50).chunks()))
    assert (drawn == again).all()
    other = np.concatenate(list(Allocations(treated, strata, seed="t", limit=50).chunks()))
    assert not (drawn == other).all()


@given(st.integers(1, 20), st.floats(1.05, 3), st.integers(20, 2000))
def test_looks_rise_and_end_at_the_longest_soak(first: int, growth: float, last: int):
    looks = schedule(first, growth, last)
    assert looks[0] == first or looks == [last]
    assert looks[-1] == last
    assert all(a < b for a, b in itertools.pairwise(looks))
    shares = [spent(look, first, last) for look in looks]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_no_more_than_alpha_of_all_choices_is_ever_rejected(seed: int):
    """Whichever row were the real one: the number of rows that are rejected is bounded, ties or not."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 6, (200, 5)).astype(np.float32)
    looks = [5, 10, 20, 40, 60]
    rejected = 0
    for row in range(200):
        swapped = table.copy()
        swapped[[0, row]] = swapped[[row, 0]]
        rejected += first_crossing(swapped, looks, alpha=0.1, first=5, last=60)[0] is not None
    assert rejected <= 20
