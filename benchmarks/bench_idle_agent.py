"""Memory of an idle agent: PSS of supervisor and engine together, with one int8 model at one window a second.

The peer is bare Python with the same runtime and model loaded, in the same run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from contract import codec
from contract.manifest import MANIFEST_NAME, Manifest
from models import shipped
from simulator.demo import policies
from simulator.demo.fleet import Fleet
from simulator.processes import wait_until

MB = 1e6
BARE = """
import sys, time
from inference.registry import open_session
session = open_session(sys.argv[1], sys.argv[2])
print("ready", flush=True)
time.sleep(60)
"""


def only_variant(package: Path, name: str) -> None:
    """Take every other variant out of a package."""
    path = package / MANIFEST_NAME
    document = json.loads(path.read_bytes())
    document["variants"] = [v for v in document["variants"] if v["name"] == name]
    path.write_bytes(codec.encode(codec.decode(json.dumps(document).encode(), Manifest)))


def bare(model: Path, model_format: str) -> float:
    """Return the PSS in MB of a process that has loaded the model and nothing else."""
    process = subprocess.Popen(
        [sys.executable, "-c", BARE, model, model_format], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        return psutil.Process(process.pid).memory_full_info().pss / MB
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def agent(variant: str, seconds: float) -> dict[str, float]:
    """Return the PSS in MB of the agent's processes, medians over ``seconds``."""
    with tempfile.TemporaryDirectory() as name:
        fleet = Fleet(Path(name), 1, 0.02)
        package = shipped.build_apart(shipped.order("shuttle"), fleet.packages)
        only_variant(package, variant)
        fleet.configure(fleet.write_recording())
        fleet.plant.prepare()
        try:
            fleet.plant.start()
            fleet.enrol(fleet.devices, fleet.plant.join_token(1))
            fleet.start()
            wait_until(lambda: any(d["online"] for d in fleet.plant.devices()), "the device to be online")
            fleet.plant.release(package)
            body = {"model": "shuttle", "version": "1.0.0", "policy": policies.FIRST_INSTALL}
            fleet.plant.api.post("/api/v1/rollouts", body)
            wait_until(lambda: fleet.serving("shuttle"), "the model to serve", 60)
            samples: dict[str, list[float]] = {"supervisor": [], "engine": []}
            for _ in range(int(seconds)):
                time.sleep(1)
                for process in fleet.devices[0].processes():
                    role = "engine" if "agent.engine" in process.cmdline() else "supervisor"
                    samples[role].append(process.memory_full_info().pss / MB)
            model = json.loads((package / MANIFEST_NAME).read_bytes())["variants"][0]
            result = {role: statistics.median(values) for role, values in samples.items()}
            result["agent"] = sum(result.values())
            result["bare"] = bare(package / model["file"]["path"], model["format"])
            return result
        finally:
            fleet.stop()


def main() -> None:
    """Measure both runtimes and print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long to watch each")
    seconds = parser.parse_args().seconds
    os.environ.pop("PITHEAD_DATA_DIR", None)
    results = {variant: agent(variant, seconds) for variant in ("int8-tflite", "int8-onnx")}
    print(f"{'PSS, MB':14}{'supervisor':>12}{'engine':>10}{'together':>10}{'bare runtime':>14}{'ratio':>8}")
    for variant, r in results.items():
        ratio = r["agent"] / r["bare"]
        print(
            f"{variant:14}{r['supervisor']:12.1f}{r['engine']:10.1f}{r['agent']:10.1f}{r['bare']:14.1f}{ratio:8.2f}"
        )
    print(json.dumps({"benchmark": "idle_agent", "pss_mb": results}))


if __name__ == "__main__":
    main()
