"""A real engine process, the supervisor's end of its socket, and small real packages."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent.core.frames import FrameReader, frame
from agent.ports import (
    Configure,
    FitResult,
    Fitted,
    FromEngine,
    Hello,
    LaneSpec,
    LaneState,
    Product,
    ServeSpec,
    ServeState,
    Stored,
    socket_address,
)
from contract.features import Feature, height
from contract.manifest import (
    Channel,
    FileRef,
    Fit,
    Golden,
    Manifest,
    Pipeline,
    Provenance,
    Score,
    Variant,
)
from contract.messages import Anomaly, ModelSummary
from inference.registry import open_session
from models import onnx_builder, tflite_builder
from models.dense import Layer, Network, Training, quantise_network, train_autoencoder

CHANNELS = ("a", "b", "c")
DEADLINE_S = 20.0


def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until ``condition`` is true; a test never sleeps for luck."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.01)
    raise AssertionError(f"not in {deadline_s} s: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Package:
    """A manifest and one model file, lying as objects."""

    manifest: Manifest
    manifest_path: Path
    digest: str
    files: dict[str, str]

    @property
    def variant(self) -> Variant:
        return self.manifest.variants[0]

    @property
    def pipeline(self) -> Pipeline:
        assert self.manifest.pipeline is not None
        return self.manifest.pipeline

    def spec(self, source: dict[str, Any], **changes: Any) -> LaneSpec:
        return msgspec.structs.replace(
            LaneSpec(
                lane="one",
                model_name=self.manifest.name,
                version=self.manifest.version,
                digest=self.digest,
                manifest=str(self.manifest_path),
                files=self.files,
                variant=self.variant.name,
                accelerator=self.variant.accelerators[0],
                source=source,
            ),
            **changes,
        )

    def model(self) -> bytes:
        return Path(self.files[self.variant.file.path]).read_bytes()


def samples(rows: int = 400, seed: int = 1, width: int = len(CHANNELS)) -> np.ndarray[Any, Any]:
    """Correlated rows; every 40th one breaks the correlation."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(rows, 1))
    values = 20 + 3 * (common + 0.3 * random.normal(size=(rows, width)))
    values[::40, 0] += 30
    return values.round(3)


