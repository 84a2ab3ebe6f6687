"""What overload does to those who are accepted, with a latency objective: they do not wait for the others.

First one client alone. Then five times as many requests a second as the model can answer one by one, and then
as many clients as are given, each of which asks again at once: both without regard for ``Retry-After``. The
objective is 2.75 times what one client alone sees; the peer is the same server without one. Ratios are of the
p99 of those that were answered to the p99 of the client that was alone, in the same round. Clients that spin
share the processor with the model on this machine, which shows in their ratio.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final, cast

import bench_serving as serving
import numpy as np
import psutil
from swap_models import WIDTH, heavy

NAME: Final = "heavy"
TIMES: Final = 5
RATIO: Final = 3.0
MORE_MEMORY: Final = 0.05
OK: Final = b"200"
ANSWER_S: Final = 60.0
SPREAD: Final = 100
"""Connections among which the requests of the steady rate are shared out."""
OBJECTIVE: Final = 2.75
"""Of the median of one client alone."""


@dataclass(frozen=True)
class Seen:
    """Milliseconds of those that were answered, and of those that were refused."""

    accepted: list[float]
    refused: list[float]

    @property
    def p99(self) -> float:
        """Of those that were answered."""
        return float(np.percentile(self.accepted, 99))


class Client(asyncio.Protocol):
    """One connection, which has one request under way at most."""

    def __init__(self, idle: "list[Client]", back: asyncio.Event) -> None:
        self._idle, self._back = idle, back
        self.sent: float | None = None
        self.answers: list[tuple[float, bytes]] = []
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        self._transport = cast("asyncio.Transport", transport)

    def ask(self, request: bytes) -> None:
        """Send a request."""
        self.sent, self._got = time.perf_counter(), b""
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Note the answer once its head is there: what follows comes in the same segment."""
        self._got += data
        if self.sent is None or b"\r\n\r\n" not in self._got:
            return
        self.answers.append(((time.perf_counter() - self.sent) * 1000, self._got[9:12]))
        self.sent = None
        self._idle.append(self)
        self._back.set()

    def close(self) -> None:
        """End it."""
        self._transport.close()


