"""Requests per second, latency, CPU and memory of serving, beside what people use instead.

All serve the same 64-float autoencoder with ONNX Runtime on one thread, at
the same time on this machine; h2load asks them in turns. Ours runs with what
a plant needs (tokens, metrics, validation, routing, batching); the others as
they come. ``echo`` is the limit: HTTP without any work.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from agent.engine.serve import tokens
from models import onnx_builder
from models.dense import Layer, Network

ROOT = Path(__file__).parents[1]
PEERS = Path(__file__).parent / "peers"
WIDTH = 64
READY_S = 60.0


def model() -> bytes:
    random = np.random.default_rng(0)
    sizes = (WIDTH, 32, 8, 32, WIDTH)
    layers = [
        Layer(random.normal(0, 0.3, (b, a)), random.normal(0, 0.1, b), relu=i < 3)
        for i, (a, b) in enumerate(pairwise(sizes))
    ]
    return onnx_builder.build_float(Network(tuple(layers)), "benchmark")


def bodies(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Return the file and the headers of each kind of request."""
    x = np.random.default_rng(1).normal(size=(1, WIDTH)).astype(np.float32)
    tensor: dict[str, Any] = {"name": "input", "shape": [1, WIDTH], "datatype": "FP32"}
    head = json.dumps(
        {
            "inputs": [tensor | {"parameters": {"binary_data_size": x.nbytes}}],
            "outputs": [{"name": "output", "parameters": {"binary_data": True}}],
        },
        separators=(",", ":"),
    ).encode()
    (folder / "binary").write_bytes(head + x.tobytes())
    values = [round(float(v), 6) for v in x.ravel()]
    (folder / "json").write_text(json.dumps({"inputs": [tensor | {"data": values}]}))
    return {
        "binary": (
            folder / "binary",
            [f"inference-header-content-length: {len(head)}", "content-type: application/octet-stream"],
        ),
        "json": (folder / "json", ["content-type: application/json"]),
    }


@dataclass
class Peer:
    """A server under test, and what was seen of it."""

    name: str
    command: list[str]
    port: int
    kinds: tuple[str, ...] = ("binary", "json")
    headers: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    directory: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    ready_s: float = 0.0
    rss_mib: float = 0.0
    seen: dict[str, list[float]] = field(default_factory=dict)

    def start(self, log: Path) -> None:
        """Start it and wait until it answers; raises ``RuntimeError``."""
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            self.command,
            env=os.environ | self.environment,
            cwd=self.directory,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while not self._answers():
            if self.process.poll() is not None or time.perf_counter() - begin > READY_S:
                raise RuntimeError(f"{self.name} does not start: {log.read_text()[-1500:]}")
            time.sleep(0.005)
        self.ready_s = time.perf_counter() - begin

    def stop(self) -> None:
        """End it and its children."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def tree(self) -> list[psutil.Process]:
        """Return its processes."""
        assert self.process is not None
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def cpu_s(self) -> float:
        """Return the CPU time that it has used."""
        return sum(t.user + t.system for t in (p.cpu_times() for p in self.tree()))

    def rss(self) -> float:
        """Return its memory in MiB."""
        return sum(p.memory_info().rss for p in self.tree()) / 2**20

    def note(self, what: str, value: float) -> None:
        """Add a figure of one round."""
        self.seen.setdefault(what, []).append(value)

    def median(self, what: str) -> float:
        """Return the median of all rounds."""
        return median(self.seen[what]) if what in self.seen else float("nan")

    def _answers(self) -> bool:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v2/models/autoencoder/ready")
        if self.name in {"fastapi", "echo"}:
            request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v2/health/ready")
        for header in self.headers:
            name, _, value = header.partition(": ")
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - loopback only
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False


def load(peer: Peer, kind: str, body: tuple[Path, list[str]], clients: int, requests: int, log: Path) -> None:
    """One round; everything but 2xx is an error."""
    file, headers = body
    log.unlink(missing_ok=True)
    cpu = peer.cpu_s()
    done = subprocess.run(
        [
            *(
                "h2load",
                "--h1",
                "-n",
                str(requests),
                "-c",
                str(clients),
                "-d",
                str(file),
                f"--log-file={log}",
            ),
            *(a for h in (*headers, *peer.headers) for a in ("-H", h)),
            f"http://127.0.0.1:{peer.port}/v2/models/autoencoder/infer",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    cpu = peer.cpu_s() - cpu
    found = re.search(r"finished in .*?, ([\d.]+) req/s", done.stdout)
    good = re.search(r"status codes: (\d+) 2xx", done.stdout)
    assert found, done.stdout
    assert good, done.stdout
    if int(good[1]) != requests:
        raise RuntimeError(f"{peer.name}: {done.stdout}")
    times = np.array([int(line.split("\t")[2]) for line in log.read_text().splitlines()]) / 1000
    peer.note(f"{kind} c{clients} rps", float(found[1]))
    peer.note(f"{kind} c{clients} cpu us", cpu / requests * 1e6)
    peer.note(f"{kind} c{clients} p50 ms", float(np.percentile(times, 50)))
    peer.note(f"{kind} c{clients} p99 ms", float(np.percentile(times, 99)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(name: str) -> Path:
    """Return the interpreter of a peer's environment, made on demand."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/serve/environments.py"), name],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} does not install: {done.stderr[-300:]}")
    return Path(done.stdout.strip())


