"""docs/sources.md: every example is what it says, and every setting is in it."""

import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.core.layout import Layout
from agent.core.tags import from_csv
from agent.engine import plugins, sources
from agent.engine.clock import Clock
from agent.engine.sources.around import Checked
from agent.engine.sources.http import Order, decoded
from agent.engine.sources.modbus import parsed
from agent.engine.sources.tags import Address, bound
from agent.wiring import read_settings
from contract.manifest import Channel, Pipeline

PAGE = (Path(__file__).parents[2] / "docs/sources.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LANES = [text for kind, text in BLOCKS if kind == "toml" and "[[lanes]]" in text]
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
SHARED = {"kind", "tags", "rate_hz"}


def blocks(kind: str) -> list[str]:
    return [text for language, text in BLOCKS if language == kind]


def pipeline(*names: str) -> Pipeline:
    width = len(names)
    units = {"temperature": "degC", "pressure": "bar"}
    channels = tuple(Channel(n, units.get(n, "")) for n in names)
    return Pipeline(channels, 1, 1, (0.0,) * width, (1.0,) * width, sample_rate_hz=10.0)


@pytest.mark.parametrize("text", LANES)
def test_every_lane_is_one(text: str, tmp_path: Path):
    layout = Layout(tmp_path)
    layout.config.parent.mkdir(parents=True)
    layout.config.write_text(text)
    (lane,) = read_settings(layout).lanes
    sources.check(lane.source)
    bindings: Any = lane.source.get("tags") or lane.source.get("channels") or []
    names = [b["channel"] if isinstance(b, dict) else b for b in bindings]
    if names:
        bare, _ = bound(lane.source, pipeline(*names))
        module = import_module(sources.SOURCES[str(bare["kind"])])
        assert hasattr(module, "open_source")


def test_tags_of_a_modbus_example_are_addresses():
    found = from_csv(blocks("csv")[0].encode(), "press.csv")
    assert [tag.channel for tag in found] == ["temperature", "pressure", "running"]
    table = {"kind": "modbus", "host": "x", "tags": [msgspec.to_builtins(tag) for tag in found]}
    bare, conversion = bound(table, pipeline("temperature", "pressure", "running"))
    assert conversion is not None
    assert len(parsed(msgspec.convert(bare["tags"], list[Address]), 1)) == 3


def test_every_kind_has_a_section_with_an_example_of_all_its_settings():
    assert set(sources.SOURCES) <= set(SECTIONS)
    for kind, module in sources.SOURCES.items():
        section = SECTIONS[kind]
        assert f'kind = "{kind}"' in section
        for name in import_module(module).SETTINGS.__struct_fields__:
            if name not in SHARED:
                assert re.search(rf"\b{name}\b", section), f"{kind}: {name}"
        assert f"[`{kind}`](#{kind})" in PAGE


def test_the_rows_that_are_pushed_are_rows():
    (body,) = blocks("json")
    now = 1_772_366_400_500_000
    stretches, late = Order(("temperature", "pressure"), 10.0).sort(decoded(body.encode(), b""), now)
    assert (late, sum(len(s.rows) for s in stretches), sum(s.lost for s in stretches)) == (0, 2, 0)


def test_the_third_party_s_source_is_one():
    (code,) = blocks("python")
    module: dict[str, Any] = {}
    exec(compile(code, "docs/sources.md", "exec"), module)  # noqa: S102 - it is our own page
    clock = Clock(wall=lambda: 1_700_000_000_000_000, mono=lambda: 1)
    source = Checked("mybus", module["open_source"]({"kind": "mybus"}, pipeline("a", "b"), clock), 2)
    batch = source.poll(10)
    assert batch is not None
    assert batch.values.shape == (1, 2)
    points = tomllib.loads(next(t for t in blocks("toml") if "entry-points" in t))
    assert list(points["project"]["entry-points"]) == [plugins.GROUP]


def test_what_is_said_of_extras_is_true():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    for names in re.findall(r"`pithead\[([\w,]+)\]`", PAGE):
        assert set(names.split(",")) <= set(extras)
    for kind in ("modbus", "opcua", "sparkplug", "http", "images"):
        assert kind in extras["sources"][0]
        assert f"| `pithead[agent,{kind}]` |" in PAGE
