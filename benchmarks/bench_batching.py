"""What batching brings on MLPerf Tiny's models, and what becomes of five times too many requests.

The same server twice, with and without batching, asked in turns at
concurrency 16 and 1: the peer of batching is not batching. Then one model
that takes some milliseconds, at five times what it can do: what is accepted
must be in time, and the rest must be told at once.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
MODELS = Path(os.environ.get("PITHEAD_SHARED_DATA", ROOT.parent / "shared" / "data")) / "models"
BATCHED = {
    "kws": ("mlperf-tiny-kws/kws_ref_model.onnx", "input_1", (1, 49, 10, 1)),
    "ad01": ("mlperf-tiny-ad01/ad01_int8.onnx", "input_1", (1, 640)),
}
SLOW = ("mlperf-tiny-ic/pretrainedResnet_quant.onnx", "input_1_int8", (16, 32, 32, 3))
"""Sixteen pictures a request; the model gains nothing by more at once."""
OVERLOAD = 5
CLIENTS = 100
SECONDS = 4


class Server:
    """A running ``pithead-agent serve``."""

    def __init__(self, models: Path, cache: Path, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "agent", "serve", str(models), "--http-port", str(self.port)),
                *("--probe-cache", str(cache), "--log-level", "error", *arguments),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not self.ready():
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.02)

    def ready(self) -> bool:
        """Return whether all models are loaded."""
        try:
            url = f"http://127.0.0.1:{self.port}/v2/health/ready"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def cpu_s(self) -> float:
        """Return the CPU time that it has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def rss_mib(self) -> float:
        """Return its memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(20)


class Load:
    """Requests of one kind."""

    def __init__(self, folder: Path, model: str, tensor: str, shape: tuple[int, ...]) -> None:
        x = np.random.default_rng(1).integers(-100, 100, shape).astype(np.int8)
        described = {"name": tensor, "shape": list(shape), "datatype": "INT8"}
        described["parameters"] = {"binary_data_size": x.nbytes}
        head = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
        self._file, self._log = folder / f"{model}.body", folder / f"{model}.log"
        self._file.write_bytes(head + x.tobytes())
        self._model, self._head = model, len(head)

    def run(self, server: Server, requests: int, clients: int, *more: str) -> tuple[float, Any, Any]:
        """Return requests per second, and of each request its status and its milliseconds."""
        self._log.unlink(missing_ok=True)
        done = subprocess.run(
            [
                *("h2load", "--h1", "-n", str(requests), "-c", str(clients), "-d", str(self._file)),
                *("-H", f"inference-header-content-length: {self._head}", f"--log-file={self._log}", *more),
                f"http://127.0.0.1:{server.port}/v2/models/{self._model}/infer",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        rate = re.search(r"finished in .*?, ([\d.]+) req/s", done.stdout)
        assert rate, done.stdout
        lines = np.array([[int(v) for v in line.split()] for line in self._log.read_text().splitlines()])
        assert len(lines) == requests, done.stdout
        return float(rate[1]), lines[:, 1], lines[:, 2] / 1000


def measure(server: Server, load: Load, requests: int, clients: int) -> dict[str, float]:
    """Return the figures of one round."""
    before = server.cpu_s()
    rate, codes, times = load.run(server, requests, clients)
    assert set(codes) == {200}
    return {
        "rps": rate,
        "cpu us": (server.cpu_s() - before) / requests * 1e6,
        "p50 ms": float(np.percentile(times, 50)),
        "p99 ms": float(np.percentile(times, 99)),
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {what: round(median(r[what] for r in rounds), 3) for what in rounds[0]}


def batching(folder: Path, rounds: int, requests: int) -> dict[str, Any]:
    """Return what batching brings."""
    (folder / "batched").mkdir()
    for name, (file, _, _) in BATCHED.items():
        shutil.copy(MODELS / file, folder / "batched" / f"{name}.onnx")
    cache = folder / "probed.json"
    servers = {"without": Server(folder / "batched", cache, "--max-batch", "1")}
    servers["with"] = Server(folder / "batched", cache)
    seen: dict[str, list[dict[str, float]]] = {}
    try:
        for name, (_, tensor, shape) in BATCHED.items():
            load = Load(folder, name, tensor, shape)
            for _, clients, kind in itertools.product(range(rounds), (16, 1), servers):
                n = requests if clients > 1 else requests // 4
                figures = measure(servers[kind], load, n, clients)
                seen.setdefault(f"{name} c{clients} {kind}", []).append(figures)
    finally:
        for server in servers.values():
            server.stop()
    result: dict[str, Any] = {key: medians(figures) for key, figures in seen.items()}
    print(
        f"{'model, clients, batching':<24}"
        + "".join(f"{w:>10}" for w in ("rps", "cpu us", "p50 ms", "p99 ms"))
    )
    for key, figures in list(result.items()):
        print(f"{key:<24}" + "".join(f"{v:>10.2f}" for v in figures.values()))
    for name, clients in itertools.product(BATCHED, (16, 1)):
        ratio = result[f"{name} c{clients} with"]["rps"] / result[f"{name} c{clients} without"]["rps"]
        result[f"{name} c{clients} ratio"] = round(ratio, 2)
        print(f"{name} c{clients}: {ratio:.2f} times the requests")
    return result


def overload(folder: Path, rounds: int) -> dict[str, Any]:
    """Return what five times too many requests meet, by medians of rounds."""
    file, tensor, shape = SLOW
    (folder / "slow").mkdir()
    shutil.copy(MODELS / file, folder / "slow" / "ic.onnx")
    load = Load(folder, "ic", tensor, shape)
    cache = folder / "probed.json"
    server = Server(folder / "slow", cache)
    try:
        load.run(server, 50, 1)
        run_ms = float(np.percentile(load.run(server, 200, 1)[2], 50))
    finally:
        server.stop()
    # What waits at most as long as a run takes is answered within two runs.
    server = Server(folder / "slow", cache, "--max-wait-ms", f"{run_ms:.3f}")
    seen: list[dict[str, float]] = []
    try:
        load.run(server, 50, 1)
        before = server.rss_mib()
        for _ in range(rounds):
            rate, codes, calm = load.run(server, 400, 1)
            assert set(codes) == {200}
            each = max(1, round(OVERLOAD * rate / CLIENTS))
            # One client a moment, or all would ask at the same one.
            moment = f"--rate-period={max(1, 1000 // (each * CLIENTS))}ms"
            _, codes, times = load.run(
                server, each * CLIENTS * SECONDS, CLIENTS, f"--rps={each}", "--rate=1", moment
            )
            assert set(codes) <= {200, 503}, set(codes)
            seen.append(
                {
                    "calm rps": rate,
                    "calm p99 ms": float(np.percentile(calm, 99)),
                    "accepted": float((codes == 200).mean()),
                    "accepted rps": float((codes == 200).sum() / SECONDS),
                    "accepted p99 ms": float(np.percentile(times[codes == 200], 99)),
                    "refused p50 ms": float(np.percentile(times[codes == 503], 50)),
                    "refused p99 ms": float(np.percentile(times[codes == 503], 99)),
                }
            )
        grown = server.rss_mib() - before
    finally:
        server.stop()
    result = medians(seen)
    result["p99 ratio"] = round(result["accepted p99 ms"] / result["calm p99 ms"], 2)
    result["memory grown MiB"] = round(grown, 1)
    print(f"\n{OVERLOAD} times too many requests, {CLIENTS} clients, median of rounds")
    for what, value in result.items():
        print(f"{what:<20} {value:>10.2f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=10_000, help="of a round at concurrency 16")
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("h2load is missing: ./docker/system-packages.sh bench")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = batching(folder, options.rounds, options.requests)
        result["overload"] = overload(folder, options.rounds)
    print(json.dumps({"benchmark": "batching", **result}))


if __name__ == "__main__":
    main()