def ours(folder: Path) -> Peer:
    (folder / "served").mkdir()
    (folder / "served/autoencoder.onnx").write_bytes(model())
    token, line = tokens.new("bench", "infer")
    (folder / "tokens").write_text(line + "\n")
    port = free_port()
    command = [
        *(sys.executable, "-m", "agent", "serve", str(folder / "served"), "--http-port", str(port)),
        *("--token-file", str(folder / "tokens"), "--probe-cache", str(folder / "probed.json")),
    ]
    return Peer("pithead", command, port, headers=(f"authorization: Bearer {token}",))


def fastapi(folder: Path) -> Peer:
    port = free_port()
    file = folder / "served/autoencoder.onnx"
    return Peer(
        "fastapi",
        [str(environment("peer-fastapi")), str(PEERS / "fastapi_script.py"), str(file), str(port)],
        port,
    )


def echo(_folder: Path) -> Peer:
    port = free_port()
    return Peer("echo", [sys.executable, str(PEERS / "echo.py"), str(port)], port, kinds=("binary",))


def triton(folder: Path, *, batching: bool = False) -> Peer:
    python = environment("peer-triton")
    packages = next(python.parents[1].glob("lib/python3*/site-packages"))
    server = packages / "pytriton/tritonserver"
    name = "triton+batching" if batching else "triton"
    repository = folder / name
    shutil.copytree(PEERS / "triton", repository)
    tensor = '[ {{ name: "{}", data_type: TYPE_FP32, dims: [ 64 ] }} ]'
    (repository / "autoencoder/config.pbtxt").write_text(
        'backend: "python"\nmax_batch_size: 64\n'
        f"input {tensor.format('input')}\noutput {tensor.format('output')}\n"
        + ("dynamic_batching { }\n" if batching else "")
    )
    stub = server / f"python_backend_stubs/{sys.version_info.major}.{sys.version_info.minor}"
    backends = folder / f"{name}-backends"
    shutil.copytree(server / "backends", backends)
    shutil.copy(stub / "triton_python_backend_stub", backends / "python")
    port, grpc, metrics = free_port(), free_port(), free_port()
    base = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    libraries = [str(packages / "nvidia_pytriton.libs"), base]
    return Peer(
        name,
        [
            *(str(server / "bin/tritonserver"), f"--model-repository={repository}", f"--http-port={port}"),
            *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
            *(f"--metrics-port={metrics}", f"--backend-directory={backends}"),
            *("--disable-auto-complete-config", "--log-info=0"),
        ],
        port,
        environment={
            "LD_LIBRARY_PATH": ":".join(libraries),
            "PYTHONPATH": str(packages),
            "BENCH_MODEL": str(folder / "served/autoencoder.onnx"),
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(python.parents[1]),
        },
    )


