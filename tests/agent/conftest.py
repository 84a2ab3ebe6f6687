"""Helpers of the agent's tests, handed out as fixtures."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from contract.messages import PROTOCOL_VERSION, Desired, ModelAssignment, Role
from tests.agent.bench import DEVICE, Assign, Bench, Engines, intake


def _assign(version: str, role: Role = Role.ACTIVE, model: str = "pump", **more: object) -> ModelAssignment:
    order = ModelAssignment(
        model_name=model,
        version=version,
        role=role,
        manifest_path=f"models/{model}/{version}/manifest.json",
        manifest_sha256=hashlib.sha256(f"{model}/{version}".encode()).hexdigest(),
        manifest_length=100,
        release_counter=int(version.split(".", maxsplit=1)[0]),
    )
    return msgspec.structs.replace(order, **more)


def _desired(*models: ModelAssignment, revision: int = 1) -> Desired:
    return Desired(v=PROTOCOL_VERSION, device=DEVICE, revision=revision, models=models)


def _wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s} s for {what}")
        time.sleep(0.02)


@pytest.fixture(scope="session")
def assign() -> Assign:
    """Make an order for a version of a model."""
    return _assign


@pytest.fixture(scope="session")
def desire() -> Callable[..., Desired]:
    """Make a desired document."""
    return _desired


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Poll until a condition holds, or fail saying what was waited for."""
    return _wait_until


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    found = Bench(tmp_path)
    yield found
    found.close()


@pytest.fixture
def engines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Engines:
    monkeypatch.setattr(bench.engine, "send", lambda _message: True)
    return Engines(bench, intake(bench))
