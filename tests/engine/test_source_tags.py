"""Channels of a model bound to what a machine has: units, factors, addresses, files."""

import math
from pathlib import Path
from typing import Any

import pytest

from agent.core.layout import Layout
from agent.core.tags import MAX_FILE, from_csv
from agent.engine.clock import Clock
from agent.engine.sources import check, open_source
from agent.engine.sources.tags import bound
from agent.wiring import read_settings
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline

CLOCK = Clock(wall=lambda: 1_700_000_000_000_000, mono=lambda: 1_000_000)
PIPELINE = Pipeline(
    (Channel("temperature", "degC", -50, 300), Channel("pressure", "bar"), Channel("count")),
    1,
    1,
    (0.0,) * 3,
    (1.0,) * 3,
    sample_rate_hz=10.0,
)
TAGS = [
    {"channel": "pressure", "address": "holding:1"},
    {"channel": "count", "address": "input:9", "datatype": "uint32"},
    {"channel": "temperature", "address": "holding:0", "scale": 0.1, "offset": -40.0, "unit": "degC"},
]


def invalid(table: dict[str, Any]) -> str:
    with pytest.raises(PitheadError) as caught:
        bound({"kind": "modbus"} | table, PIPELINE)
    assert caught.value.code == "config.invalid"
    return caught.value.detail


def test_a_source_sees_addresses_in_the_order_of_the_channels():
    bare, conversion = bound({"kind": "modbus", "host": "plc", "tags": TAGS}, PIPELINE)
    assert [tag["address"] for tag in bare["tags"]] == ["holding:0", "holding:1", "input:9"]
    assert bare["tags"][2] == {"channel": "count", "address": "input:9", "datatype": "uint32"}
    assert conversion is not None
    assert conversion.scale.tolist() == [0.1, 1, 1]
    assert conversion.offset.tolist() == [-40, 0, 0]


def test_values_of_any_source_are_converted_to_the_units_of_the_model(tmp_path: Path):
    path = tmp_path / "r.csv"
    path.write_text("temperature,pressure,count\n212,14.5,7\n32,,8\n")
    source = open_source(
        {
            "kind": "replay",
            "path": str(path),
            "channels": {
                "temperature": {"unit": "degC", "scale": 5 / 9, "offset": -160 / 9},
                "pressure": {"unit": "bar", "scale": 0.0689476},
            },
        },
        PIPELINE,
        CLOCK,
    )
    batch = source.poll(10)
    assert batch is not None
    assert batch.values.tolist() == [pytest.approx([100.0, 0.9997402, 7.0])]
    assert source.backlog() == 0
    source.close()


def test_without_factors_nothing_stands_between():
    _, conversion = bound({"kind": "x", "channels": {"pressure": {"unit": "bar"}}}, PIPELINE)
    assert conversion is None


def test_a_channel_without_a_unit_in_the_manifest_takes_any():
    _, conversion = bound({"kind": "x", "channels": {"count": {"unit": "pieces"}}}, PIPELINE)
    assert conversion is None


@pytest.mark.parametrize("place", ["channels", "tags"])
def test_another_unit_than_the_model_s_is_refused_naming_both(place: str):
    given: Any = {"pressure": {"unit": "psi"}}
    if place == "tags":
        given = [*TAGS[1:], TAGS[0] | {"unit": "psi"}]
    words = invalid({place: given})
    assert "'psi'" in words
    assert "'bar'" in words
    assert "'pressure'" in words


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"tags": TAGS[:2]}, "channel 'temperature' of the model has no tag"),
        ({"tags": [*TAGS, TAGS[0]]}, "'pressure' is named twice"),
        ({"tags": [*TAGS, {"channel": "x", "address": "1"}]}, "no channel 'x'; it has temperature"),
        ({"tags": [*TAGS[:2], {"channel": "temperature"}]}, "address"),
        ({"tags": [{"channel": "a", "address": "1", "addres": "2"}]}, "addres"),
        ({"tags": [TAGS[2] | {"scale": 0.0}, *TAGS[:2]]}, "scale 0"),
        ({"tags": [TAGS[2] | {"scale": math.nan}, *TAGS[:2]]}, "scale"),
        ({"channels": {"x": {}}}, "no channel 'x'"),
        ({"channels": {"count": {"units": "1"}}}, "units"),
        ({"channels": 5}, "channels"),
        ({"channels": {}, "tags": TAGS}, "both channels and tags"),
    ],
)
def test_what_does_not_fit_is_named(table: dict[str, Any], words: str):
    assert words in invalid(table)


