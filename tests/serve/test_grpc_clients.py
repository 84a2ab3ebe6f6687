"""Other people's clients over gRPC, unchanged; see ``test_clients.py``."""

import functools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.engine.serve.proto.messages import CALLS, CLASSES
from tests.serve.conftest import Served, start, until
from tests.serve.environments import environment
from tests.serve.test_clients import CLIENTS, calls

pytestmark = [pytest.mark.xdist_group("serve-clients"), pytest.mark.timeout(600)]

PROGRAMS = {
    "client-triton": "triton_grpc.py",
    "client-kserve": "kserve_grpc.py",
    "client-pytriton": "pytriton_grpc.py",
}
NOT_TRITONS = {"RepositoryModelLoadResponse", "RepositoryModelUnloadResponse"}
"""Messages that have KServe's fields and none of Triton's."""


def run(name: str, *arguments: str) -> Any:
    done = subprocess.run(
        [str(environment(name)), "-I", str(CLIENTS / PROGRAMS[name]), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results(
    model_directory: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Iterator[Callable[[str], Any]]:
    log = tmp_path_factory.mktemp("clients") / "serve.log"
    running: Served = start(model_directory, log, "--grpc-port", "0", cache=cache)
    until(running.ready, "all models are loaded")
    yield functools.cache(lambda name: run(name, str(running.grpc_port)))
    assert running.stop() == 0
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name, file in PROGRAMS.items() for call in calls(CLIENTS / file)]
)
def test_call(results: Callable[[str], Any], name: str, call: str):
    found = results(name)
    assert found[call] is None, found[call]


def difference(ours: Any, theirs: dict[str, Any], path: str) -> Iterator[str]:
    """What our description says and theirs does not; theirs may have more."""
    for field in ours.fields:
        here = f"{path}.{field.name}"
        found = theirs.get(str(field.number))
        oneof = field.containing_oneof.name if field.containing_oneof else ""
        if found is None or found[:4] != [field.name, field.type, field.is_repeated, oneof]:
            yield f"{here}: {found and found[:4]}"
        elif field.message_type:
            yield from difference(field.message_type, found[4], here)
        elif field.enum_type:
            said = {str(v.number): v.name for v in field.enum_type.values}
            if said != found[5]:
                yield f"{here}: {found[5]}"


def test_our_description_is_tritons():
    theirs = run("client-triton", "0", "descriptors")
    assert set(theirs) == {*CALLS, "ModelStreamInfer"}
    wrong: list[str] = []
    for call in CALLS:
        for kind, known in zip(("Request", "Response"), theirs[call], strict=True):
            name = f"{call}{kind}"
            if name not in NOT_TRITONS:
                wrong += difference(CLASSES[name].DESCRIPTOR, known, name)
    asked, answered = theirs["ModelStreamInfer"]
    wrong += difference(CLASSES["ModelInferRequest"].DESCRIPTOR, asked, "ModelInferRequest")
    wrong += difference(CLASSES["ModelStreamInferResponse"].DESCRIPTOR, answered, "ModelStreamInferResponse")
    assert wrong == []
