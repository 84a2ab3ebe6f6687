from hypothesis import given
from hypothesis import strategies as st

from control_plane.core import strata
from control_plane.core.policy import Policy, Stage
from control_plane.core.progress import hold_out_size, stage_size

FLEETS = st.dictionaries(
    st.integers(0, 10_000).map(lambda n: f"device-{n}"), st.sampled_from(["a", "b", "c"]), max_size=60
)


@given(fleet=FLEETS, rollout=st.text(max_size=8))
def test_the_order_is_a_permutation_and_does_not_depend_on_the_input_order(
    fleet: dict[str, str], rollout: str
):
    line = strata.order(rollout, fleet)
    assert sorted(line) == sorted(fleet)
    assert line == strata.order(rollout, dict(reversed(list(fleet.items()))))


@given(fleet=FLEETS, rollout=st.text(max_size=8), n=st.integers(0, 60))
def test_every_beginning_is_balanced(fleet: dict[str, str], rollout: str, n: int):
    """Each stratum gets its share, within one device."""
    n = min(n, len(fleet))
    chosen = strata.order(rollout, fleet)[:n]
    for stratum in set(fleet.values()):
        size = sum(s == stratum for s in fleet.values())
        got = sum(fleet[device] == stratum for device in chosen)
        assert abs(got - n * size / len(fleet)) <= 1.5


@given(fleet=FLEETS, rollout=st.text(max_size=8), k=st.integers(0, 70), h=st.integers(0, 70))
def test_choice_divides_the_devices(fleet: dict[str, str], rollout: str, k: int, h: int):
    choice = strata.choose(rollout, fleet, canaries=k, hold_out=h)
    assert set(choice.canaries).isdisjoint(choice.controls)
    assert sorted([*choice.canaries, *choice.controls]) == sorted(fleet)
    assert set(choice.hold_out) <= set(choice.controls)
    assert len(choice.canaries) <= k
    if fleet:
        assert len(choice.hold_out) == min(h, len(fleet) - 1)
        assert len(choice.canaries) == min(k, len(fleet) - len(choice.hold_out))


@given(fleet=FLEETS, rollout=st.text(max_size=8))
def test_the_hold_out_stays_through_the_stages(fleet: dict[str, str], rollout: str):
    first = strata.choose(rollout, fleet, canaries=3, hold_out=4)
    rest = {device: fleet[device] for device in first.controls}
    second = strata.choose(rollout, rest, canaries=50, hold_out=4, kept=first.hold_out)
    assert set(second.hold_out) == set(first.hold_out)
    assert set(second.canaries).isdisjoint(first.hold_out)


def test_another_rollout_has_other_guinea_pigs():
    fleet = dict.fromkeys((f"d{n}" for n in range(50)), "a")
    first = {strata.order(f"rollout-{n}", fleet)[0] for n in range(40)}
    assert len(first) > 15


def test_each_device_is_as_likely():
    """The chance of being the canary among 8 is 1/8: 4,000 draws within 5 standard deviations."""
    fleet = dict.fromkeys((f"d{n}" for n in range(8)), "a")
    draws = [strata.order(f"r{n}", fleet)[0] for n in range(4000)]
    for device in fleet:
        assert abs(draws.count(device) - 500) < 5 * (4000 * 1 / 8 * 7 / 8) ** 0.5


def test_small_strata_are_put_together():
    fleet = {f"big-{n}": "big" for n in range(5)} | {"x": "one", "y": "two"}
    merged = strata.merge_small(fleet)
    assert merged["x"] == merged["y"] == strata.MIXED
    assert merged["big-0"] == "big"


@given(n=st.integers(0, 5000), percent=st.integers(1, 100))
def test_stage_sizes(n: int, percent: int):
    policy = Policy(stages=(Stage(percent=percent),))
    assert stage_size(policy, 0, n) == -(-n * percent // 100)


@given(n=st.integers(0, 3000))
def test_hold_out_is_never_more_than_a_third_nor_less_than_its_share(n: int):
    held = hold_out_size(Policy(), n)
    assert held <= max(1, n // 3)
    if n >= 20:
        assert held >= n * 0.05
    assert hold_out_size(Policy(hold_out_percent=0), n) == 0