@dataclass
class Server:
    """``pithead-agent serve`` with one model."""

    folder: Path
    more: tuple[str, ...]

    @contextlib.contextmanager
    def running(self) -> Iterator["Server"]:
        """Begin, and end."""
        self.port = serving.free_port()
        command = [
            *(
                sys.executable,
                "-m",
                "agent",
                "serve",
                str(self.folder / f"{NAME}.onnx"),
                "--log-level",
                "warning",
            ),
            *("--http-port", str(self.port), "--probe-cache", str(self.folder / "probed.json"), *self.more),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 60
            while not self._ready():
                assert time.monotonic() < end, "the server is not ready"
                time.sleep(0.05)
            yield self
        finally:
            self._process.terminate()
            self._process.wait(30)

    @property
    def rss_mib(self) -> float:
        """Its memory."""
        return float(psutil.Process(self._process.pid).memory_info().rss / 2**20)

    def load(self, *how: str) -> Seen:
        """Ask as h2load is told to."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        url = f"http://127.0.0.1:{self.port}/v2/models/{NAME}/infer"
        command = ["h2load", "--h1", "-d", str(self.folder / "body"), f"--log-file={log}", *how, url]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        accepted: list[float] = []
        refused: list[float] = []
        for line in log.read_text().splitlines():
            _, status, took = line.split("\t")
            if status not in {"200", "503"}:
                raise RuntimeError(f"an answer was neither given nor refused: {line}")
            (accepted if status == "200" else refused).append(int(took) / 1000)
        return Seen(accepted, refused)

    def steady(self, rate: float, seconds: float) -> Seen:
        """Ask at a rate, evenly: h2load's clients would all ask in the same moment."""
        return asyncio.run(self._steady(rate, seconds))

    async def _steady(self, rate: float, seconds: float) -> Seen:
        body = (self.folder / "body").read_bytes()
        head = (
            f"POST /v2/models/{NAME}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        request = head.encode() + body
        loop = asyncio.get_running_loop()
        idle: list[Client] = []
        back = asyncio.Event()
        clients = [Client(idle, back) for _ in range(SPREAD)]
        for client in clients:
            await loop.create_connection(lambda client=client: client, "127.0.0.1", self.port)  # type: ignore[misc]
        idle += clients
        begin = time.perf_counter()
        for i in range(round(rate * seconds)):
            wait = begin + i / rate - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            while not idle:
                await asyncio.wait_for(back.wait(), ANSWER_S)
                back.clear()
            idle.pop().ask(request)
        for client in clients:
            while client.sent is not None:
                await asyncio.wait_for(back.wait(), ANSWER_S)
                back.clear()
            client.close()
        answers = [answer for client in clients for answer in client.answers]
        return Seen([ms for ms, code in answers if code == OK], [ms for ms, code in answers if code != OK])

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{self.port}/v2/health/ready"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(answer.status == 200)
        return False


def measure(server: Server, options: argparse.Namespace) -> dict[str, float]:
    """Return medians of rounds."""
    rounds: list[dict[str, float]] = []
    first = 0.0
    for _ in range(options.rounds):
        calm = server.load("-c", "1", f"-D{options.seconds}")
        rate = TIMES * 1000 / median(calm.accepted)
        open_ = server.steady(rate, options.seconds)
        first = first or server.rss_mib
        closed = server.load("-c", str(options.clients), f"-D{options.seconds}")
        rounds.append(
            {
                "alone p50 ms": median(calm.accepted),
                "alone p99 ms": calm.p99,
                "x5 p99 ms": open_.p99,
                "x5 ratio": open_.p99 / calm.p99,
                "x5 answered a second": len(open_.accepted) / options.seconds,
                "x5 refused p50 ms": median(open_.refused or [0.0]),
                "clients p99 ms": closed.p99,
                "clients ratio": closed.p99 / calm.p99,
                "clients answered a second": len(closed.accepted) / options.seconds,
                "clients refused p50 ms": median(closed.refused or [0.0]),
            }
        )
    result = {what: round(median(r[what] for r in rounds), 2) for what in rounds[0]}
    result["RSS ratio"] = round(server.rss_mib / first, 3)
    return result


def missed(result: dict[str, float]) -> list[str]:
    """Return what was promised and is not so."""
    said = []
    if result["x5 ratio"] > RATIO:
        said.append(f"under five times the load, p99 is more than {RATIO:g} times that of a client alone")
    if result["RSS ratio"] > 1 + MORE_MEMORY:
        said.append("memory has grown by more than 5 %")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10, help="of each load")
    parser.add_argument("--clients", type=int, default=300, help="that ask again at once")
    parser.add_argument("--width", type=int, default=1024, help="of the model")
    parser.add_argument("--layers", type=int, default=100, help="of the model")
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("h2load is missing: ./docker/system-packages.sh bench")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / f"{NAME}.onnx").write_bytes(heavy(options.width, options.layers))
        tensor = {"name": "input", "shape": [1, WIDTH], "datatype": "FP32", "data": [0.5] * WIDTH}
        (folder / "body").write_text(json.dumps({"inputs": [tensor]}))
        with Server(folder, ()).running() as server:
            alone_ms = median(server.load("-c", "1", f"-D{options.seconds}").accepted)
        objective = ("--latency-objective-ms", f"{OBJECTIVE * alone_ms:.1f}")
        for kind, more in (("objective", objective), ("none", ())):
            with Server(folder, more).running() as server:
                results[kind] = measure(server, options)
    for what in results["objective"]:
        print(f"{what:<28}" + "".join(f"{kind:>12} {found[what]:>10.2f}" for kind, found in results.items()))
    said = missed(results["objective"])
    print(json.dumps({"benchmark": "overload", **results, "missed": said}))
    sys.exit("; ".join(said) or 0)


if __name__ == "__main__":
    main()
