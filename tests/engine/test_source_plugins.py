"""A third party's source: a real distribution, installed for the test, used by a real engine."""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.core.layout import Layout
from agent.engine import plugins
from agent.engine.clock import Clock
from agent.engine.sources import check, open_source
from agent.wiring import read_settings
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from tests.engine.conftest import make_package, samples, start_engine, write_csv

CLOCK = Clock(wall=lambda: 1_700_000_000_000_000, mono=lambda: 1_000_000)
PIPELINE = Pipeline((Channel("a"),), 1, 1, (0.0,), (1.0,), sample_rate_hz=10.0)
MODULE = """
import time
import numpy as np
from agent.engine.sources.base import Batch

class Constant:
    def __init__(self, table, pipeline, clock):
        self.level, self.width, self.clock = float(table.get("level", 20)), len(pipeline.channels), clock
        self.shape = table.get("shape")
    def poll(self, limit):
        width = self.width + (self.shape == "wide")
        return Batch(np.full((1, width), self.level), np.array([self.clock.wall()], np.int64))
    def wait_s(self): return 0.02
    def backlog(self): return 0
    def close(self): pass

def open_source(table, pipeline, clock):
    return Constant(table, pipeline, clock)
"""


def install(directory: Path, name: str, module: str, points: str) -> None:
    """Make a wheel of one module and install it into ``directory``."""
    wheel = directory / f"{name}-1.0-py3-none-any.whl"
    directory.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": module,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[{plugins.GROUP}]\n{points}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--no-deps", "--no-index", "--target", directory, wheel], check=True)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / "site"
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setenv("PYTHONPATH", str(directory))
    yield directory
    for name in ("pithead_constant", "pithead_broken"):
        sys.modules.pop(name, None)


def test_a_distribution_adds_a_source_and_a_broken_one_harms_nobody(site: Path, tmp_path: Path):
    install(site, "pithead_constant", MODULE, "constant = pithead_constant")
    install(site, "pithead_broken", "raise RuntimeError('half an upgrade')", "broken = pithead_broken")
    package = make_package(tmp_path / "p")
    csv = write_csv(tmp_path / "r.csv", samples(200))
    engine = start_engine(tmp_path / "e.sock")
    try:
        supervisor = engine.connect()
        supervisor.configure(
            package.spec({"kind": "constant", "level": 20}, lane="good"),
            package.spec({"kind": "broken"}, lane="bad"),
            package.spec({"kind": "constant", "shape": "wide"}, lane="wide"),
            package.spec({"kind": "replay", "path": str(csv), "rate_hz": 200.0}, lane="ours"),
        )
        bad = supervisor.until_state("bad", state="failed")
        assert bad.code == "source.plugin_broken"
        assert "pithead_broken 1.0: RuntimeError: half an upgrade" in bad.detail
        wide = supervisor.until_state("wide", state="failed", code="source.failed")
        assert "gave no Batch of float64 values (rows, 3)" in wide.detail
        for lane in ("good", "ours"):
            supervisor.until(lambda lane=lane: (supervisor.state(lane) or bad).windows > 20, f"{lane} scores")
            assert supervisor.state(lane).state == "running"
    finally:
        engine.end()


def test_settings_take_the_kinds_that_are_installed(site: Path, tmp_path: Path):
    install(site, "pithead_constant", MODULE, "constant = pithead_constant\nreplay = pithead_constant")
    layout = Layout(tmp_path)
    layout.config.parent.mkdir(parents=True)
    text = '[[lanes]]\nname = "x"\nmodel = "demo"\nsource = {{ kind = "{}" }}\n'
    layout.config.write_text(text.format("constant"))
    table = read_settings(layout).lanes[0].source
    check(table)
    layout.config.write_text(text.format("constat"))
    with pytest.raises(PitheadError, match=r"'constat'; there are .*modbus, mqtt, .*constant"):
        read_settings(layout)
    with pytest.raises(PitheadError, match="'constat', not one of"):
        check({"kind": "constat"})
    with pytest.raises(PitheadError, match=r"lanes\.source: "):
        open_source({"kind": "replay", "level": 1}, PIPELINE, CLOCK)  # the name of ours stays ours


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("x = 1", "has no open_source"),
        ("def open_source(table, pipeline, clock): return object()", "has no poll"),
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("syntax error", "SyntaxError"),
    ],
)
def test_what_cannot_be_used_is_a_typed_error(site: Path, module: str, words: str):
    install(site, "pithead_broken", module, "broken = pithead_broken")
    with pytest.raises(PitheadError, match=words) as caught:
        open_source({"kind": "broken"}, PIPELINE, CLOCK)
    assert caught.value.code == "source.plugin_broken"


def test_two_distributions_with_one_name_are_told_apart_by_nobody(site: Path):
    install(site, "pithead_constant", MODULE, "constant = pithead_constant")
    install(site, "pithead_broken", MODULE, "constant = pithead_broken")
    with pytest.raises(PitheadError, match=r"pithead_broken 1.0, pithead_constant 1.0"):
        open_source({"kind": "constant"}, PIPELINE, CLOCK)


@pytest.mark.parametrize(
    ("kind", "library", "table"),
    [
        ("http", "httptools", {"port": 1}),
        ("modbus", "pymodbus", {"host": "x", "tags": [{"channel": "a", "address": "coil:0"}]}),
        ("opcua", "asyncua", {"url": "opc.tcp://x:1", "tags": [{"channel": "a", "address": "i=1"}]}),
        ("sparkplug", "google.protobuf", {"group": "g", "edge_node": "n"}),
        ("images", "PIL", {"path": ".", "width": 1, "height": 1}),
    ],
)
def test_a_library_that_is_missing_is_named_with_the_extra_that_brings_it(
    kind: str, library: str, table: dict[str, object]
):
    """In a process of its own, to which the library is hidden."""
    script = f"""
import sys
sys.modules[{library!r}] = None
from agent.engine.clock import Clock
from agent.engine.sources import open_source
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
try:
    pipeline = Pipeline((Channel("a"),), 1, 1, (0.0,), (1.0,), sample_rate_hz=1.0)
    open_source({{"kind": {kind!r}}} | {table!r}, pipeline, Clock(lambda: 1, lambda: 1))
except PitheadError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert said.startswith("source.failed: ")
    assert f"install the extra `{kind}`" in said
