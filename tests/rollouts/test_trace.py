"""Traces and `pithead rollouts replay`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from contract.errors import PitheadError
from control_plane.cli.rollouts import rollouts_app
from control_plane.core.gate import trace

POLICY = """
alpha = 0.05
max_soak_buckets = 48
[[metrics]]
name = "latency_p95_ms"
higher_is_worse = true
minimum_harm = 0.2
margin = 0.8
"""
HEADER: dict[str, Any] = {
    "metric": "latency_p95_ms",
    "bucket_s": 60,
    "devices": ["a", "b", "c"],
    "treated": ["a"],
    "activated_at": 1,
    "higher_is_worse": True,
}


def lines(header: dict[str, Any], *rows: str) -> list[str]:
    return [json.dumps(header), *rows]


def recorded(tmp_path: Path, harm: float, metric: str = "latency_p95_ms", devices: int = 20) -> Path:
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, devices) + rng.normal(0, 0.3, (84, devices))
    values[36:, :3] += harm
    names = [f"d{n}" for n in range(devices)]
    header = HEADER | {"metric": metric, "devices": names, "treated": names[:3], "activated_at": 36}
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines(header, *(json.dumps(list(row)) for row in values))) + "\n")
    return path


def replay(tmp_path: Path, trace_path: Path, policy: str = POLICY) -> list[dict[str, Any]]:
    policy_path = tmp_path / "policy.toml"
    policy_path.write_text(policy)
    arguments = ["replay", "--policy", str(policy_path), "--trace", str(trace_path)]
    done = CliRunner().invoke(rollouts_app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("harm", "verdict"), [(0.0, "advance"), (2.0, "halt")])
def test_replay_prints_every_look_and_the_verdict(tmp_path: Path, harm: float, verdict: str):
    *looks, last = replay(tmp_path, recorded(tmp_path, harm))
    assert last["verdict"] == verdict
    assert last["looks"] == len(looks)
    assert last["bucket"] == next(look["bucket"] for look in looks if look["verdict"] == verdict)
    assert all(look["verdict"] == "hold" for look in looks if look["bucket"] < last["bucket"])
    assert [look["look"] for look in looks] == list(range(1, len(looks) + 1))


def test_replay_of_a_trace_without_the_metric_holds(tmp_path: Path):
    (last,) = replay(tmp_path, recorded(tmp_path, 2.0, metric="other"))
    assert (last["verdict"], last["bucket"], last["looks"]) == ("hold", None, 0)
    assert last["ignored_metrics"] == ["other"]
    assert "latency_p95_ms" in last["reason"]


def test_replay_says_when_the_trace_is_too_short(tmp_path: Path):
    path = recorded(tmp_path, 0.4)
    path.write_text("\n".join(path.read_text().splitlines()[:45]))
    last = replay(tmp_path, path)[-1]
    assert last["verdict"] == "hold"
    assert "the trace ends at bucket 8 of 48" in last["reason"]


def test_replay_refuses_a_trace_that_contradicts_the_policy(tmp_path: Path):
    with pytest.raises(PitheadError, match="higher_is_worse"):
        replay(tmp_path, recorded(tmp_path, 0.0), POLICY.replace("= true", "= false"))


def test_replay_names_a_wrong_policy_key(tmp_path: Path):
    with pytest.raises(PitheadError, match="alhpa") as caught:
        replay(tmp_path, recorded(tmp_path, 0.0), POLICY.replace("alpha", "alhpa"))
    assert caught.value.code == "rollout.policy_invalid"


def test_several_metrics_and_missing_values():
    second = HEADER | {"metric": "error_rate", "higher_is_worse": False}
    found = trace.read(
        [*lines(HEADER, "[1, 2, null]", "[1, 2, 3]"), *lines(second, "[0,0,0]", "[null,null,1]")]
    )
    assert list(found.evidence.series) == ["latency_p95_ms", "error_rate"]
    assert np.isnan(found.evidence.series["latency_p95_ms"][2, 0])
    assert found.evidence.treated == (True, False, False)
    assert found.directions == {"latency_p95_ms": True, "error_rate": False}


def test_what_was_muted_is_neither_a_number_nor_missing():
    second = HEADER | {"metric": "error_rate"}
    given = [
        *lines(HEADER, '[1.0,"muted",null]', "[1.0,2.0,3.0]"),
        *lines(second, "[0.0,0.5,null]", "[0.0,0.0,0.0]"),
    ]
    found = trace.read(given).evidence
    assert found.muted.tolist() == [[False, False], [True, False], [False, False]]
    assert np.isnan(found.series["latency_p95_ms"][1, 0])
    again = list(trace.write(found, bucket_s=60.0, directions={}))
    assert [line for line in again if line.startswith("[")] == [
        line for line in given if line.startswith("[")
    ]
    assert trace.read(lines(HEADER, "[1,2,null]")).evidence.muted is None


def test_treated_may_be_booleans():
    header = HEADER | {"treated": [False, True, False], "strata": ["x", "x", "y"]}
    found = trace.read(lines(header, "[1,2,3]"))
    assert found.evidence.treated == (False, True, False)
    assert found.evidence.strata == ("x", "x", "y")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([], "empty"),
        (["[1, 2, 3]"], "line 1: a row"),
        (["nonsense"], "line 1: not JSON"),
        (["{}"], "line 1: header: Object missing required field `metric`"),
        (lines(HEADER | {"devices": []}), "line 1: devices"),
        (lines(HEADER | {"devices": ["a", "a", "b"]}), "line 1: devices"),
        (lines(HEADER | {"treated": ["z"]}), "line 1: treated: 'z'"),
        (lines(HEADER | {"treated": [True]}), "line 1: treated"),
        (
            lines(HEADER | {"devices": [0, 1, 2], "treated": [1, 0, 0]}),
            "line 1: treated: a device comes twice",
        ),
        (lines(HEADER | {"strata": ["x"]}), "line 1: strata"),
        (lines(HEADER | {"activated_at": -1}), "line 1: activated_at"),
        (lines(HEADER | {"activated_at": "soon"}), "activated_at"),
        (lines(HEADER, "[1,2,3]", "[1,2]"), "line 3: 2 values for 3 devices"),
        (lines(HEADER, '[1,2,"x"]'), "line 2: Invalid enum value 'x' - at `$[2]`; give numbers, null"),
        (lines(HEADER, "[1,2,NaN]"), "line 2: not JSON"),
        (lines(HEADER | {"activated_at": 9}, "[1,2,3]"), "line 1: activated_at"),
        ([*lines(HEADER, "[1,2,3]"), *lines(HEADER, "[1,2,3]")], "line 3: metric"),
        ([*lines(HEADER, "[1,2,3]"), *lines(HEADER | {"metric": "b"})], "line 3: 0 buckets"),
        ([*lines(HEADER, "[1,2,3]"), *lines(HEADER | {"metric": "b", "treated": ["b"]})], "line 3: treated"),
    ],
)
def test_a_wrong_trace_is_refused_by_line_and_field(content: list[str], named: str):
    with pytest.raises(PitheadError) as caught:
        trace.read(content)
    assert caught.value.code == "rollout.trace_invalid"
    assert named in caught.value.detail