def mlserver(folder: Path) -> Peer:
    python = environment("peer-mlserver")
    directory = folder / "mlserver"
    shutil.copytree(PEERS / "mlserver", directory)
    port = free_port()
    (directory / "settings.json").write_text(
        json.dumps(
            {
                "host": "127.0.0.1",
                "http_port": port,
                "grpc_port": free_port(),
                "metrics_port": free_port(),
                "parallel_workers": 0,
                "debug": False,
            }
        )
    )
    (directory / "model-settings.json").write_text(
        json.dumps({"name": "autoencoder", "implementation": "runtime.Autoencoder"})
    )
    return Peer(
        "mlserver",
        [str(python.with_name("mlserver")), "start", str(directory)],
        port,
        kinds=("json",),  # it answers the binary extension with 422
        environment={"BENCH_MODEL": str(folder / "served/autoencoder.onnx"), "PYTHONPATH": str(directory)},
        directory=directory,
    )


MAKERS = {
    "pithead": ours,
    "echo": echo,
    "fastapi": fastapi,
    "triton": triton,
    "triton+batching": lambda folder: triton(folder, batching=True),
    "mlserver": mlserver,
}


@contextlib.contextmanager
def running(folder: Path, names: list[str]) -> Iterator[list[Peer]]:
    peers: list[Peer] = []
    try:
        for name in names:
            try:
                peer = MAKERS[name](folder)
                peers.append(peer)
                peer.start(folder / f"{name}.log")
                if name == "pithead":  # its first start has opened the model in the sandbox; this is the next
                    peer.note("first ready s", peer.ready_s)
                    peer.stop()
                    peer.start(folder / f"{name}.log")
            except (RuntimeError, OSError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                peers = [p for p in peers if p.name != name]
        yield peers
    finally:
        for peer in peers:
            peer.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20_000, help="of a round at concurrency 16")
    parser.add_argument("--peers", nargs="*", default=list(MAKERS), choices=list(MAKERS))
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("h2load is missing: ./docker/system-packages.sh bench")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = bodies(folder)
        with running(folder, ["pithead", *(p for p in options.peers if p != "pithead")]) as peers:
            for peer in peers:
                for kind in peer.kinds:
                    load(peer, kind, kinds[kind], 16, 500, folder / "log")
                peer.seen = {k: v for k, v in peer.seen.items() if k == "first ready s"}
            for _ in range(options.rounds):
                for kind in kinds:
                    for clients in (16, 1):
                        for peer in peers:
                            if kind in peer.kinds:
                                # About as long for the slow ones.
                                slow = peer.name == "mlserver"
                                n = options.requests // (5 if slow else 1) // (4 if clients == 1 else 1)
                                load(peer, kind, kinds[kind], clients, n, folder / "log")
            for peer in peers:
                peer.rss_mib = peer.rss()
            show(peers)


def show(peers: list[Peer]) -> None:
    columns = ("rps", "cpu us", "p50 ms", "p99 ms")
    print(f"{'server':<16} {'kind':<7} {'c':>3} " + " ".join(f"{c:>9}" for c in columns))
    for kind in ("binary", "json"):
        for clients in (16, 1):
            for peer in peers:
                if kind in peer.kinds:
                    values = [peer.median(f"{kind} c{clients} {c}") for c in columns]
                    print(f"{peer.name:<16} {kind:<7} {clients:>3} " + " ".join(f"{v:>9.2f}" for v in values))
    print(f"{'server':<16} {'ready s':>8} {'RSS MiB':>8}")
    for peer in peers:
        print(f"{peer.name:<16} {peer.ready_s:>8.2f} {peer.rss_mib:>8.1f}")
    mine = peers[0]
    ratios = {
        f"{kind} c16 rps over {peer.name}": round(
            mine.median(f"{kind} c16 rps") / peer.median(f"{kind} c16 rps"), 2
        )
        for peer in peers[1:]
        for kind in peer.kinds
    }
    for name, ratio in ratios.items():
        print(f"{name:<40} {ratio:>6.2f}")
    result = {
        peer.name: {"ready_s": round(peer.ready_s, 3), "rss_mib": round(peer.rss_mib, 1)}
        | {what: round(median(values), 3) for what, values in peer.seen.items()}
        for peer in peers
    }
    print(json.dumps({"benchmark": "serving", "ratios": ratios, "servers": result}))


if __name__ == "__main__":
    main()
