"""Other people's clients, unchanged, each in its own environment: every call of theirs is a test."""

import ast
import functools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Served, start, until
from tests.serve.environments import environment

pytestmark = [pytest.mark.xdist_group("serve-clients"), pytest.mark.timeout(600)]

CLIENTS = Path(__file__).parent / "clients"
PROGRAMS = {
    "client-triton": "triton_http.py",
    "client-kserve": "kserve_rest.py",
    "client-pytriton": "pytriton_http.py",
}
"""The environment, and what is run in it."""


def calls(program: Path) -> list[str]:
    """The names of the calls that a program makes, read without its imports."""
    tree = ast.parse(program.read_text())
    helpers: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELPERS":
            helpers = ast.literal_eval(node.value)
    return [
        n.name
        for n in tree.body
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name not in helpers
    ]


def run(name: str, program: Path, served: Served) -> dict[str, Any]:
    python = environment(name)
    done = subprocess.run(
        [str(python), "-I", str(program), str(served.port)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.fixture(scope="module")
def served(model_directory: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Served]:
    running = start(model_directory, tmp_path_factory.mktemp("clients") / "serve.log", cache=cache)
    try:
        until(running.ready, "all models are loaded")
        yield running
    finally:
        code = running.stop()
    assert code == 0
    assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def results(served: Served) -> Callable[[str], dict[str, Any]]:
    return functools.cache(lambda name: run(name, CLIENTS / PROGRAMS[name], served))


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name, file in PROGRAMS.items() for call in calls(CLIENTS / file)]
)
def test_call(results: Callable[[str], dict[str, Any]], name: str, call: str):
    found = results(name)
    assert found[call] is None, found[call]


def test_mlserver_infer(served: Served, tmp_path: Path):
    tool = environment("client-mlserver").with_name("mlserver")
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    x = [i / 64 for i in range(64)]
    body = {"inputs": [{"name": "input", "shape": [1, 64], "datatype": "FP32", "data": x}]}
    asked.write_text("".join(json.dumps(body | {"id": str(i)}) + "\n" for i in range(8)))
    for extra in ([], ["-s", "4"]):
        done = subprocess.run(
            [
                *(str(tool), "infer", "-u", f"127.0.0.1:{served.port}", "-m", "autoencoder"),
                *("-i", str(asked), "-o", str(answered), "-w", "2", *extra),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in answered.read_text().splitlines()]
        assert len(lines) == 8
        assert all(line["outputs"][0]["shape"] == [1, 64] for line in lines), lines[0]
