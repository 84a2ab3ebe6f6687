"""Prometheus' text form of what is counted anyway: nothing is computed until somebody asks.

Names and types follow https://prometheus.io/docs/practices/naming/.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from agent.engine.serve.entries import Version
from agent.engine.serve.http import Server
from agent.engine.serve.pipeline import VERSION
from agent.engine.serve.served import Live
from agent.engine.serve.service import Service
from agent.engine.serve.shadow import Counts
from agent.engine.serve.statistics import BOUNDS_US, Statistics

_GAUGES: Final[tuple[tuple[str, str, Callable[[Live], int]], ...]] = (
    ("pithead_model_loaded", "1 while a session is in memory.", lambda _: 1),
    ("pithead_model_waiting", "Requests that wait for a run.", lambda live: live.runner.waiting),
    ("pithead_model_in_flight", "Requests that are not answered.", lambda live: live.in_flight),
    (
        "pithead_model_batch_limit",
        "Rows that may run together just now.",
        lambda live: live.runner.batch_limit,
    ),
    ("pithead_model_memory_bytes", "Measured when it was loaded.", lambda live: live.memory_bytes),
    (
        "pithead_cache_bytes",
        "Answers that are kept, and their questions.",
        lambda live: 0 if live.cache is None else live.cache.bytes,
    ),
    (
        "pithead_cache_entries",
        "Answers that are kept.",
        lambda live: 0 if live.cache is None else len(live.cache),
    ),
)
_SHADOW: Final[tuple[tuple[str, str, str, Callable[[Counts], float]], ...]] = (
    ("pithead_shadow_class_flips_total", "counter", "Rows with another class.", lambda c: c.flips),
    ("pithead_shadow_classified_rows_total", "counter", "Rows looked at for it.", lambda c: c.rows),
    ("pithead_shadow_difference_max", "gauge", "Largest absolute difference.", lambda c: c.largest),
    ("pithead_shadow_difference_sum", "counter", "Of all absolute differences.", lambda c: c.total),
    ("pithead_shadow_values_total", "counter", "Values compared.", lambda c: c.values),
    ("pithead_shadow_cpu_seconds_total", "counter", "Measured cost.", lambda c: c.cpu_s),
)
_ARMS: Final = (
    ("pithead_bandit_requests_total", "Answers, by version; across restarts.", "requests"),
    ("pithead_bandit_rewards_total", "Rewards fed back.", "rewards"),
    ("pithead_bandit_reward_sum", "Their sum.", "reward"),
)


def render(service: Service, server: Server) -> bytes:
    """Return the page."""
    return (
        "\n".join([*_models(service), *_rates(service), *_process(service), *_http(server), *_grpc(service)])
        + "\n"
    ).encode()


def _head(name: str, kind: str, words: str) -> tuple[str, str]:
    return f"# HELP {name} {words}", f"# TYPE {name} {kind}"


def _models(service: Service) -> Iterator[str]:
    versions = _versions(service)
    counted = [(labels, v.statistics) for labels, v in versions]
    counted += [(_labels(p.name, VERSION), p.statistics) for p in service.pipelines]
    yield from _counters(counted)
    yield from _caches(counted)
    yield from _histogram(counted)
    yield from _gauges(versions)
    yield from _steering(service)


def _versions(service: Service) -> list[tuple[str, Version]]:
    return [
        (_labels(v.candidate.name, v.candidate.version), v)
        for entry in service.catalogue.entries.values()
        for v in entry.versions.values()
    ]


def _labels(model: str, version: str) -> str:
    return f'model="{_escaped(model)}",version="{_escaped(version)}"'


def _counters(counted: Sequence[tuple[str, Statistics]]) -> Iterator[str]:
    yield from _head("pithead_inference_requests_total", "counter", "Requests by outcome.")
    for labels, s in counted:
        for outcome, count in (("success", s.successes), ("failure", s.failures), ("refused", s.refused)):
            yield f'pithead_inference_requests_total{{{labels},outcome="{outcome}"}} {count}'
    for name, words, attribute in (
        ("pithead_inferences_total", "Inferences; a batch of n counts n times.", "rows"),
        ("pithead_inference_runs_total", "Runs of the model.", "executions"),
    ):
        yield from _head(name, "counter", words)
        for labels, s in counted:
            yield f"{name}{{{labels}}} {getattr(s, attribute)}"
    yield from _head("pithead_inference_seconds_total", "counter", "Time of answered requests, by part.")
    for labels, s in counted:
        for part, ns in (
            ("queue", s.queue_ns),
            ("input", s.input_ns),
            ("infer", s.infer_ns),
            ("output", s.output_ns),
        ):
            yield f'pithead_inference_seconds_total{{{labels},part="{part}"}} {ns * 1e-9:.9f}'


def _steering(service: Service) -> Iterator[str]:
    steered = list(service.steering)
    if not steered:
        return
    yield from _head(
        "pithead_steered_requests_total", "counter", "Requests that named no version, by version."
    )
    for each in steered:
        for version, count in each.counts.items():
            yield f"pithead_steered_requests_total{{{_labels(each.name, version)}}} {count}"
    for name, words, attribute in _ARMS:
        yield from _head(name, "counter", words)
        for each in steered:
            for version, arm in each.arms.items():
                yield f"{name}{{{_labels(each.name, version)}}} {getattr(arm, attribute):g}"
    yield from _shadows([(_escaped(s.name), s.shadowing.counts) for s in steered if s.shadowing is not None])


def _shadows(shadows: Sequence[tuple[str, Counts]]) -> Iterator[str]:
    yield from _head("pithead_shadow_requests_total", "counter", "Requests sampled for a shadow, by outcome.")
    for model, c in shadows:
        outcomes = {"agreed": c.agreed, "differed": c.compared - c.agreed, "failed": c.failed}
        outcomes |= {"incomparable": c.incomparable, **{f"dropped_{why}": n for why, n in c.dropped.items()}}
        for outcome, count in outcomes.items():
            yield f'pithead_shadow_requests_total{{model="{model}",outcome="{outcome}"}} {count}'
    for name, kind, words, value in _SHADOW:
        yield from _head(name, kind, words)
        for model, c in shadows:
            yield f'{name}{{model="{model}"}} {value(c):.9g}'
    yield from _head("pithead_shadow_seconds_total", "counter", "Time to answer what was compared.")
    for model, c in shadows:
        for side, ns in (("primary", c.primary_ns), ("shadow", c.shadow_ns)):
            yield f'pithead_shadow_seconds_total{{model="{model}",side="{side}"}} {ns * 1e-9:.9f}'


def _caches(counted: Sequence[tuple[str, Statistics]]) -> Iterator[str]:
    cached = [(labels, s) for labels, s in counted if s.hits or s.misses]
    yield from _head("pithead_cache_requests_total", "counter", "Requests by whether their answer was kept.")
    for labels, s in cached:
        for outcome, count in (("hit", s.hits), ("miss", s.misses)):
            yield f'pithead_cache_requests_total{{{labels},outcome="{outcome}"}} {count}'
    yield from _head(
        "pithead_cache_seconds_total", "counter", "Hits: all of it. Misses: to look and to keep."
    )
    for labels, s in cached:
        for outcome, ns in (("hit", s.hits_ns), ("miss", s.misses_ns)):
            yield f'pithead_cache_seconds_total{{{labels},outcome="{outcome}"}} {ns * 1e-9:.9f}'


def _histogram(counted: Sequence[tuple[str, Statistics]]) -> Iterator[str]:
    name = "pithead_inference_duration_seconds"
    yield from _head(name, "histogram", "From request to answer, without the protocol.")
    for labels, s in counted:
        total = 0
        for bound, count in zip(BOUNDS_US, s.histogram, strict=False):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound / 1e6:g}"}} {total}'
        yield f'{name}_bucket{{{labels},le="+Inf"}} {s.successes}'
        yield f"{name}_sum{{{labels}}} {s.total_ns * 1e-9:.9f}"
        yield f"{name}_count{{{labels}}} {s.successes}"


def _gauges(versions: Sequence[tuple[str, Version]]) -> Iterator[str]:
    for name, words, value in _GAUGES:
        yield from _head(name, "gauge", words)
        for labels, v in versions:
            yield f"{name}{{{labels}}} {0 if v.live is None else value(v.live)}"


def _rates(service: Service) -> Iterator[str]:
    yield from _head("pithead_rate_limited_total", "counter", "Requests beyond a limit, by whose it is.")
    refused = {} if service.rates is None else service.rates.refused
    for (kind, name), count in sorted(refused.items()):
        yield f'pithead_rate_limited_total{{limit="{kind}",name="{_escaped(name)}"}} {count}'


def _process(service: Service) -> Iterator[str]:
    times = os.times()
    rss = int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    for name, kind, words, value in (
        ("pithead_model_loads_total", "counter", "Sessions that were opened.", service.catalogue.loads),
        (
            "pithead_model_evictions_total",
            "counter",
            "Sessions that left for others.",
            service.catalogue.evictions,
        ),
        ("process_cpu_seconds_total", "counter", "CPU time.", round(times.user + times.system, 2)),
        ("process_resident_memory_bytes", "gauge", "Memory.", rss),
        ("process_open_fds", "gauge", "Open files.", sum(1 for _ in Path("/proc/self/fd").iterdir())),
        ("process_start_time_seconds", "gauge", "Unix time.", round(service.started, 3)),
        ("pithead_uptime_seconds", "gauge", "Time since then.", round(time.time() - service.started, 3)),
    ):
        yield from _head(name, kind, words)
        yield f"{name} {value}"


def _http(server: Server) -> Iterator[str]:
    yield from _head("pithead_http_responses_total", "counter", "Answers by status.")
    for status, count in sorted(server.statuses.items()):
        yield f'pithead_http_responses_total{{code="{status}"}} {count}'
    yield from _head("pithead_http_connections", "gauge", "Open connections.")
    yield f"pithead_http_connections {len(server.connections)}"
    yield from _head("pithead_http_connections_refused_total", "counter", "Connections beyond the limit.")
    yield f"pithead_http_connections_refused_total {server.turned_away}"


def _grpc(service: Service) -> Iterator[str]:
    yield from _head("pithead_grpc_responses_total", "counter", "Answered gRPC calls by status.")
    for status, count in sorted(service.grpc_answers.items()):
        yield f'pithead_grpc_responses_total{{code="{status}"}} {count}'


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
