"""A server and its memory: what asks for too much is refused, who outgrows the limit begins anew."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.agent.test_model_faults import greedy
from tests.serve import models
from tests.serve.conftest import DEADLINE_S, Served, tensor, until

AGAIN = """
import sys
from agent.core import memory
from agent.engine.serve import outgrown
from agent.engine.serve.command import main
memory.OUTGROWN_S, memory.AHEAD_BYTES = 0.1, 10**9
outgrown.WEIGH_S = 0.1
outgrown.YOUNG_S = {young}
sys.exit(main(sys.argv[1:]))
"""


def ask(served: Served, value: float) -> tuple[int, str]:
    reply = served.infer("greedy", {"inputs": [tensor("x", "FP32", np.full((1, 3), value, np.float32))]})
    return reply.status, reply.body.decode()


def test_a_run_that_asks_for_8_gb_is_refused_and_harms_nobody(starts: Callable[..., Served], tmp_path: Path):
    directory = tmp_path / "models"
    directory.mkdir()
    (directory / "greedy.onnx").write_bytes(greedy(8))
    served = starts(directory, "--memory-limit", "300")
    until(served.ready, "the model is loaded")
    assert ask(served, 0.0)[0] == 200
    status, said = ask(served, 1.0)
    assert (status, "inference.out_of_memory" in said) == (503, True), said
    assert ask(served, 0.0)[0] == 200
    assert Path(f"/proc/{served.process.pid}/oom_score_adj").read_text().strip() == "500"
    counted = 'pithead_inference_requests_total{model="greedy",version="1",outcome="failure"}'
    assert served.metric(counted) == 1


def outgrowing(directory: Path, log: Path, cache: Path, young_s: int) -> Served:
    """A server that holds more than it may as soon as its model is loaded."""
    directory.mkdir()
    (directory / "autoencoder.onnx").write_bytes(models.autoencoder())
    with log.open("w") as errors:
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", AGAIN.format(young=young_s), str(directory), "--http-port", "0"),
                *("--memory-limit", "10", "--probe-cache", str(cache)),
            ],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    return Served(process, listening(process), log, directory)


def listening(process: "subprocess.Popen[str]") -> int:
    """Return the port that it says it listens on."""
    assert process.stdout is not None
    found = re.search(r"://[^ ]*:(\d+)", process.stdout.readline())
    assert found
    return int(found[1])


def test_a_server_that_outgrows_its_memory_begins_anew_on_its_port(tmp_path: Path, cache: Path):
    served = outgrowing(tmp_path / "m", tmp_path / "log", cache, 0)
    try:
        assert listening(served.process) == served.port
    finally:
        served.process.kill()
        served.stop()
    said = served.log.read_text()
    assert re.search(r"serve.outgrown detail=it held \d+ MB of memory, and may hold 10 MB", said), said


def test_a_server_whose_models_never_fit_says_so_and_ends(tmp_path: Path, cache: Path):
    served = outgrowing(tmp_path / "m", tmp_path / "log", cache, 1000)
    assert served.process.wait(DEADLINE_S) == 2
    served.stop()
    assert "inference.out_of_memory: it held" in served.log.read_text()
