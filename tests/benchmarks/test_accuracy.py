"""NAB's rules on cases that can be worked out by hand, and the figures that are asked of a data set."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bench_accuracy
from benchmarks.accuracy import common, fan, nab, recorded
from benchmarks.accuracy.nab_rules import Profile, Series, probation, sweep, worth

needs_data = pytest.mark.skipif(
    not (common.DATA / "sensors").is_dir(), reason=f"no recordings at {common.DATA}; set PITHEAD_SHARED_DATA"
)


def series(rows: int, above: dict[int, float], *windows: tuple[int, int]) -> Series:
    scores = np.zeros(rows)
    for row, score in above.items():
        scores[row] = score
    return Series(scores, windows)


def s(position: float) -> float:
    """NAB's scaled sigmoid, as it is published."""
    return 2 / (1 + math.exp(5 * position)) - 1


def test_a_row_is_worth_what_its_place_says():
    value, inside = worth(series(400, {}, (200, 209)))
    assert inside[199:211].tolist() == [-1, *[0] * 10, -1]
    assert value[200] == pytest.approx(1.0)
    assert value[204] == pytest.approx(s(-0.6) / s(-1))
    assert value[209] == pytest.approx(s(-0.1) / s(-1))
    assert value[100] == -0.11
    assert value[210] == pytest.approx(0.11 * s(1 / 9))
    assert value[227] == pytest.approx(0.11 * s(2.0))
    assert value[300] == -0.11


def test_a_window_counts_once_and_by_its_best_row():
    found = sweep([series(400, {205: 0.9, 202: 0.9, 100: 0.5}, (200, 209))])
    assert found.thresholds.tolist() == [math.inf, 0.9, 0.5, 0.0]
    best = s(-0.8) / s(-1)
    assert found.sums[:3] == pytest.approx([-1.0, best, best - 0.11])
    assert found.best == (0.9, pytest.approx(best))
    assert (found.at(0.95), found.at(0.7)) == (-1.0, pytest.approx(best))


def test_the_scale_goes_from_silence_to_all_windows_at_once():
    corpus = [series(400, {200: 1.0}, (200, 209)), series(400, {300: 1.0, 350: 1.0}, (300, 309), (350, 359))]
    found = sweep(corpus)
    assert found.windows == 3
    assert found.scaled(float(found.sums[0])) == 0
    assert found.scaled(found.best[1]) == pytest.approx(100)
    assert sweep(corpus, Profile(false_negative=2.0)).sums[0] == -6


def test_the_probation_counts_for_nothing():
    assert [probation(n) for n in (100, 4032, 22695)] == [15, 604, 750]
    assert sweep([series(400, {10: 1.0, 59: 1.0})]).best == (math.inf, 0.0)
    assert sweep([series(400, {60: 1.0})]).sums[1] == pytest.approx(-0.11)


@given(
    st.lists(st.integers(0, 4), min_size=120, max_size=120),
    st.integers(20, 40),
    st.integers(2, 20),
    st.integers(70, 99),
)
def test_sums_are_those_of_counting_at_each_threshold(scores: list[int], first: int, width: int, second: int):
    windows = ((first, first + width - 1), (second, second + width - 1))
    one = Series(np.array(scores, np.float64), windows)
    found = sweep([one])
    value, inside = worth(one)
    for threshold, total in zip(found.thresholds, found.sums, strict=True):
        rows = [i for i in range(probation(120), 120) if scores[i] >= threshold]
        want = sum(value[i] for i in rows if inside[i] < 0)
        want += sum(max((value[i] for i in rows if inside[i] == w), default=-1.0) for w in (0, 1))
        assert total == pytest.approx(want)


@needs_data
def test_silence_costs_a_point_for_each_window_that_nab_labels():
    """NAB's own `null` detector has -4 on the machine's temperature, which has four windows."""
    loaded = {one.name: one for one in nab.load()}
    assert sum(len(one.windows) for one in loaded.values()) == 19
    machine = loaded["machine_temperature_system_failure"]
    found = sweep([Series(np.zeros(len(machine.values)), machine.windows)])
    assert found.sums[0] == -4


@needs_data
def test_the_fan_at_high_speed_reaches_what_is_asked(tmp_path: Path):
    lines = list(fan.results(tmp_path, ("high",), {"std": fan.MODELS["Mahalanobis on std"]}))
    judged = {line.variant: line.ours for line in lines if line.target is not None}
    assert set(judged) == set(common.VARIANTS)
    assert min(judged.values()) >= 0.95


@needs_data
def test_recorded_outputs_are_within_their_tolerance(tmp_path: Path):
    lines = list(recorded.results(tmp_path))
    assert len(lines) == 15
    assert [line.model for line in lines if line.verdict != "ok"] == []


def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *results: common.Result):
    def absent(scratch: Path) -> Iterator[common.Result]:
        raise common.Absent("nothing is there")
        yield

    monkeypatch.setattr(bench_accuracy, "DATA_SETS", {"made-up": lambda _: iter(results), "gone": absent})
    monkeypatch.setattr("sys.argv", ["bench_accuracy.py", "--json"])
    with pytest.raises(SystemExit) as ended:
        bench_accuracy.main()
    return ended.value.code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("ours", "code", "verdict"), [(0.95, 0, "ok"), (0.9499, 1, "missed")])
def test_a_missed_target_is_an_exit_code_and_absent_data_are_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ours: float,
    code: int,
    verdict: str,
):
    free = common.Result("d", "m", "v", "recall", 0.1)
    asked = common.Result("d", "m", "v", "AUC", ours, common.Published(0.9, "a paper"), 0.95)
    ended, facts = main(monkeypatch, capsys, free, asked)
    assert ended == code
    assert facts["skipped"] == {"gone": "nothing is there"}
    assert [line["verdict"] for line in facts["results"]] == ["", verdict]
    assert facts["results"][1]["difference"] == pytest.approx(ours - 0.9)
