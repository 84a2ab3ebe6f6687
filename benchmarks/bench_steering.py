"""What split, bandit, shadow, rate limits, pipelines and load on demand cost, each beside the plain model.

One client asks one server over REST in binary, in turns, so all ratios are of medians of the same run. The
model is the 64-float autoencoder, whose run is a small part of an answer: what stands before it shows most
here. Batching has ``bench_batching.py``, the cache ``bench_cache.py``, a swap ``bench_swap.py``.
"""

import argparse
import http.client
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import bench_cache as plain
import bench_serving as serving
import numpy as np

SETTINGS: Final = """
[models.split.split]
weights = { "1" = 90, "2" = 10 }
[models.bandit.bandit]
versions = ["1", "2"]
[models.shadow.shadow]
version = "2"
sample = 1
cpu = 0.05
[models.limited]
rate = 1000000
[models.refused]
rate = 0.001
[pipelines.line]
inputs = ["input"]
outputs = ["last"]
[[pipelines.line.steps]]
model = "plain"
outputs = { output = "middle" }
[[pipelines.line.steps]]
model = "plain"
inputs = { input = "middle" }
outputs = { output = "last" }
"""
KINDS: Final = ("split", "bandit", "shadow", "limited", "refused", "line")
IDLE: Final = 9
"""Models that are not in memory before their first request."""


def write(directory: Path) -> None:
    """Write each model under its name, those with two versions in Triton's layout."""
    content = plain.autoencoder()
    for name in ("plain", "split", "bandit", "shadow", "limited", "refused"):
        for version in ("1", "2") if name in {"split", "bandit", "shadow"} else ("1",):
            (directory / name / version).mkdir(parents=True)
            (directory / name / version / "model.onnx").write_bytes(content)
    (directory / "serve.toml").write_text(SETTINGS)


@contextmanager
def server(directory: Path, *arguments: str) -> Iterator[http.client.HTTPConnection]:
    """Serve a directory, and return a connection when it is ready."""
    port = serving.free_port()
    command = [sys.executable, "-m", "agent", "serve", str(directory), "--http-port", str(port)]
    command += ["--probe-cache", str(directory.parent / "probed"), "--log-level", "error", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        plain.wait(port, process)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        yield connection
        connection.close()
    finally:
        process.terminate()
        process.wait(20)


def ask(connection: http.client.HTTPConnection, model: str, bodies: list[Any], status: int) -> list[float]:
    """Return the microseconds of each answer."""
    times = []
    for body, headers in bodies:
        start = time.perf_counter()
        connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        answer = connection.getresponse()
        said = answer.read()
        times.append((time.perf_counter() - start) * 1e6)
        assert answer.status == status, said[:500]
    return times


def steering(connection: http.client.HTTPConnection, model: str) -> dict[str, Any]:
    """Return what the server says of a steered model."""
    connection.request("GET", f"/v2/models/{model}/steering")
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    return found


def beside(connection: http.client.HTTPConnection, rounds: int, requests: int) -> dict[str, float]:
    """Return each kind's time as a share of the plain model's, and what the server counted."""
    random = np.random.default_rng(1)
    shares: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "two_calls")}
    ask(connection, "refused", [plain.body_of("autoencoder", random)], 200)
    began = time.perf_counter()
    for number in range(rounds + 1):
        bodies = [plain.body_of("autoencoder", random) for _ in range(requests)]
        base = median(ask(connection, "plain", bodies, 200))
        for kind in KINDS:
            took = median(ask(connection, kind, bodies, 429 if kind == "refused" else 200))
            if number:  # the first warms up
                shares[kind].append(took / base)
        pairs = [ask(connection, "plain", [body, body], 200) for body in bodies]
        if number:
            shares["two_calls"].append(median(map(sum, pairs)) / base)
    elapsed_s = time.perf_counter() - began
    found = {f"{kind}_over_plain": round(median(values), 3) for kind, values in shares.items()}
    found["line_over_two_calls"] = round(found["line_over_plain"] / found["two_calls_over_plain"], 3)
    asked = steering(connection, "split")["requests"]
    found["split_share_of_10_percent"] = round(asked.get("2", 0) / sum(asked.values()), 3)
    shadow = steering(connection, "shadow")["shadow"]
    found["shadow_runs"] = shadow["compared"]
    found["shadow_cpu_of_5_percent"] = round(shadow["cpu_s"] / elapsed_s, 4)
    return found


def on_demand(connection: http.client.HTTPConnection) -> dict[str, float]:
    """Return the milliseconds of the first request to models that are not in memory, beside the second."""
    body = plain.body_of("autoencoder", np.random.default_rng(2))
    times = [ask(connection, f"idle{i}", [body, body], 200) for i in range(IDLE)]
    first = median(pair[0] for pair in times[1:])  # the very first loads the runtime too
    return {
        "first_of_all_ms": round(times[0][0] / 1e3, 2),
        "first_request_ms": round(first / 1e3, 2),
        "second_request_ms": round(median(pair[1] for pair in times[1:]) / 1e3, 2),
    }


def main() -> None:
    """Measure, and print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=200, help="of each kind in a round")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-steering-"))
    served, idle = directory / "served", directory / "idle"
    try:
        write(served)
        idle.mkdir()
        for i in range(IDLE):
            (idle / f"idle{i}.onnx").write_bytes(plain.autoencoder())
        with server(served) as connection:
            found = beside(connection, options.rounds, options.requests)
        with server(idle) as connection:  # the sandbox has seen it, as on any device after the first day
            connection.request("GET", "/v2")
        with server(idle, "--lazy") as connection:
            found |= on_demand(connection)
    finally:
        shutil.rmtree(directory)
    for name, value in found.items():
        sys.stdout.write(f"{name:<30}{value:>12}\n")
    sys.stdout.write(json.dumps({"benchmark": "steering", **found}) + "\n")


if __name__ == "__main__":
    main()
