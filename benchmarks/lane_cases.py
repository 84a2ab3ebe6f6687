"""Models for the lanes of ``bench_lane``, and their packages.

MLPerf Tiny's ad01 is taken from ``$PITHEAD_SHARED_DATA/models`` and left out
where it is not there.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from agent.ports import LaneSpec
from contract.manifest import (
    Channel,
    FileRef,
    Golden,
    Manifest,
    Pipeline,
    Provenance,
    Score,
    TensorSpec,
    Variant,
)
from inference.registry import open_session
from models import onnx_builder, tflite_builder
from models.dense import Training, quantise_network, train_autoencoder

ROOT: Final = Path(__file__).parents[1]
AD01: Final = (
    Path(os.environ.get("PITHEAD_SHARED_DATA", ROOT.parent / "shared" / "data"))
    / "models"
    / "mlperf-tiny-ad01"
)
ROWS: Final = 4096


@dataclass(frozen=True)
class Case:
    """A model in a lane."""

    model: str
    content: bytes
    format: Any
    accelerator: str
    channels: int
    window: int
    input: TensorSpec
    output: TensorSpec

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.model} {self.format}"

    def rows(self) -> Any:
        """Random rows, as the recording holds them."""
        return np.random.default_rng(0).normal(0, 2, size=(ROWS, self.channels)).round(3)

    def windows(self) -> Any:
        """Normalised and cut, as the lane has them before it quantises."""
        rows = self.rows().astype(np.float32)
        return np.stack([rows[i : i + self.window].reshape(-1) for i in range(ROWS - self.window + 1)])


def cases() -> Iterator[Case]:
    if AD01.is_dir():
        first = (AD01 / "ad01_int8.tflite").read_bytes()
        session = open_session(first, "tflite", "xnnpack")
        tensors = session.inputs[0], session.outputs[0]
        session.close()
        yield Case("ad01 5x128", first, "tflite", "xnnpack", 128, 5, *tensors)
        yield Case("ad01 5x128", (AD01 / "ad01_int8.onnx").read_bytes(), "onnx", "cpu", 128, 5, *tensors)
        yield Case("ad01 1x640", first, "tflite", "xnnpack", 640, 1, *tensors)
    else:
        print(f"no models at {AD01}: set PITHEAD_SHARED_DATA to measure MLPerf Tiny's ad01")
    for width in (8, 9):
        x = np.random.default_rng(1).normal(0, 2, size=(2048, width))
        integers = quantise_network(train_autoencoder(x, Training(hidden=(16, 4, 16), epochs=2)), x)
        for kind, accelerator, builder in (
            ("tflite", "xnnpack", tflite_builder),
            ("onnx", "cpu", onnx_builder),
        ):
            content = builder.build_int8(integers, "bench")
            session = open_session(content, kind, accelerator)
            tensors = session.inputs[0], session.outputs[0]
            session.close()
            yield Case(f"dense 1x{width}", content, kind, accelerator, width, 1, *tensors)


def package(case: Case, directory: Path, threshold: float, **source: Any) -> LaneSpec:
    """Write the case's package and recording; return its lane."""
    ref = FileRef(f"model.{case.format}", hashlib.sha256(case.content).hexdigest(), len(case.content))
    manifest = Manifest(
        format=1,
        name="bench",
        version="1.0.0",
        release_counter=1,
        summary="bench",
        licence="Apache-2.0",
        variants=(
            Variant(
                name="v",
                file=ref,
                format=case.format,
                quantisation="int8",
                inputs=(case.input,),
                outputs=(case.output,),
                golden=Golden(ref, 1, {}),
                accelerators=(case.accelerator,),
            ),
        ),
        provenance=Provenance(source="bench", data="random"),
        pipeline=Pipeline(
            channels=tuple(Channel(f"c{i}", minimum=-1e6, maximum=1e6) for i in range(case.channels)),
            window=case.window,
            stride=1,
            mean=(0.0,) * case.channels,
            scale=(1.0,) * case.channels,
            clip=1e6,
        ),
        score=Score(method="reconstruction_mse", threshold=threshold),
    )
    text = msgspec.json.encode(manifest)
    (directory / ref.path).write_bytes(case.content)
    (directory / "manifest.json").write_bytes(text)
    header = ",".join(f"c{i}" for i in range(case.channels))
    np.savetxt(directory / "rows.csv", case.rows(), fmt="%.3f", delimiter=",", header=header, comments="")
    return LaneSpec(
        lane="bench",
        model_name="bench",
        version="1.0.0",
        digest=hashlib.sha256(text).hexdigest(),
        manifest=str(directory / "manifest.json"),
        files={ref.path: str(directory / ref.path)},
        variant="v",
        accelerator=case.accelerator,
        source={"kind": "replay", "path": str(directory / "rows.csv"), **source},
    )
