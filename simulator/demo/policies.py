"""The policies of the demo's rollouts: plain policy documents, with a plant's hours cut down to seconds."""

from typing import Any, Final

FAST: Final[dict[str, Any]] = {
    "bucket_s": 1.0,
    "trial_s": 2.0,
    "health_s": 2.0,
    "delivery_s": 2.0,
    "deadline_s": 120.0,
    "activation_s": 60.0,
    "pre_buckets": 20,
    "min_pre_buckets": 10,
    "max_soak_buckets": 60,
    "silent_buckets": 15,
}

FIRST_INSTALL: Final[dict[str, Any]] = {
    **FAST,
    "strategy": "all_at_once",
    "stages": [{"percent": 100}],
    "hold_out_percent": 0.0,
    "min_soak_buckets": 3,
}

CANARY: Final[dict[str, Any]] = {
    **FAST,
    "stages": [{"devices": 3}, {"percent": 50}, {"percent": 100}],
    "hold_out_percent": 5.0,
    "metrics": [
        {"name": "alarm_rate", "minimum_harm": 0.02, "margin": 0.06},
        {"name": "latency_p95_us", "minimum_harm": 0.5, "margin": 3.0},
        {"name": "error_rate", "minimum_harm": 0.01, "margin": 0.05},
    ],
}
"""Rates in shares of windows, latency relative: 40 processes on two cores are a noisy clock."""
ENOUGH: Final = 12
"""With fewer devices a stage has too few canaries or controls for the gate to decide."""
SHORT_SOAK: Final = 20
"""Buckets after which a person is asked, where waiting longer would not help the gate."""


def canary(devices: int) -> dict[str, Any]:
    """Return the policy of a canary rollout among so many devices."""
    return CANARY if devices >= ENOUGH else {**CANARY, "max_soak_buckets": SHORT_SOAK}


def everybody_may_refuse(devices: int) -> dict[str, Any]:
    """Return a policy whose guardrails let every device judge for itself."""
    return {
        **FIRST_INSTALL,
        "guardrails": {"refused": devices + 1, "rolled_back": devices + 1},
        "deadline_s": 30.0,
    }
