"""Calls per second over gRPC, beside what people write by hand and Triton; see ``bench_serving.py``.

``script`` is grpc.aio with onnxruntime and nothing else, on asyncio's loop as it comes; ``script+uvloop``
is the same on ours. Ours runs with tokens, metrics, validation, routing and batching. The load is h2load
with one prepared message: as many connections as callers, which is what separate clients are, or one
connection for all of them.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import bench_serving as serving
import grpc
import numpy as np

from agent.engine.serve.proto.messages import CLASSES, SERVICE

WIDTH = serving.WIDTH
WAYS = {"c16": (16, 1), "c1 m16": (1, 16), "c1": (1, 1)}
"""Connections, and calls at once on each."""
RPS, CPU = "rps", "cpu us"


def message() -> bytes:
    made = CLASSES["ModelInferRequest"](model_name="autoencoder")
    made.inputs.add(name="input", datatype="FP32", shape=[1, WIDTH])
    made.raw_input_contents.append(
        np.random.default_rng(1).normal(size=(1, WIDTH)).astype(np.float32).tobytes()
    )
    data: bytes = made.SerializeToString()
    return data


@dataclass
class Peer(serving.Peer):
    """A server that is asked over gRPC."""

    grpc_port: int = 0

    def call(self) -> int:
        """Return the length of one answer, which has to be right; raises ``grpc.RpcError``."""
        metadata = [tuple(header.split(": ", 1)) for header in self.headers]
        with grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            ask = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            data: bytes = ask(message(), metadata=metadata, timeout=5, wait_for_ready=True)
        answer = CLASSES["ModelInferResponse"].FromString(data)
        assert len(answer.raw_output_contents[0]) == 4 * WIDTH
        return len(data)

    def _answers(self) -> bool:
        try:
            return self.call() > 0
        except grpc.RpcError:
            return False


def of(peer: serving.Peer, port: int) -> Peer:
    return Peer(
        peer.name, peer.command, peer.port, headers=peer.headers, environment=peer.environment, grpc_port=port
    )


def ours(folder: Path) -> Peer:
    made, port = serving.ours(folder), serving.free_port()
    made.command += ["--grpc-port", str(port)]
    return of(made, port)


def script(folder: Path, *arguments: str) -> Peer:
    port = serving.free_port()
    name = "+".join(["script", *arguments])
    file = folder / "served/autoencoder.onnx"
    command = [sys.executable, str(serving.PEERS / "grpc_script.py"), str(file), str(port), *arguments]
    return Peer(name, command, port, grpc_port=port)


def triton(folder: Path, *, batching: bool = False) -> Peer:
    made = serving.triton(folder, batching=batching)
    port = next(int(a.split("=")[1]) for a in made.command if a.startswith("--grpc-port="))
    return of(made, port)


MAKERS = {
    "script": script,
    "script+uvloop": lambda folder: script(folder, "uvloop"),
    "triton": triton,
    "triton+batching": lambda folder: triton(folder, batching=True),
}


def load(peer: Peer, way: str, body: Path, calls: int) -> None:
    """One round; every call has to be answered with a tensor."""
    connections, at_once = WAYS[way]
    length = peer.call()
    cpu = peer.cpu_s()
    done = subprocess.run(
        [
            *("h2load", "-n", str(calls), "-c", str(connections), "-m", str(at_once), "-d", str(body)),
            *("-H", "content-type: application/grpc", "-H", "te: trailers"),
            *(part for header in peer.headers for part in ("-H", header)),
            f"http://127.0.0.1:{peer.grpc_port}/{SERVICE}/ModelInfer",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    cpu = peer.cpu_s() - cpu
    good, rate = re.search(r"status codes: (\d+) 2xx", done), re.search(r", ([\d.]+) req/s", done)
    data = re.search(r"\((\d+)\) data", done)
    assert good, done
    assert rate, done
    assert data, done
    # A refusal is a 200 too, but has no body.
    if int(good[1]) != calls or int(data[1]) < calls * length:
        raise RuntimeError(f"{peer.name}: {done}")
    peer.note(f"{way} {RPS}", float(rate[1]))
    peer.note(f"{way} {CPU}", cpu / calls * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=10_000, help="of a round at concurrency 16")
    parser.add_argument("--peers", nargs="*", default=list(MAKERS), choices=list(MAKERS))
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("h2load is missing: ./docker/system-packages.sh bench")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = message()
        (folder / "body").write_bytes(b"\0" + len(data).to_bytes(4, "big") + data)
        peers: list[Peer] = []
        try:
            for make in (ours, *(MAKERS[peer] for peer in options.peers)):
                try:
                    peer = make(folder)
                    peers.append(peer)
                    peer.start(folder / f"{peer.name}.log")
                except (RuntimeError, OSError) as error:
                    print(f"left out: {error}", file=sys.stderr)
                    peers = [p for p in peers if p is not peer]
            measure(peers, folder / "body", options.rounds, options.calls)
            show(peers)
        finally:
            for peer in peers:
                peer.stop()


def measure(peers: list[Peer], body: Path, rounds: int, calls: int) -> None:
    for peer in peers:
        load(peer, "c16", body, 500)
        peer.seen.clear()
    for at in range(rounds):
        for way in WAYS:
            # Nobody always follows the same one.
            for peer in peers[at % len(peers) :] + peers[: at % len(peers)]:
                load(peer, way, body, calls // (4 if way == "c1" else 1))
    for peer in peers:
        peer.rss_mib = peer.rss()


def show(peers: list[Peer]) -> None:
    print(f"{'server':<16} " + " ".join(f"{f'{w} {c}':>14}" for w in WAYS for c in (RPS, CPU)) + "  RSS MiB")
    for peer in peers:
        values = [peer.median(f"{way} {column}") for way in WAYS for column in (RPS, CPU)]
        print(f"{peer.name:<16} " + " ".join(f"{v:>14.0f}" for v in values) + f" {peer.rss_mib:>8.1f}")
    mine = peers[0]
    ratios = {}
    for peer in peers[1:]:
        for way in WAYS:
            key = f"{way} {RPS}"
            pairs = zip(mine.seen[key], peer.seen[key], strict=True)
            ratios[f"{key} over {peer.name}"] = round(median(a / b for a, b in pairs), 2)
    for name, ratio in ratios.items():
        print(f"{name:<40} {ratio:>6.2f}")
    result = {
        peer.name: {"rss_mib": round(peer.rss_mib, 1)}
        | {what: round(median(values), 1) for what, values in peer.seen.items()}
        for peer in peers
    }
    print(json.dumps({"benchmark": "serving-grpc", "ratios": ratios, "servers": result}))


if __name__ == "__main__":
    main()
