import tomllib

import pytest

from contract.errors import PitheadError
from control_plane.core.policy import Policy, parse, require_live

SMALLEST = """
alpha = 0.05
max_soak_buckets = 480
[[metrics]]
name = "latency_p95_ms"
higher_is_worse = true
minimum_harm = 0.2
margin = 0.5
"""


def test_the_smallest_policy_of_the_design():
    policy = parse(tomllib.loads(SMALLEST))
    assert policy.max_soak_buckets == 480
    assert policy.metrics[0].margin == 0.5
    assert policy.shortest_soak == 120


def test_a_whole_policy():
    policy = parse(
        tomllib.loads(
            SMALLEST
            + """
[guardrails]
rolled_back = 3
[[stages]]
devices = 1
[[stages]]
percent = 50
"""
        )
    )
    assert policy.guardrails.rolled_back == 3
    assert [stage.percent for stage in policy.stages] == [None, 50]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("alhpa = 0.1", "alhpa"),
        ("[guardrails]\nrefuzed = 3", "refuzed"),
        ("alpha = 0.7", "$.alpha"),
        ("alpha = nan", "alpha"),
        ("bucket_s = inf", "bucket_s"),
        ("stages = []", "$.stages"),
        ("stages = [{devices=3}, {devices=2}]", "larger"),
        ("stages = [{devices=3, percent=5}]", "$.stages[0]"),
        ("stages = [{}]", "$.stages[0]"),
        ("metrics = []", "$.metrics"),
        ('metrics = [{name="a", margin=1}]', "minimum_harm"),
        ('metrics = [{name="a", margin=0, minimum_harm=0}]', "$.metrics[0].margin"),
        ('metrics = [{name="a", margin="1", minimum_harm=0}]', "$.metrics[0].margin"),
        (
            'metrics = [{name="a", margin=1, minimum_harm=0}, {name="a", margin=1, minimum_harm=0}]',
            "same name",
        ),
        ('metrics = [{name="a", margin=1, minimum_harm=2}]', "minimum_harm"),
        ('metrics = [{name="alarm_rate", scale="log", margin=1, minimum_harm=0}]', "scale"),
        ("first_look = 500\nmax_soak_buckets = 100", "first_look"),
        ("min_soak_buckets = 500\nmax_soak_buckets = 100", "min_soak_buckets"),
        ('on_halt = "shrug"', "$.on_halt"),
        ('strategy = "big_bang"', "$.strategy"),
    ],
)
def test_a_wrong_policy_is_refused_and_named(text: str, named: str):
    with pytest.raises(PitheadError) as caught:
        parse(tomllib.loads(text))
    assert caught.value.code == "rollout.policy_invalid"
    assert named in caught.value.detail


def test_a_live_rollout_compares_what_devices_report():
    require_live(Policy())
    with pytest.raises(PitheadError, match="latency_p95_ms"):
        require_live(parse(tomllib.loads(SMALLEST)))
