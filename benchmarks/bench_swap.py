"""What a swap costs those who ask meanwhile: a model that takes seconds to load, again and again, under load.

The peer is the same server under the same load without swaps, in turns. Load comes at a steady rate over REST
and gRPC at once, so that a stall shows in the latencies and not in fewer requests. Then 200 swaps of a small
model, and what they leave in memory. ``--soak MINUTES`` goes on for longer: memory and descriptors have to
stay what they were.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Final, Self

import bench_serving as serving
import numpy as np
import psutil
from swap_models import WIDTH, embedding

from agent.engine.serve.proto.messages import CLASSES, SERVICE

LARGE, SMALL = "embedding", "autoencoder"
CLIENTS: Final = 4
RATE: Final = 150
"""Requests a second of each client of each protocol."""
WARM_SWAPS: Final = 20
MORE_MS: Final = 10.0
"""By so much may the slowest of a thousand requests be slower than without swaps."""
MORE_MEMORY: Final = 0.05


@dataclass
class Server:
    """``pithead-agent serve`` with two models, each in two forms that take each other's place."""

    folder: Path
    megabytes: int
    http: int = field(default_factory=serving.free_port)
    grpc: int = field(default_factory=serving.free_port)
    _turn: Iterator[int] = field(default_factory=count)

    def __enter__(self) -> Self:
        served = self.folder / "served"
        served.mkdir()
        for turn in range(2):
            self._form(LARGE, turn).write_bytes(embedding(self.megabytes, float(turn)))
            self._form(SMALL, turn).write_bytes(serving.model() if turn else embedding(1, 0.0))
        for name in (LARGE, SMALL):
            self._replace(name, 0)
        command = [
            *(sys.executable, "-m", "agent", "serve", str(served), "--log-level", "warning"),
            *("--http-port", str(self.http), "--grpc-port", str(self.grpc)),
            *("--probe-cache", str(self.folder / "probed.json")),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while not self._ready():
            assert self._process.poll() is None, "the server has ended"
            assert time.monotonic() < end, "the server is not ready"
            time.sleep(0.05)
        for name in (LARGE, LARGE, SMALL, SMALL):  # each form passes the sandbox once
            self.swap(name)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def swap(self, name: str) -> float:
        """Put the other form in place and load it; return how long that took, in seconds."""
        self._replace(name, next(self._turn) + 1)
        began = time.perf_counter()
        url = f"http://127.0.0.1:{self.http}/v2/repository/models/{name}/load"
        with urllib.request.urlopen(urllib.request.Request(url, data=b"", method="POST"), timeout=120):
            return time.perf_counter() - began

    @property
    def rss_mib(self) -> float:
        """Its memory."""
        return float(psutil.Process(self._process.pid).memory_info().rss / 2**20)

    @property
    def descriptors(self) -> int:
        """Its open files and sockets."""
        return int(psutil.Process(self._process.pid).num_fds())

    def _form(self, name: str, turn: int) -> Path:
        return self.folder / f"{name}-{turn % 2}.onnx"

    def _replace(self, name: str, turn: int) -> None:
        beside = self.folder / "beside"
        os.link(self._form(name, turn), beside)
        beside.replace(self.folder / "served" / f"{name}.onnx")

    def _ready(self) -> bool:
        url = f"http://127.0.0.1:{self.http}/v2/health/ready"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
        return False


@dataclass
class Load:
    """h2load over both protocols."""

    folder: Path
    server: Server

    def __post_init__(self) -> None:
        x = np.full((1, WIDTH), 3.0, np.float32)
        tensor: dict[str, Any] = {"name": "input", "shape": [1, WIDTH], "datatype": "FP32"}
        tensor["parameters"] = {"binary_data_size": x.nbytes}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        self._head = len(head)
        (self.folder / "rest").write_bytes(head + x.tobytes())
        message = CLASSES["ModelInferRequest"](model_name=LARGE)
        message.inputs.add(name="input", datatype="FP32", shape=[1, WIDTH])
        message.raw_input_contents.append(x.tobytes())
        data = message.SerializeToString()
        (self.folder / "grpc").write_bytes(b"\0" + len(data).to_bytes(4, "big") + data)

    def run(self, seconds: float) -> np.ndarray[Any, Any]:
        """Ask for so long; return each request's latency in ms. Raises ``RuntimeError`` if one failed."""
        server = self.server
        rest = self._start(
            "rest",
            seconds,
            ["--h1", "-H", f"inference-header-content-length: {self._head}"],
            f"http://127.0.0.1:{server.http}/v2/models/{LARGE}/infer",
        )
        grpc = self._start(
            "grpc",
            seconds,
            ["-H", "content-type: application/grpc", "-H", "te: trailers"],
            f"http://127.0.0.1:{server.grpc}/{SERVICE}/ModelInfer",
        )
        return np.concatenate([self._end("rest", rest, seconds), self._end("grpc", grpc, seconds)])

    def _start(self, kind: str, seconds: float, more: list[str], url: str) -> subprocess.Popen[str]:
        log = self.folder / f"{kind}.log"
        log.unlink(missing_ok=True)
        requests = self._requests(seconds)
        command = [
            *("h2load", "-n", str(requests), "-c", str(CLIENTS), f"--rps={RATE}"),
            *("-d", str(self.folder / kind), f"--log-file={log}", *more, url),
        ]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _end(self, kind: str, process: subprocess.Popen[str], seconds: float) -> np.ndarray[Any, Any]:
        said = process.communicate()[0]
        requests = self._requests(seconds)
        good = re.search(r"status codes: (\d+) 2xx", said)
        data = re.search(r"\((\d+)\) data", said)
        assert good, said
        assert data, said
        # Over gRPC a refusal is a 200 too, but has no body: each answer has a tensor.
        if int(good[1]) != requests or int(data[1]) < requests * 4 * WIDTH:
            raise RuntimeError(f"requests over {kind} have failed: {said}")
        lines = (self.folder / f"{kind}.log").read_text().splitlines()
        return np.array([int(line.split("\t")[2]) for line in lines]) / 1000

    @staticmethod
    def _requests(seconds: float) -> int:
        return round(seconds * RATE) * CLIENTS


@contextlib.contextmanager
def swapping(server: Server, name: str, pause_s: float) -> Iterator[list[float]]:
    """Swap all the time; the list is of how long each took."""
    took: list[float] = []
    end = threading.Event()

    def work() -> None:
        while not end.is_set():
            took.append(server.swap(name))
            end.wait(pause_s)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield took
    finally:
        end.set()
        thread.join()


def swaps(server: Server, load: Load, rounds: int, seconds: float) -> dict[str, float]:
    """Return what swaps add to the latencies, by medians of rounds."""
    load.run(2.0)
    calm: list[float] = []
    busy: list[float] = []
    took: list[float] = []
    asked = 0
    for _ in range(rounds):
        times = load.run(seconds)
        calm.append(float(np.percentile(times, 99.9)))
        with swapping(server, LARGE, 0.1) as found:
            times = load.run(seconds)
        busy.append(float(np.percentile(times, 99.9)))
        took += found
        asked += len(times)
    return {
        "requests under swaps": asked,
        "failed": 0,
        "swaps": len(took),
        "load s": round(median(took), 2),
        "p99.9 ms without": round(median(calm), 2),
        "p99.9 ms with": round(median(busy), 2),
        "p99.9 ms more": round(median(b - c for b, c in zip(busy, calm, strict=True)), 2),
    }


def memory(server: Server, times: int) -> dict[str, float]:
    """Return what many swaps of a small model leave."""
    for _ in range(WARM_SWAPS):
        server.swap(SMALL)
    before = server.rss_mib
    for _ in range(times):
        server.swap(SMALL)
    return {
        "small swaps": times,
        "RSS MiB before": round(before, 1),
        "RSS MiB after": round(server.rss_mib, 1),
        "RSS ratio": round(server.rss_mib / before, 3),
    }


def soak(server: Server, load: Load, minutes: float) -> dict[str, float]:
    """Return memory and descriptors at the beginning and the end of a long time under load, with swaps."""
    seen: list[tuple[float, int]] = []
    end = time.monotonic() + minutes * 60
    with swapping(server, SMALL, 5.0):
        load.run(20.0)
        while time.monotonic() < end:
            load.run(20.0)
            seen.append((server.rss_mib, server.descriptors))
            print(
                f"{(end - time.monotonic()) / 60:6.1f} min left  RSS {seen[-1][0]:7.1f} MiB"
                f"  {seen[-1][1]} descriptors",
                file=sys.stderr,
            )
    third = max(1, len(seen) // 3)
    first, last = seen[:third], seen[-third:]
    return {
        "soak minutes": minutes,
        "soak RSS MiB, first third": round(median(m for m, _ in first), 1),
        "soak RSS MiB, last third": round(median(m for m, _ in last), 1),
        "soak descriptors, first third": median(d for _, d in first),
        "soak descriptors, last third": median(d for _, d in last),
    }


def missed(result: dict[str, float]) -> list[str]:
    """Return what was promised and is not so."""
    said = []
    if result["p99.9 ms more"] > MORE_MS:
        said.append(f"p99.9 is more than {MORE_MS:g} ms above that without swaps")
    if result["RSS ratio"] > 1 + MORE_MEMORY:
        said.append("memory has grown by more than 5 %")
    if "soak minutes" in result:
        if result["soak RSS MiB, last third"] > result["soak RSS MiB, first third"] * (1 + MORE_MEMORY):
            said.append("memory has grown by more than 5 % in the soak")
        if result["soak descriptors, last third"] > result["soak descriptors, first third"]:
            said.append("descriptors have leaked in the soak")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a round")
    parser.add_argument("--megabytes", type=int, default=500, help="of the large model, at most 511")
    parser.add_argument("--swaps", type=int, default=200, help="of the small model")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("h2load is missing: ./docker/system-packages.sh bench")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Server(folder, options.megabytes) as server:
            load = Load(folder, server)
            result = swaps(server, load, options.rounds, options.seconds)
            result |= memory(server, options.swaps)
            if options.soak:
                result |= soak(server, load, options.soak)
    for what, value in result.items():
        print(f"{what:<32} {value:>10.2f}")
    said = missed(result)
    print(json.dumps({"benchmark": "swap", **result, "missed": said}))
    sys.exit("; ".join(said) or 0)


if __name__ == "__main__":
    main()