def write_csv(path: Path, rows: np.ndarray[Any, Any], names: tuple[str, ...] = CHANNELS) -> Path:
    lines = [",".join(names)] + [",".join("" if np.isnan(v) else repr(float(v)) for v in row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def network(width: int) -> Network:
    random = np.random.default_rng(0)
    x = random.normal(size=(512, 1)) + 0.3 * random.normal(size=(512, width))
    return train_autoencoder(x, Training(hidden=(8,), epochs=3))


def nan_network(width: int) -> Network:
    weights = np.full((width, width), np.nan)
    return Network((Layer(weights=weights, bias=np.zeros(width), relu=False),))


def make_package(
    directory: Path,
    *,
    kind: str = "int8.tflite",
    window: int = 1,
    stride: int = 1,
    version: str = "1.0.0",
    threshold: float = 2.0,
    fit: Fit | None = None,
    net: Network | None = None,
    channels: tuple[Channel, ...] = tuple(Channel(name=n, minimum=-1000.0, maximum=1000.0) for n in CHANNELS),
    score: Score | None = None,
    clip: float | None = 6.0,
    features: tuple[Feature, ...] = (),
    content: bytes | None = None,
    accelerators: tuple[str, ...] = (),
) -> Package:
    """Write the objects of a package with one variant; ``kind`` is int8 or float32, then the format.

    ``content`` is its model, where it is to be a special one.
    """
    quantisation, model_format = kind.split(".")
    builder = tflite_builder if model_format == "tflite" else onnx_builder
    width = (sum(height(f, window) for f in features) or window) * len(channels)
    model = net or network(width)
    if content is not None:
        pass
    elif quantisation == "int8":
        calibration = np.random.default_rng(3).normal(size=(256, width)) * 2.5
        content = builder.build_int8(quantise_network(model, calibration), "test")
    else:
        content = builder.build_float(model, "test")
    session = open_session(content, model_format, "cpu")
    ref = FileRef("model." + model_format, hashlib.sha256(content).hexdigest(), len(content))
    manifest = Manifest(
        format=1,
        name="demo",
        version=version,
        release_counter=1,
        summary="a test",
        licence="Apache-2.0",
        variants=(
            Variant(
                name="v",
                file=ref,
                format="tflite" if model_format == "tflite" else "onnx",
                quantisation="int8" if quantisation == "int8" else "float32",
                inputs=session.inputs,
                outputs=session.outputs,
                golden=Golden(ref, 1, {}),
                accelerators=("cpu", *(("xnnpack",) if model_format == "tflite" else ()), *accelerators),
            ),
        ),
        provenance=Provenance(source="test", data="made up"),
        pipeline=Pipeline(
            channels=channels,
            window=window,
            stride=stride,
            mean=(20.0,) * len(channels),
            scale=(3.0,) * len(channels),
            clip=clip,
            sample_rate_hz=100.0,
            fit=fit,
            features=features,
        ),
        score=score or Score(method="reconstruction_mse", threshold=threshold),
    )
    session.close()
    text = msgspec.json.encode(manifest)
    digest = hashlib.sha256(text).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    manifest_path = directory / digest
    manifest_path.write_bytes(text)
    (directory / ref.sha256).write_bytes(content)
    return Package(manifest, manifest_path, digest, {ref.path: str(directory / ref.sha256)})


class Supervisor:
    """The supervisor's end of the socket."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(0.05)
        with socket_address(path) as address:
            self.sock.connect(address)
        self._reader = FrameReader()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self.messages: list[FromEngine] = []
        self.closed = False

    def send(self, message: Configure | Stored) -> None:
        self.sock.settimeout(5)
        self.sock.sendall(frame(msgspec.msgpack.encode(message)))

    def configure(self, *lanes: LaneSpec, bucket_s: float = 0.2, serve: ServeSpec | None = None) -> None:
        self.send(Configure(lanes=lanes, bucket_s=bucket_s, serve=serve))

    def stored(self, n: int) -> None:
        self.send(Stored(n=n))

    def read(self) -> None:
        """Take what is there by now."""
        self.sock.settimeout(0.05)
        try:
            data = self.sock.recv(1 << 20)
        except TimeoutError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
            return
        self.messages += [self._decoder.decode(p) for p in self._reader.feed(data)]

    def until(self, condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
        def poll() -> Any:
            self.read()
            return condition()

        return until(poll, what, deadline_s)

    def state(self, lane: str = "one") -> LaneState | None:
        states = [m for m in self.messages if isinstance(m, LaneState) and m.lane == lane]
        return states[-1] if states else None

    def until_state(self, lane: str = "one", **wanted: Any) -> LaneState:
        def there() -> LaneState | None:
            state = self.state(lane)
            fits = state is not None and all(getattr(state, k) == v for k, v in wanted.items())
            return state if fits else None

        try:
            found = self.until(there, f"{lane} becomes {wanted}")
        except AssertionError as error:
            raise AssertionError(f"{error}; last: {self.state(lane)}") from None
        assert isinstance(found, LaneState)
        return found

    @property
    def serving(self) -> ServeState | None:
        states = [m for m in self.messages if isinstance(m, ServeState)]
        return states[-1] if states else None

    @property
    def hello(self) -> Hello:
        self.until(lambda: self.messages, "a first message")
        first = self.messages[0]
        assert isinstance(first, Hello)
        return first

    @property
    def products(self) -> list[Product]:
        return [m for m in self.messages if isinstance(m, Product)]

    @property
    def anomalies(self) -> list[Anomaly]:
        return [p.body for p in self.products if isinstance(p.body, Anomaly)]

    @property
    def summaries(self) -> list[ModelSummary]:
        return [p.body for p in self.products if isinstance(p.body, ModelSummary)]

    @property
    def fits(self) -> list[FitResult]:
        return [m.fit for m in self.messages if isinstance(m, Fitted)]

    def close(self) -> None:
        self.sock.close()


@dataclass
class Engine:
    """A real engine process."""

    path: Path
    process: subprocess.Popen[bytes]
    supervisors: list[Supervisor] = field(default_factory=list)

    @property
    def log(self) -> str:
        return self.path.with_suffix(".log").read_text()

    def connect(self) -> Supervisor:
        supervisor = Supervisor(self.path)
        self.supervisors.append(supervisor)
        return supervisor

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)

    def end(self) -> None:
        for supervisor in self.supervisors:
            supervisor.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


def start_engine(path: Path) -> Engine:
    with path.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "agent.engine", "--socket", str(path)],
            stderr=log,
            start_new_session=True,
            env=os.environ | {"PYTHONWARNINGS": "error"},
        )
    engine = Engine(path, process)

    def up() -> bool:
        assert process.poll() is None, engine.log
        return path.exists()

    until(up, "the engine listens")
    return engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    started = start_engine(tmp_path / "e.sock")
    yield started
    started.end()
