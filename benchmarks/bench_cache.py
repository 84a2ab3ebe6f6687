"""What a kept answer saves, and what it costs to look for one that is not there.

One server has the same model under two names, of which one keeps its answers. One
client asks over REST in binary, in turns: the plain one, the other with what it
was never asked before (misses), and with what it was (hits). All ratios are of
medians of the same run.
"""

import argparse
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from models import onnx_builder
from models.dense import Layer, Network

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("PITHEAD_SHARED_DATA", ROOT.parent / "shared" / "data")) / "models"
MODELS: dict[str, tuple[str, str, str, tuple[int, ...]]] = {
    "autoencoder": ("", "input", "FP32", (1, 64)),
    "kws": ("mlperf-tiny-kws/kws_ref_model.onnx", "input_1", "INT8", (1, 49, 10, 1)),
    "ic": ("mlperf-tiny-ic/pretrainedResnet_quant.onnx", "input_1_int8", "INT8", (1, 32, 32, 3)),
}
"""File, input, its datatype and shape."""
TYPES = {"FP32": np.float32, "INT8": np.int8}


def autoencoder() -> bytes:
    """Return the 64-32-8-32-64 of the other benchmarks."""
    random, sizes = np.random.default_rng(0), (64, 32, 8, 32, 64)
    layers = (
        Layer(random.normal(0, 0.3, (b, a)), random.normal(0, 0.1, b), relu=b != sizes[-1])
        for a, b in pairwise(sizes)
    )
    return onnx_builder.build_float(Network(tuple(layers)), "autoencoder")


def write(directory: Path) -> None:
    """Write each model under two names."""
    lines = []
    for name, (file, *_) in MODELS.items():
        content = (SHARED / file).read_bytes() if file else autoencoder()
        for kind in ("plain", "kept"):
            (directory / f"{name}_{kind}.onnx").write_bytes(content)
        lines.append(f"[models.{name}_kept]\ncache_mb = 64\n")
    (directory / "serve.toml").write_text("".join(lines))


def body_of(name: str, random: np.random.Generator) -> tuple[bytes, dict[str, str]]:
    """Return a request that nobody has made before."""
    _, tensor, datatype, shape = MODELS[name]
    values = random.integers(-128, 127, shape) if datatype == "INT8" else random.normal(size=shape)
    raw = values.astype(TYPES[datatype]).tobytes()
    described = {"name": tensor, "datatype": datatype, "shape": shape}
    described["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


def ask(connection: http.client.HTTPConnection, model: str, bodies: list[Any]) -> list[float]:
    """Return the microseconds of each answer."""
    times = []
    for body, headers in bodies:
        start = time.perf_counter()
        connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        answer = connection.getresponse()
        said = answer.read()
        times.append((time.perf_counter() - start) * 1e6)
        assert answer.status == 200, said[:500]
    return times


def measure(port: int, name: str, rounds: int, requests: int) -> dict[str, float]:
    """Return medians of medians, in microseconds, and their ratios."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    random = np.random.default_rng(1)
    seen: dict[str, list[float]] = {"plain": [], "miss": [], "hit": []}
    for number in range(rounds + 1):
        bodies = [body_of(name, random) for _ in range(requests)]
        found = {
            "plain": ask(connection, f"{name}_plain", bodies),
            "miss": ask(connection, f"{name}_kept", bodies),
            "hit": ask(connection, f"{name}_kept", bodies),
        }
        if number:  # the first warms up
            for kind, times in found.items():
                seen[kind].append(median(times))
    connection.request("GET", f"/v2/models/{name}_kept/stats")
    of = json.loads(connection.getresponse().read())["model_stats"][0]["inference_stats"]
    asked = (rounds + 1) * requests
    assert (of["cache_hit"]["count"], of["cache_miss"]["count"]) == (asked, asked), of
    us = {kind: median(times) for kind, times in seen.items()}
    return {
        **{f"{kind}_us": round(value, 1) for kind, value in us.items()},
        "hit_over_plain": round(us["hit"] / us["plain"], 3),
        "miss_over_plain": round(median(m / p for m, p in zip(seen["miss"], seen["plain"], strict=True)), 3),
        "look_and_keep_us": round(of["cache_miss"]["ns"] / asked / 1e3, 2),
        "answer_a_hit_us": round(of["cache_hit"]["ns"] / asked / 1e3, 2),
    }


def wait(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Return when all models are loaded."""
    while True:
        assert process.poll() is None, "the server has ended"
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)


def main() -> None:
    """Measure, and print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=300, help="of each kind in a round")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-cache-"))
    (directory / "m").mkdir()
    write(directory / "m")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "agent", "serve", str(directory / "m"), "--http-port", str(port)]
    command += ["--probe-cache", str(directory / "probed"), "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait(port, process)
        found = {name: measure(port, name, options.rounds, options.requests) for name in MODELS}
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(directory)
    columns = list(next(iter(found.values())))
    sys.stdout.write(f"{'model':<14}" + "".join(f"{c:>18}" for c in columns) + "\n")
    for name, row in found.items():
        sys.stdout.write(f"{name:<14}" + "".join(f"{row[c]:>18}" for c in columns) + "\n")
    sys.stdout.write(json.dumps({"benchmark": "cache", "models": found}) + "\n")


if __name__ == "__main__":
    main()
