"""What a `Session` costs on top of the bare runtime, and what a probe costs, on the shipped model.

The peer of each session is the same runtime called bare, on the same bytes
and input, in the same run; interleaved, so that both meet the same machine.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from ai_edge_litert.interpreter import Interpreter

from inference.arithmetic import DTYPES
from inference.probing import probe
from inference.registry import open_session
from models import package, shipped

ROUNDS = 30
CALLS = 500


def p50_us(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return each call's median of rounds, in microseconds."""
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            rounds[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: float(np.median(times)) for name, times in rounds.items()}


def bare_tflite(content: bytes, x: Any) -> Callable[[], Any]:
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    feed, fetch = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def call() -> Any:
        interpreter.set_tensor(feed, x)
        interpreter.invoke()
        return interpreter.get_tensor(fetch)

    return call


def bare_onnx(content: bytes, x: Any) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [session.get_outputs()[0].name]
    return lambda: session.run(names, {"input": x})


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = shipped.build_apart(shipped.order("shuttle"), Path(folder))
        manifest = package.read_manifest(directory)
        result: dict[str, Any] = {}
        print(f"{'variant':<16} {'session us':>10} {'bare us':>10} {'overhead':>10}")
        for variant in manifest.variants:
            content = (directory / variant.file.path).read_bytes()
            session = open_session(content, variant.format, variant.accelerators[0])
            spec = session.inputs[0]
            x = np.zeros((1, spec.shape[1]), DTYPES[spec.datatype])
            bare = (bare_tflite if variant.format == "tflite" else bare_onnx)(content, x)
            feed = {spec.name: x}
            times = p50_us({"session": lambda s=session, f=feed: s.run(f), "bare": bare})
            result[variant.name] = times
            print(
                f"{variant.name:<16} {times['session']:>10.2f} {times['bare']:>10.2f} "
                f"{times['session'] - times['bare']:>9.2f}+"
            )
        before = os.times()
        start = time.perf_counter()
        reports = probe(manifest, package.check_files(directory, manifest), first_only=True)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        result["probe"] = {"cpu_s": cpu, "wall_s": time.perf_counter() - start, "passed": reports[-1].passed}
        print(f"probe of {reports[-1].variant}: {cpu:.2f} s CPU, limit 0.5 s")
    print(json.dumps({"benchmark": "sessions", "python": sys.version.split()[0], **result}))


if __name__ == "__main__":
    main()