# ---- CSV

GOOD = """\
channel,address,datatype,scale,offset,unit
temperature,holding:0,int16,0.1,-40,degC

pressure,holding:1,,,,
"""


def test_a_spreadsheet_becomes_tags():
    first, second = from_csv(GOOD.encode("utf-8-sig"), "press.csv")
    assert (first.channel, first.address, first.datatype) == ("temperature", "holding:0", "int16")
    assert (first.scale, first.offset, first.unit) == (0.1, -40, "degC")
    assert (second.channel, second.scale, second.offset, second.unit) == ("pressure", 1, 0, "")


def test_semicolons_and_decimal_commas():
    text = "address;channel;scale\r\nns=2;x\r\n"
    with pytest.raises(PitheadError, match="line 2 has 2 cells, its header 3"):
        from_csv(text.encode(), "f")
    text = 'address;channel;scale\r\n"ns=2;s=Ofen, 1";temperature;0,25\r\n'
    (tag,) = from_csv(text.encode(), "f")
    assert (tag.address, tag.channel, tag.scale) == ("ns=2;s=Ofen, 1", "temperature", 0.25)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column 'channel'"),
        ("channel\na\n", "no column 'address'"),
        ("channel,address,colour\n", "a column 'colour'"),
        ("channel,address,unit,unit\n", "twice the column 'unit'"),
        ("channel,address,scale\na,1,ten\n", "line 2: scale 'ten' is not a number"),
        ("channel,address,scale\na,1,nan\n", "line 2: "),
        ("channel,address,scale\na,1,\nb,2\n", "line 3 has 2 cells, its header 3"),
        ("channel,address\n,1\n", "line 2: "),
        ("channel,address\na," + "1" * 2000 + "\n", "line 2: "),
        ('channel,address\na,"1\n' + "x" * 200_000, "field larger"),
        (b"channel,address\n\xff\xfe,1\n", "not UTF-8"),
        ("x" * (MAX_FILE + 1), "more than"),
    ],
)
def test_a_wrong_line_is_named(text: str | bytes, words: str):
    with pytest.raises(PitheadError) as caught:
        from_csv(text if isinstance(text, bytes) else text.encode(), "press.csv")
    assert caught.value.code == "config.invalid"
    assert words in caught.value.detail
    assert "press.csv" in caught.value.detail


def configured(root: Path, source: str, files: dict[str, str]) -> Any:
    layout = Layout(root)
    layout.config.parent.mkdir(parents=True)
    layout.config.write_text(f'[[lanes]]\nname = "press"\nmodel = "demo"\n[lanes.source]\n{source}\n')
    for name, text in files.items():
        (layout.config.parent / name).write_text(text)
    return read_settings(layout).lanes[0].source


def test_tags_and_credentials_lie_beside_the_configuration(tmp_path: Path):
    source = configured(
        tmp_path,
        """
kind = "modbus"
host = "plc"
tags_file = "press.csv"
credentials_file = "secret.toml"
ca_file = "/x/ca.pem"
""",
        {"press.csv": GOOD},
    )
    assert "tags_file" not in source
    assert [tag["channel"] for tag in source["tags"]] == ["temperature", "pressure"]
    assert source["tags"][0]["offset"] == -40
    assert source["credentials_file"] == str(tmp_path / "etc/pithead/secret.toml")
    assert source["ca_file"] == "/x/ca.pem"
    check({key: value for key, value in source.items() if not key.endswith("_file")})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('kind = "modbus"\ntags_file = "press.csv"', "press.csv: No such file"),
        ('kind = "modbus"\ntags_file = "bad.csv"', "bad.csv line 2"),
        ('kind = "modbus"\ntags_file = "bad.csv"\ntags = []', "both tags and tags_file"),
    ],
)
def test_a_tags_file_that_is_wrong_is_a_wrong_configuration(tmp_path: Path, source: str, words: str):
    with pytest.raises(PitheadError) as caught:
        configured(tmp_path, source, {"bad.csv": "channel,address\na\n"})
    assert caught.value.code == "config.invalid"
    assert words in caught.value.detail
