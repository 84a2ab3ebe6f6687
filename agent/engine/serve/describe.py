"""What the protocol's documents say of a server and its models: values, as they are encoded."""

import time
from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from agent.engine.serve.pipeline_plan import Plan
from agent.engine.serve.served import Live
from agent.engine.serve.statistics import Statistics
from contract.manifest import TensorSpec

SERVER_NAME: Final = "pithead"
EXTENSIONS: Final = (
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)
_TYPES: Final[Mapping[str, str]] = {"BYTES": "TYPE_STRING"}


class ServerMetadata(Struct, frozen=True):
    """``GET v2``."""

    name: str
    version: str
    extensions: tuple[str, ...]


class TensorMetadata(Struct, frozen=True):
    """An input or output of a model."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(Struct, frozen=True):
    """``GET v2/models/{m}``."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class IndexEntry(Struct, frozen=True):
    """A line of the repository's index."""

    name: str
    version: str
    state: str
    reason: str


def model_metadata(live: Live, versions: tuple[str, ...]) -> ModelMetadata:
    """Return what clients need to ask a model."""
    return ModelMetadata(
        live.candidate.name,
        versions,
        live.candidate.platform,
        _metadata(live.opened.inputs),
        _metadata(live.opened.outputs),
    )


def pipeline_metadata(name: str, version: str, plan: Plan) -> ModelMetadata:
    """Return what clients need to ask a pipeline."""
    return ModelMetadata(name, (version,), "ensemble", _metadata(plan.inputs), _metadata(plan.outputs))


def _metadata(specs: tuple[TensorSpec, ...]) -> tuple[TensorMetadata, ...]:
    return tuple(TensorMetadata(s.name, s.datatype, s.shape) for s in specs)


def model_config(live: Live, versions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration in the form of Triton's ``ModelConfig``, which its clients read.

    ``versions`` is its version policy. With batching the first dimension is not among ``dims``, as there.
    """
    batches = live.runner.batches
    policy = live.policy

    config: dict[str, Any] = {
        "name": live.candidate.name,
        "platform": live.candidate.platform,
        "backend": live.candidate.platform.partition("_")[0],
        "version_policy": versions,
        "max_batch_size": policy.max_batch if batches else 0,
        "input": _dims(live.opened.inputs, batches=batches),
        "output": _dims(live.opened.outputs, batches=batches),
        "instance_group": [{"name": live.candidate.name, "kind": "KIND_CPU", "count": 1}],
        "parameters": {
            "accelerator": {"string_value": live.opened.session.accelerator},
            "runtime": {"string_value": live.opened.session.runtime},
            "runs": {"string_value": "inline" if live.runner.inline else "in a thread"},
        },
    }
    if live.cache is not None:
        config["response_cache"] = {"enable": True}
    if batches:
        config["dynamic_batching"] = {
            "preferred_batch_size": list(policy.preferred),
            "max_queue_delay_microseconds": policy.max_delay_us,
            "default_queue_policy": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": round(policy.timeout_s * 1e6),
                "max_queue_size": policy.max_queue,
            },
        }
    return config


def pipeline_config(name: str, plan: Plan, max_batch: int) -> dict[str, Any]:
    """Return a pipeline's configuration as that of an ensemble of Triton's."""
    return {
        "name": name,
        "platform": "ensemble",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": max_batch if plan.batches else 0,
        "input": _dims(plan.inputs, batches=plan.batches),
        "output": _dims(plan.outputs, batches=plan.batches),
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": step.model,
                    "model_version": int(step.version) if step.version.isdecimal() else -1,
                    "input_map": dict(step.inputs),
                    "output_map": dict(step.outputs),
                }
                for step in plan.steps
            ]
        },
    }


def _dims(specs: tuple[TensorSpec, ...], *, batches: bool) -> list[dict[str, Any]]:
    return [
        {
            "name": s.name,
            "data_type": _TYPES.get(s.datatype, f"TYPE_{s.datatype}"),
            "dims": list(s.shape[1:] if batches else s.shape),
        }
        for s in specs
    ]


def wall_ms(monotonic_ns: int) -> int:
    """Return the Unix time in ms of a moment of the monotonic clock."""
    return (time.time_ns() - time.monotonic_ns() + monotonic_ns) // 1_000_000


def model_statistics(name: str, version: str, s: Statistics, last_ms: int) -> dict[str, Any]:
    """Return one element of ``model_stats``; as Triton does, ``success`` and ``queue`` count hits too."""

    def duration(count: int, ns: int) -> dict[str, int]:
        return {"count": count, "ns": ns}

    n, runs = s.successes, s.successes - s.hits
    return {
        "name": name,
        "version": version,
        "last_inference": last_ms,
        "inference_count": s.rows,
        "execution_count": s.executions,
        "inference_stats": {
            "success": duration(n, s.total_ns),
            "fail": duration(s.failures, s.failures_ns),
            "queue": duration(n, s.queue_ns),
            "compute_input": duration(runs, s.input_ns),
            "compute_infer": duration(runs, s.infer_ns),
            "compute_output": duration(runs, s.output_ns),
            "cache_hit": duration(s.hits, s.hits_ns),
            "cache_miss": duration(s.misses, s.misses_ns),
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": duration(count, 0),
                "compute_infer": duration(count, ns),
                "compute_output": duration(count, 0),
            }
            for rows, (count, ns) in sorted(s.batches.items())
        ],
    }
