"""``pithead-agent check-source``: what a person sees who has just connected the wires."""

import http.client
import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent.__main__ import main
from agent.core.layout import Layout
from agent.core.slots import Installed, Serving, Slots
from agent.engine.check import Tally, render
from agent.engine.sources.base import Batch
from agent.store.slots import SlotStore
from contract.manifest import Channel, Pipeline
from tests.engine.conftest import free_port, make_package, samples, until, write_csv
from tests.engine.test_source_modbus import Plc

NOW = 1_700_000_000_000_000
PIPELINE = Pipeline(
    (Channel("temperature", "degC", -50.0, 300.0), Channel("pressure", "bar", 0.0, 10.0), Channel("count")),
    1,
    1,
    (0.0,) * 3,
    (1.0,) * 3,
    sample_rate_hz=10.0,
)


def configure(root: Path, source: str, **files: str) -> Layout:
    layout = Layout(root)
    layout.config.parent.mkdir(parents=True, exist_ok=True)
    layout.config.write_text(f'[[lanes]]\nname = "press"\nmodel = "demo"\n[lanes.source]\n{source}\n')
    for name, text in files.items():
        (layout.config.parent / f"{name}.csv").write_text(text)
    return layout


def checked(root: Path, *more: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["check-source", "press", "--root", str(root), "--json", *more])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {"error": captured.err}


def batch(*rows: list[float], step: int = 100_000, first: int = 0, **more: Any) -> Batch:
    t = NOW + (first + np.arange(len(rows))) * step
    return Batch(np.array(rows, np.float64).reshape(-1, 3), t.astype(np.int64), **more)


def test_counts_of_a_source_that_is_well():
    tally = Tally("press", {"kind": "modbus"}, PIPELINE)
    tally.add(batch([20, 1, 7], [22, 2, 8], continues=False), NOW + 150_000)
    tally.add(batch([21, 3, 9], first=2), NOW + 300_000)
    seen = tally.seen(1.0, None)
    assert (seen.rows, seen.rate_hz, seen.lost, seen.gaps, seen.behind_s) == (3, 10.0, 0, 0, 0.1)
    assert seen.good
    first = seen.channels[0]
    assert (first.value, first.low, first.high, first.result) == (21, 20, 22, "ok")
    assert "lane press: modbus, 3 rows in 1 s, 10 a second, the newest 0.1 s old" in render(seen)
    assert "temperature  21     degC  20 .. 22  -50 .. 300" in render(seen)


@pytest.mark.parametrize(
    ("rows", "results"),
    [
        ([[20.0, 1.0, np.nan]] * 3, ["ok", "ok", "no value"]),
        ([[20.0, 1.0, np.inf]] * 3, ["ok", "ok", "no value"]),
        ([[20.0, 1.0, 7.0], [np.nan, 1.0, 7.0]], ["missing at times", "ok", "ok"]),
        ([[np.nan, 1.0, 7.0], [20.0, 1.0, 7.0]], ["missing at times", "ok", "ok"]),
        ([[20.0, 11.0, 7.0], [20.0, 1.0, 7.0]], ["ok", "out of range", "ok"]),
    ],
)
def test_what_is_wrong_with_a_channel_is_said(rows: list[list[float]], results: list[str]):
    tally = Tally("press", {"kind": "modbus"}, PIPELINE)
    for i, row in enumerate(rows):
        tally.add(batch(row, first=i), NOW)
    seen = tally.seen(1.0, None)
    assert [c.result for c in seen.channels] == results
    assert not seen.good


def test_a_slow_source_and_gaps_are_said():
    tally = Tally("press", {"kind": "modbus", "rate_hz": 20.0}, PIPELINE)
    tally.add(batch([20, 1, 7], [22, 2, 8]), NOW)
    tally.add(batch([20, 1, 7], first=2, lost=5, continues=False), NOW)
    head = render(tally.seen(1.0, None)).splitlines()[0]
    assert "10 a second, TOO SLOW, the model wants 20, 5 lost, 1 gaps" in head


def test_a_model_that_serves_gives_units_and_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    layout = configure(tmp_path, 'kind = "replay"\npath = "r.csv"\nrate_hz = 50.0')
    write_csv(layout.config.parent / "r.csv", samples(100))
    channels = (Channel("a", "mm/s", 0.0, 1000.0), Channel("b", "mm/s", 0.0, 10.0), Channel("c"))
    package = make_package(layout.objects, channels=channels)
    installed = Installed("1.0.0", package.digest, "v", "cpu", {})
    SlotStore(layout.slots).save(Slots("demo", active=Serving(installed)))
    code, seen = checked(tmp_path, "--seconds", "1", capsys=capsys)
    assert code == 1, "b is out of its range"
    assert [c["result"] for c in seen["channels"]] == ["ok", "out of range", "ok"]
    assert seen["rows"] > 20
    assert (seen["kind"], seen["wanted_hz"]) == ("replay", 50.0)
    assert seen["channels"][0] | {"unit": "mm/s", "minimum": 0.0, "maximum": 1000.0} == seen["channels"][0]
    assert main(["check-source", "press", "--root", str(tmp_path), "--seconds", "0.5"]) == 1
    assert "out of range" in capsys.readouterr().out


