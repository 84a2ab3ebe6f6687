"""The update process as the supervisor starts it: one line of JSON, an exit code, and little to load."""

import json
import subprocess
import sys

import pytest

from tests.trust.conftest import FakeDevice, Plant


def run(device: FakeDevice, *arguments: str) -> tuple[int, dict[str, object]]:
    command = [sys.executable, "-m", "agent.update", arguments[0], "--root", str(device.layout.root)]
    ended = subprocess.run([*command, *arguments[1:]], capture_output=True, check=False, timeout=60, cwd="/")
    lines = ended.stdout.splitlines()
    assert len(lines) == 1, ended
    return ended.returncode, json.loads(lines[0])


def test_refresh_says_what_is_desired(plant: Plant, device: FakeDevice) -> None:
    bundle = device.layout.bundle
    bundle.write_bytes(plant.director.bundle(device.id)[0])
    code, answer = run(device, "refresh", "--bundle", str(bundle))
    assert (code, answer["ok"]) == (0, True)
    assert answer["desired"]["models"][0]["version"] == "1.0.0"  # type: ignore[index]


def test_refusals_have_a_code_and_facts(plant: Plant, device: FakeDevice) -> None:
    bundle = device.layout.bundle
    old = plant.director.bundle(device.id)[0]
    plant.clock.offset += 60_000_000
    plant.want(device.id)
    device.refresh(plant.bundle(device.id))
    bundle.write_bytes(old)
    code, answer = run(device, "refresh", "--bundle", str(bundle))
    assert (code, answer["ok"], answer["code"]) == (1, False, "update.metadata_rollback")
    assert answer["facts"]["role"] == "timestamp"  # type: ignore[index]
    arguments = (
        "--sha256",
        "0" * 64,
        "--length",
        "1",
        "--target",
        "models/a/1.0.0/b",
        "--server",
        "https://x",
    )
    code, answer = run(device, "fetch", *arguments)
    assert (code, answer["code"]) == (1, "update.not_released")


def test_a_device_that_is_not_enrolled(plant: Plant, device: FakeDevice) -> None:
    device.layout.bundle.write_bytes(plant.director.bundle(device.id)[0])
    device.layout.director_root.unlink()
    code, answer = run(device, "refresh", "--bundle", str(device.layout.bundle))
    assert (code, answer["code"]) == (1, "storage.corrupt")


def test_a_missing_bundle(device: FakeDevice) -> None:
    code, answer = run(device, "refresh", "--bundle", "/nonexistent")
    assert (code, answer["code"]) == (1, "storage.failed")


@pytest.mark.parametrize(
    ("command", "never"),
    [
        ("_refresh", {"urllib3", "requests", "http.client", "numpy", "onnxruntime"}),
        ("_fetch", {"tuf", "cryptography", "securesystemslib", "urllib3", "numpy"}),
    ],
)
def test_what_is_not_loaded(device: FakeDevice, command: str, never: set[str]) -> None:
    """Twenty of these share two cores: `refresh` brings no HTTP client, `fetch` no cryptography."""
    code = (
        "import argparse, sys, contextlib, pathlib\n"
        "from agent.core.layout import Layout\n"
        "from agent.update import __main__ as program\n"
        "options = argparse.Namespace(sha256='0' * 64, length=1, target='t', deadline_s=1.0, server='https://x',"
        " bundle=pathlib.Path('/nonexistent'))\n"
        "with contextlib.suppress(Exception):\n"
        f"    program.{command}(Layout(pathlib.Path({str(device.layout.root)!r})), options, 0)\n"
        "print(*sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, cwd="/")
    loaded = set(ended.stdout.split())
    assert not loaded & never
    assert "agent.update.refresh" in loaded or command == "_fetch"
