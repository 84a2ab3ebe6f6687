"""What is found in a directory, and that nothing is opened here before it was opened in the sandbox."""

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest

from agent.engine.serve import catalogue, opening
from agent.engine.serve.repository import Directory, Memory, newest
from agent.engine.serve.requests import Region
from agent.engine.serve.service import Service
from agent.engine.serve.shared_memory import SharedMemory, owners
from agent.engine.serve.verdicts import Verdict, Verdicts
from contract.errors import PitheadError
from inference.accelerators import find
from inference.probing import Limits
from inference.runtimes import onnx
from models import shipped
from tests.serve import models


def found(path: Path) -> set[tuple[str, str, str]]:
    return {(c.name, c.version, c.platform) for c in Directory(path, Verdicts(None)).scan()}


def test_all_layouts_side_by_side(tmp_path: Path):
    models.write(tmp_path)
    (tmp_path / ".hidden.onnx").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "add_sub" / "config.pbtxt").write_text("ignored")
    package = shipped.build_apart(shipped.order("shuttle"), tmp_path)
    assert found(tmp_path) >= {
        ("autoencoder", "1", "onnxruntime_onnx"),
        ("quantised", "1", "litert_tflite"),
        ("add_sub", "1", "onnxruntime_onnx"),
        ("add_sub", "3", "onnxruntime_onnx"),
    }
    assert "shuttle" in {name for name, _, _ in found(tmp_path)}
    assert {name for name, _, _ in found(package)} == {"shuttle"}
    assert found(tmp_path / "autoencoder.onnx") == {("autoencoder", "1", "onnxruntime_onnx")}


def test_two_files_of_one_name_are_an_error(tmp_path: Path):
    (tmp_path / "a.onnx").write_bytes(models.autoencoder())
    (tmp_path / "a.tflite").write_bytes(models.quantised())
    with pytest.raises(PitheadError, match="a 1 is there twice"):
        found(tmp_path)


def test_what_is_not_there(tmp_path: Path):
    with pytest.raises(PitheadError, match="No such file"):
        found(tmp_path / "nothing")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(PitheadError, match="suffix"):
        found(tmp_path / "x.txt")


def test_versions_in_order():
    given = ["1.0.0", "1.10.0", "1.9.0", "2.0.0-rc1", "2.0.0", "3", "12"]
    assert newest(given) == ["12", "3", "2.0.0", "2.0.0-rc1", "1.10.0", "1.9.0", "1.0.0"]


def test_a_package_is_probed_with_its_golden_vectors_and_remembered(tmp_path: Path):
    package = shipped.build_apart(shipped.order("shuttle"), tmp_path / "packages")
    path = tmp_path / "probed.json"
    (candidate,) = Directory(package, Verdicts(path)).scan()
    opened = candidate.open()
    assert opened.inputs[0].datatype in {"INT8", "FP32"}
    opened.session.close()
    assert path.stat().st_mode & 0o077 == 0
    again = Verdicts(path)
    assert len(again._known) == 1
    golden = next(package.glob("*.golden.npz"))
    golden.write_bytes(b"broken")
    (candidate,) = Directory(package, again).scan()
    candidate.open().session.close()  # its verdict is known: golden vectors are not asked again


def test_a_file_that_cannot_be_trusted_never_gets_here(tmp_path: Path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\x08\x08nonsense")
    verdicts = Verdicts(None)
    with pytest.raises(PitheadError):
        opening.open_bare(bad, "onnx", verdicts, 1)
    assert not verdicts._known


def test_a_model_that_is_too_much_for_the_sandbox_is_not_opened(tmp_path: Path):
    slow = tmp_path / "slow.onnx"
    slow.write_bytes(models.slow(width=1500, layers=200, inner=400))
    with pytest.raises(PitheadError) as caught:
        opening.try_out(
            slow, opening.hashlib.sha256(slow.read_bytes()).hexdigest(), "onnx", Limits(wall_s=2.0)
        )
    assert caught.value.code == "probe.timeout"


def test_verdicts_hold_for_these_bytes_and_survive_nonsense(tmp_path: Path):
    path = tmp_path / "probed.json"
    verdicts = Verdicts(path)
    verdicts.keep("a" * 64, Verdict(sandbox="full"))
    assert Verdicts(path).find("a" * 64) == Verdict(sandbox="full")
    assert Verdicts(path).find("b" * 64) is None
    path.write_bytes(b"\xff{")
    assert Verdicts(path).find("a" * 64) is None


def test_a_region_that_is_made_shorter_is_an_error_and_not_a_crash(tmp_path: Path):
    (tmp_path / "r").write_bytes(bytes(100))
    memory = SharedMemory(tmp_path)
    memory.register("r", "/r", 0, 100)
    assert memory.read(Region("r", 10, 20)) == bytes(20)
    os.truncate(tmp_path / "r", 10)
    with pytest.raises(PitheadError, match="only 0 of 20"):
        memory.read(Region("r", 10, 20))
    with pytest.raises(PitheadError, match="shorter"):
        memory.write(Region("r", 0, 100), np.zeros(100, np.uint8).tobytes())
    memory.close()


def test_regions_of_other_users_are_not_taken(tmp_path: Path):
    (tmp_path / "r").write_bytes(bytes(10))
    me = os.geteuid()
    with pytest.raises(PitheadError, match=rf"user {me}: see --shared-memory-user"):
        SharedMemory(tmp_path, owners=[me + 1]).register("r", "/r", 0, 10)
    memory = SharedMemory(tmp_path, owners=owners([str(me + 1)]))
    memory.register("r", "/r", 0, 10)
    memory.close()
    assert owners(["root", "77"]) == {me, 0, 77}
    with pytest.raises(PitheadError, match="no user 'nobody-of-that-name'"):
        owners(["nobody-of-that-name"])


@pytest.mark.parametrize("key", ["/../r", "..", "/a/b", "", "/", "nothing", "/link", "/pipe"])
def test_keys_lead_to_regions_only(tmp_path: Path, key: str):
    (tmp_path / "inside").mkdir()
    (tmp_path / "r").write_bytes(bytes(10))
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "r")
    os.mkfifo(tmp_path / "inside" / "pipe")
    with pytest.raises(PitheadError, match=r"key|byte_size"):
        SharedMemory(tmp_path / "inside").register("x", key, 0, 5)


def test_a_large_model_is_handed_over_as_a_file_without_a_name(monkeypatch: pytest.MonkeyPatch):
    content = models.slow(width=1000, layers=1)
    x = {"x": np.ones((1, 4), np.float32)}
    before = sorted(Path("/proc/self/fd").iterdir())
    with onnx._handed_over(content, find("onnx", "cpu")) as source:
        assert isinstance(source, str)
        assert Path(source).read_bytes() == content
    by_file = onnx.OnnxSession(content)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    monkeypatch.delattr("os.memfd_create")
    with onnx._handed_over(content, find("onnx", "cpu")) as source:
        assert source is content
    by_bytes = onnx.OnnxSession(content)
    assert np.array_equal(by_file.run(x)["y"], by_bytes.run(x)["y"])
    by_file.close()
    by_bytes.close()


def test_nobody_is_ready_before_it_is_known_what_to_serve():
    async def seen() -> tuple[bool, bool]:
        service = Service([Memory()], catalogue.Limits())
        before = service.ready
        await service.start()
        after = service.ready
        await service.stop()
        service.catalogue.release()
        return before, after

    assert asyncio.run(seen()) == (False, True)
