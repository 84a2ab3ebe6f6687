"""Windows per second through a whole lane, beside a bare loop over the same rows on the same runtime.

The bare loop normalises, quantises, calls the runtime, dequantises and scores
the same batches; the lane adds its source, checks, windowing, debounce,
sketches, anomalies and summaries.
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agent.engine.clock import Clock
from agent.engine.lane import Lane
from agent.engine.loading import Loader
from agent.engine.outlet import Outlet
from agent.ports import LaneSpec
from contract.manifest import (
    Channel,
    FileRef,
    Golden,
    Manifest,
    Pipeline,
    Provenance,
    Score,
    Variant,
)
from inference.registry import open_session
from inference.scoring import BATCH
from models import onnx_builder, tflite_builder
from models.dense import Training, quantise_network, train_autoencoder

WIDTH = 9
CLOCK = Clock(wall=lambda: time.time_ns() // 1000, mono=lambda: time.monotonic_ns() // 1000)


def package(directory: Path, content: bytes, kind: Any, accelerator: str) -> LaneSpec:
    session = open_session(content, kind, accelerator)
    ref = FileRef(f"model.{kind}", hashlib.sha256(content).hexdigest(), len(content))
    variant = Variant(
        name="v",
        file=ref,
        format=kind,
        quantisation="int8",
        inputs=session.inputs,
        outputs=session.outputs,
        golden=Golden(ref, 1, {}),
        accelerators=(accelerator,),
    )
    manifest = Manifest(
        format=1,
        name="bench",
        version="1.0.0",
        release_counter=1,
        summary="bench",
        licence="Apache-2.0",
        variants=(variant,),
        provenance=Provenance(source="bench", data="random"),
        pipeline=Pipeline(
            channels=tuple(Channel(f"c{i}", minimum=-1e6, maximum=1e6) for i in range(WIDTH)),
            window=1,
            stride=1,
            mean=(0.0,) * WIDTH,
            scale=(1.0,) * WIDTH,
            clip=6.0,
        ),
        score=Score(method="reconstruction_mse", threshold=10.0),
    )
    text = msgspec.json.encode(manifest)
    (directory / ref.path).write_bytes(content)
    (directory / "manifest.json").write_bytes(text)
    return LaneSpec(
        lane="bench",
        model_name="bench",
        version="1.0.0",
        digest=hashlib.sha256(text).hexdigest(),
        manifest=str(directory / "manifest.json"),
        files={ref.path: str(directory / ref.path)},
        variant="v",
        accelerator=accelerator,
        source={
            "kind": "replay",
            "path": str(directory / "rows.csv"),
            "rate_hz": 1e7,
            "buffer_s": 1e6,
        },
    )


def through_lane(spec: LaneSpec, seconds: float) -> float:
    """Windows per second, by what the lane itself reports."""
    outlet, loader = Outlet(CLOCK, lambda: None), Loader()
    loader.start()
    lane = Lane(spec, 60.0, outlet, loader, CLOCK)
    lane.start()
    while lane.windows == 0:
        time.sleep(0.001)
    began, before = time.perf_counter(), lane.windows
    time.sleep(seconds)
    rate = (lane.windows - before) / (time.perf_counter() - began)
    lane.stop()
    lane.join(5)
    return rate


def bare_litert(content: bytes, rows: Any, seconds: float) -> float:
    from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415 - each peer loads its runtime alone

    interpreter = Interpreter(model_content=content, num_threads=1)
    given, got = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.resize_tensor_input(given["index"], (BATCH, WIDTH))
    interpreter.allocate_tensors()
    (scale, zero), (out_scale, out_zero) = given["quantization"], got["quantization"]

    def run(x: Any) -> Any:
        interpreter.set_tensor(given["index"], np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int8))
        interpreter.invoke()
        y = (interpreter.get_tensor(got["index"]).astype(np.float32) - out_zero) * out_scale
        return np.square(x - y).mean(axis=1)

    return bare(run, rows, seconds)


def bare_onnx(content: bytes, rows: Any, seconds: float) -> float:
    import onnxruntime  # noqa: PLC0415 - as above

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return bare(lambda x: np.square(x - session.run(None, {name: x})[0]).mean(axis=1), rows, seconds)


def bare(run: Any, rows: Any, seconds: float) -> float:
    done, alarms, began = 0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = done % (len(rows) - BATCH)
        x = np.clip((rows[start : start + BATCH] - 0.0) / 1.0, -6, 6).astype(np.float32)
        alarms += int((run(x) > 10.0).sum())
        done += BATCH
    return done / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    seconds = parser.parse_args().seconds
    rows = np.random.default_rng(0).normal(size=(8192, WIDTH))
    network = train_autoencoder(rows, Training(hidden=(16, 4, 16), epochs=2))
    integers = quantise_network(network, rows)
    results = {}
    print(f"{'runtime':<10}{'lane windows/s':>16}{'bare windows/s':>16}{'lane/bare':>11}{'us/window':>11}")
    for kind, accelerator, builder, peer in (
        ("tflite", "xnnpack", tflite_builder, bare_litert),
        ("onnx", "cpu", onnx_builder, bare_onnx),
    ):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            header = ",".join(f"c{i}" for i in range(WIDTH))
            np.savetxt(directory / "rows.csv", rows, delimiter=",", header=header, comments="")
            content = builder.build_int8(integers, "bench")
            spec = package(directory, content, kind, accelerator)
            alone = peer(content, rows, seconds)
            lane = through_lane(spec, seconds)
        results[kind] = {"lane": round(lane), "bare": round(alone), "ratio": round(lane / alone, 3)}
        print(f"{kind:<10}{lane:>16,.0f}{alone:>16,.0f}{lane / alone:>11.2f}{1e6 / lane:>11.2f}")
    print(json.dumps({"bench": "lane", "batch": BATCH, "windows_per_s": results}))


if __name__ == "__main__":
    main()
