"""Who may wait and who is told at once: on times that are made up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engine.serve.admission import BURST, CALM_S, FLOOR_S, MOST_S, Admission, Verdict

RUN_S = 0.02


OBJECTIVE_S = 2.75 * RUN_S


def plain(
    run_s: float = RUN_S, objective_s: float | None = OBJECTIVE_S, max_wait_s: float | None = None
) -> Admission:
    return Admission(run_s, run_s, objective_s, max_wait_s)


def flood(admission: Admission, ahead: float, times: int, now: float = 10.0) -> list[Verdict]:
    return [admission.ask(ahead * RUN_S, 1, now) for _ in range(times)]


def test_without_an_objective_clients_share_the_model_for_a_second_and_no_more():
    admission = plain(objective_s=None)
    assert admission.allowed_s(1) == admission.allowed_s(10) == MOST_S
    assert flood(admission, 16, 100) == [Verdict.TAKEN] * 100, "sixteen clients, as often as they like"
    assert flood(admission, 51, 3) == [Verdict.REFUSED] * 3


def test_an_objective_is_for_the_wait_and_the_run():
    admission = plain(objective_s=0.1)
    assert admission.allowed_s(1) == pytest.approx(0.08)
    assert flood(admission, 3.9, 50) == [Verdict.TAKEN] * 50
    assert plain(objective_s=0.01).allowed_s(1) == FLOOR_S, "an objective that cannot be met refuses no burst"


def test_an_operators_word_is_all_that_counts():
    admission = plain(objective_s=1.0, max_wait_s=0.05)
    assert not admission.derived
    assert flood(admission, 2, 3) == [Verdict.TAKEN] * 3
    assert flood(admission, 3, 3) == [Verdict.REFUSED] * 3
    assert plain(max_wait_s=0.0).ask(0.001, 1, 0.0) is Verdict.REFUSED


def test_a_burst_is_taken_and_one_that_goes_on_is_shed_once():
    admission = plain()
    assert flood(admission, 10, BURST + 3) == [Verdict.TAKEN] * BURST + [
        Verdict.SHED,
        Verdict.REFUSED,
        Verdict.REFUSED,
    ]
    assert flood(admission, 10, 1, 10 + CALM_S / 2) == [Verdict.REFUSED]
    assert flood(admission, 10, 1, 10 + CALM_S * 1.4) == [Verdict.REFUSED], "it was never calm for so long"
    assert flood(admission, 10, 1, 10 + CALM_S * 2.5) == [Verdict.TAKEN]


def test_no_burst_waits_for_very_long():
    admission = plain()
    assert flood(admission, int(MOST_S / RUN_S) + 2, 3) == [Verdict.REFUSED] * 3
    assert plain(2.0, 6.0).ask(3.0, 1, 0.0) is Verdict.TAKEN, "an objective allows what it allows"


def test_hopeless_teaches_what_asking_would():
    admission = plain()
    assert not admission.hopeless(0.2, 10.0), "a burst may be taken"
    flood(admission, 10, BURST + 1)
    assert admission.hopeless(0.2, 10.5)
    assert not admission.hopeless(0.03, 10.5)
    assert admission.hopeless(0.2, 10.5 + CALM_S * 0.9), "it has not been calm since"
    assert not admission.hopeless(0.2, 13.0)


def test_rows_that_run_together_cost_what_they_add():
    admission = Admission(0.010, 0.001, None, None)
    assert admission.takes_s(11) == pytest.approx(0.020)
    assert admission.takes_s(22, 2) == pytest.approx(0.040)
    for _ in range(200):
        admission.saw(11, 0.030)
    assert admission.takes_s(11) == pytest.approx(0.030, rel=0.01)
    assert admission.takes_s(1) == 0.010, "what runs together says nothing of a row alone"


def test_it_follows_a_model_that_becomes_slower_but_not_one_long_pause():
    admission = plain()
    admission.saw(1, 100.0)
    assert admission.takes_s(1) < 1.31 * RUN_S
    for _ in range(100):
        admission.saw(1, 3 * RUN_S)
    assert admission.takes_s(1) == pytest.approx(3 * RUN_S, rel=0.01)
    unknown = plain(0.0)
    unknown.saw(1, 0.5)
    assert unknown.takes_s(1) == 0.5


@given(
    run_s=st.floats(0.006, 0.5),
    load=st.floats(1.5, 20.0),
    jitter=st.lists(st.floats(0.8, 1.2), min_size=7, max_size=7),
)
def test_under_overload_who_is_taken_waits_for_two_runs_and_the_model_never_pauses(
    run_s: float, load: float, jitter: list[float]
):
    """A worker that runs one request after the other, asked ``load`` times as often as it can answer."""
    admission = plain(run_s, 2.75 * run_s)
    now = free_at = 0.0
    ends: list[float] = []
    waits: list[float] = []
    taken_at = 0
    for i in range(600):
        now += run_s / load * jitter[i % 7]
        ends = [end for end in ends if end > now]
        verdict = Verdict.TAKEN if len(ends) < 2 else admission.ask(max(0.0, free_at - now), 1, now)
        if verdict is Verdict.SHED:
            ends = ends[:2]
            free_at = ends[-1]
            waits = waits[: max(0, len(waits) - BURST)]
            taken_at = i
        if verdict is Verdict.TAKEN:
            waits.append(max(0.0, free_at - now))
            free_at = max(now, free_at) + run_s * jitter[i % 5]
            ends.append(free_at)
    after = waits[taken_at // 2 :] if taken_at else waits[:2]
    assert all(wait <= max(FLOOR_S, 2 * run_s) * 1.25 for wait in after)
    assert free_at >= now, "there is always something to run"
