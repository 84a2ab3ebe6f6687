"""What-if: the gate on a trace, without any server."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from contract.errors import PitheadError
from control_plane.core.gate import Evidence, Look, Outcome, Verdict, assess, trace
from control_plane.core.policy import Policy, parse


def read_policy(path: Path) -> dict[str, Any]:
    """Return a policy file's content, not yet checked; ``rollout.policy_invalid`` when it is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PitheadError("rollout.policy_invalid", f"{path}: {error}") from error


def replay_file(policy_path: Path, trace_path: Path) -> Iterator[str]:
    """Yield one JSON line per look and a last one with the verdict."""
    document = read_policy(policy_path)
    try:
        policy = parse(document)
    except PitheadError as error:
        raise PitheadError(error.code, f"{policy_path}: {error.detail}") from error
    try:
        with trace_path.open(encoding="utf-8") as lines:
            recorded = trace.read(lines)
    except PitheadError as error:
        raise PitheadError(error.code, f"{trace_path}: {error.detail}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PitheadError("rollout.trace_invalid", f"{trace_path}: {error}") from error
    _check(policy, recorded)
    return _lines(policy, recorded.evidence)


def _check(policy: Policy, recorded: trace.Trace) -> None:
    for name, higher_is_worse in recorded.directions.items():
        metric = policy.metric(name)
        if metric is not None and metric.higher_is_worse != higher_is_worse:
            raise PitheadError(
                "rollout.trace_invalid",
                f"higher_is_worse: the trace says {str(higher_is_worse).lower()} for {name!r}, "
                f"the policy {str(metric.higher_is_worse).lower()}",
            )


def _lines(policy: Policy, evidence: Evidence) -> Iterator[str]:
    verdict = assess(evidence, policy)
    for number, look in enumerate(verdict.looks, start=1):
        yield _json({"look": number, **_plain(look)})
    ignored = sorted(set(evidence.series) - {metric.name for metric in policy.metrics})
    yield _json(
        {
            "verdict": verdict.verdict.value,
            "bucket": verdict.bucket,
            "reason": _reason(verdict, policy, evidence),
            "looks": len(verdict.looks),
            "permutations": verdict.permutations,
            "exact": verdict.exact,
            "too_few": verdict.too_few,
            "ignored_metrics": ignored,
        }
    )


def _reason(verdict: Verdict, policy: Policy, evidence: Evidence) -> str:
    if verdict.verdict is not Outcome.HOLD or not verdict.looks:
        return verdict.reason
    if verdict.exhausted:
        return f"held for the longest soak ({policy.max_soak_buckets} buckets): {verdict.reason}"
    last = len(next(iter(evidence.series.values()))[0]) - evidence.pre
    return f"the trace ends at bucket {last} of {policy.max_soak_buckets}: {verdict.reason}"


def _plain(look: Look) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(look)
    return fields


def _json(value: dict[str, Any]) -> str:
    return msgspec.json.encode(value).decode()