def test_tags_of_a_real_controller_before_any_model_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plc = Plc()
    try:
        plc.write(3, 0, [1234, 5])
        tags = (
            "channel,address,datatype,scale,offset,unit\nt,holding:0,int16,0.1,-40,degC\np,holding:1,,,,bar\n"
        )
        source = (
            f'kind = "modbus"\nhost = "127.0.0.1"\nport = {plc.port}\nrate_hz = 50.0\ntags_file = "t.csv"'
        )
        configure(tmp_path, source, t=tags)
        code, seen = checked(tmp_path, "--seconds", "1", capsys=capsys)
    finally:
        plc.end()
    assert code == 0, seen
    t, p = seen["channels"]
    assert (t["value"], t["unit"], p["value"], p["unit"]) == (pytest.approx(83.4), "degC", 5.0, "bar")
    assert seen["rate_hz"] == pytest.approx(50, rel=0.2)


def test_a_manifest_of_a_model_to_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    layout = configure(tmp_path, 'kind = "replay"\npath = "r.csv"')
    write_csv(layout.config.parent / "r.csv", samples(100))
    package = make_package(tmp_path / "p")
    code, seen = checked(
        tmp_path, "--seconds", "0.5", "--manifest", str(package.manifest_path), capsys=capsys
    )
    assert (code, [c["name"] for c in seen["channels"]]) == (0, ["a", "b", "c"])
    (tmp_path / "p/manifest.json").write_bytes(package.manifest_path.read_bytes())
    assert checked(tmp_path, "--seconds", "0.3", "--manifest", str(tmp_path / "p"), capsys=capsys)[0] == 0
    served_only = msgspec.structs.replace(package.manifest, pipeline=None, score=None)
    (tmp_path / "p/manifest.json").write_bytes(msgspec.json.encode(served_only))
    code, said = checked(tmp_path, "--manifest", str(tmp_path / "p"), capsys=capsys)
    assert code == 2
    assert "no pipeline" in said["error"]


def test_rows_that_are_pushed_meanwhile(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    port = free_port()
    configure(tmp_path, f'kind = "http"\nport = {port}')
    package = make_package(tmp_path / "p")

    def push() -> bool:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            client.request("POST", "/samples", b'{"values": [1, 2, 3]}')
            return client.getresponse().status == 202
        except OSError:
            return False
        finally:
            client.close()

    pushing = threading.Thread(target=lambda: until(push, "the listener"))
    pushing.start()
    code, seen = checked(tmp_path, "--seconds", "2", "--manifest", str(package.manifest_path), capsys=capsys)
    pushing.join()
    assert (code, seen["rows"], [c["value"] for c in seen["channels"]]) == (0, 1, [1, 2, 3])


@pytest.mark.parametrize(
    ("lane", "source", "code", "words"),
    [
        ("press", 'kind = "replay"\npath = "r.csv"', 2, "no version of demo is here yet"),
        ("oven", 'kind = "replay"\npath = "r.csv"', 2, "no lane is named 'oven'; there are press"),
        ("press", 'kind = "modbus"\nhost = "127.0.0.1"\ntags_file = "none.csv"', 2, "none.csv"),
    ],
)
def test_what_cannot_be_checked_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lane: str, source: str, code: int, words: str
):
    configure(tmp_path, source)
    assert main(["check-source", lane, "--root", str(tmp_path)]) == code
    assert words in capsys.readouterr().err


def test_a_source_that_fails_is_a_failed_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tags = 'tags = [{ channel = "t", address = "holding:0" }]'
    configure(tmp_path, f'kind = "modbus"\nhost = "127.0.0.1"\nport = {free_port()}\n{tags}')
    code, seen = checked(tmp_path, "--seconds", "0.5", capsys=capsys)
    assert (code, seen["code"], seen["rows"]) == (1, "source.failed", 0)
    assert "refused" in seen["detail"]
    assert main(["check-source", "press", "--root", str(tmp_path), "--seconds", "0.5"]) == 1
    assert "source.failed: modbus 127.0.0.1" in capsys.readouterr().out
