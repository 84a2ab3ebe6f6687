"""Sources by themselves, with a clock that the test holds."""

import gzip
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

from agent.engine.clock import Clock
from agent.engine.feed import Feed
from agent.engine.sources import SOURCES, open_source
from agent.engine.sources.base import Source, Table
from agent.engine.sources.system import PRESSURE, Counters, pressure
from agent.engine.window import Windower
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from models.host_health import CHANNELS as HOST_CHANNELS
from tests.engine.conftest import CHANNELS, samples, write_csv

PIPELINE = Pipeline(
    channels=tuple(Channel(n) for n in CHANNELS),
    window=1,
    stride=1,
    mean=(0.0,) * 3,
    scale=(1.0,) * 3,
    sample_rate_hz=10.0,
)


class HeldClock:
    """Time stands until it is moved."""

    def __init__(self) -> None:
        self.us = 1_000_000

    @property
    def clock(self) -> Clock:
        return Clock(wall=lambda: self.us + 1_700_000_000_000_000, mono=lambda: self.us)

    def move(self, seconds: float) -> None:
        self.us += round(seconds * 1e6)


def take(source: Source, limit: int = 1000) -> Any:
    batch = source.poll(limit)
    assert batch is not None
    return batch


def refs(source: Source, limit: int = 1000) -> list[int]:
    found: list[int] = []
    while (batch := source.poll(limit)) is not None:
        assert batch.refs is not None
        found += batch.refs.tolist()
    return found


def played(path: Path, held: HeldClock, **changes: Any) -> Source:
    return open_source({"kind": "replay", "path": str(path)} | changes, PIPELINE, held.clock)


def as_csv(path: Path) -> Path:
    return write_csv(path / "r.csv", samples(50))


def as_gzip(path: Path) -> Path:
    target = path / "r.csv.gz"
    target.write_bytes(gzip.compress(as_csv(path).read_bytes()))
    return target


def as_parquet(path: Path) -> Path:
    rows = samples(50)
    target = path / "r.parquet"
    columns: dict[str, Any] = {"label": ["x"] * 50} | {n: rows[:, i] for i, n in enumerate(CHANNELS)}
    columns["a"] = pa.array(rows[:, 0], mask=np.arange(50) == 7)
    parquet.write_table(pa.table(columns), target)
    return target


@pytest.mark.parametrize("make", [as_csv, as_gzip, as_parquet])
def test_every_format_gives_the_same_rows(tmp_path: Path, make: Callable[[Path], Path]):
    held = HeldClock()
    source = played(make(tmp_path), held, columns=["c", "a", "b"], loop=False, buffer_s=60.0)
    held.move(10)
    batch = take(source)
    expected = samples(50)[:, [2, 0, 1]]
    if make is as_parquet:
        expected[7, 1] = np.nan
    assert np.array_equal(batch.values, expected, equal_nan=True)


def test_rows_come_when_they_are_due(tmp_path: Path):
    held = HeldClock()
    source = played(as_csv(tmp_path), held, rate_hz=20.0, speed=0.5, offset=3)
    assert refs(source) == [3]
    assert source.poll(10) is None
    held.move(0.25)
    batch = take(source)
    assert batch.refs.tolist() == [4, 5]
    assert np.diff(batch.t).tolist() == [100_000]
    assert batch.t[0] == 1_700_000_000_000_000 + 1_100_000
    assert batch.continues
    assert 0.1 <= source.wait_s() <= 0.15


def test_a_loop_begins_again_and_says_that_it_does(tmp_path: Path):
    held = HeldClock()
    source = played(as_csv(tmp_path), held, offset=48, rate_hz=10.0)
    held.move(0.35)
    first, second = take(source), take(source)
    assert (first.refs.tolist(), second.refs.tolist()) == ([48, 49], [0, 1])
    assert first.continues
    assert not second.continues


def test_without_a_loop_it_ends(tmp_path: Path):
    held = HeldClock()
    source = played(as_csv(tmp_path), held, loop=False, offset=45)
    held.move(5)
    assert refs(source) == [45, 46, 47, 48, 49]
    assert source.backlog() == 0
    assert source.wait_s() > 1


def test_what_is_not_taken_in_time_is_lost_and_counted(tmp_path: Path):
    held = HeldClock()
    source = played(as_csv(tmp_path), held, rate_hz=10.0, buffer_s=2.0)
    held.move(3)
    assert source.backlog() == 31
    batch = take(source)
    assert (batch.lost, batch.refs[0], len(batch.refs)) == (11, 11, 20)
    assert not batch.continues


def test_a_limit_leaves_the_rest_for_later(tmp_path: Path):
    held = HeldClock()
    source = played(as_csv(tmp_path), held, rate_hz=10.0)
    held.move(1)
    assert take(source, 4).refs.tolist() == [0, 1, 2, 3]
    assert source.wait_s() == 0
    assert take(source, 100).refs.tolist() == [4, 5, 6, 7, 8, 9, 10]


def test_an_empty_cell_is_a_missing_sample(tmp_path: Path):
    path = tmp_path / "r.csv"
    path.write_text("a,b,c\n1,,3\n")
    batch = take(played(path, HeldClock()))
    assert np.isnan(batch.values[0]).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "text",
    [
        "a,b,c\n1,2,3\n4,5,6\n\n",
        "a,b,c\n\n1,2,3\n  \n4,5,6",
        "\ufeffa,b,c\r\n1,2,3\r\n4,5,6\r\n\r\n",
        'a, b, c\n 1, 2, 3\n"4","5","6"\n',
    ],
)
def test_files_as_tools_write_them(tmp_path: Path, text: str):
    path = tmp_path / "r.csv"
    path.write_bytes(text.encode())
    held = HeldClock()
    source = played(path, held, loop=False)
    held.move(1)
    assert take(source).values.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("cell", ["", " ", "NULL", "null", "NaN", "n/a", "None", "-"])
def test_a_cell_without_a_value_is_a_missing_sample(tmp_path: Path, cell: str):
    path = tmp_path / "r.csv"
    path.write_text(f"a,b,c\n1,{cell},3\n")
    values = take(played(path, HeldClock())).values[0]
    assert np.isnan(values).tolist() == [False, True, False]


def test_a_file_that_is_written_again_is_played(tmp_path: Path):
    """A file's content is no setting: the lane looks again."""
    path, held = tmp_path / "r.csv", HeldClock()
    path.write_text("x,y\n")
    feed = Feed("lane", held.clock)
    table: Table = {"kind": "replay", "path": str(path)}
    assert feed.poll(table, PIPELINE, 10) is None
    assert feed.problem is not None
    assert feed.problem.retryable
    path.write_text("a,b,c\n1,2,3\n")
    held.move(1)
    assert feed.poll(table, PIPELINE, 10) is not None
    assert feed.problem is None


@pytest.mark.parametrize(("configured", "goes_on"), [(20.0, True), (None, False)])
def test_another_sample_rate_opens_the_source_again_only_where_it_counts(
    tmp_path: Path, configured: float | None, goes_on: object
):
    held = HeldClock()
    feed = Feed("lane", held.clock)
    table: Table = {"kind": "replay", "path": str(as_csv(tmp_path)), "rate_hz": configured}
    first = feed.poll(table, PIPELINE, 1)
    held.move(1)
    second = feed.poll(table, msgspec.structs.replace(PIPELINE, sample_rate_hz=40.0), 1)
    assert first is not None
    assert second is not None
    assert second.refs is not None
    assert second.continues == goes_on
    assert second.refs.tolist() == ([1] if goes_on else [0])


@pytest.mark.parametrize(
    ("text", "changes", "code", "words"),
    [
        (None, {}, "source.failed", "No such file"),
        ("a,b\n1,2\n", {}, "source.failed", "no column 'c'"),
        ("a:b:c\n1:2:3\n", {}, "source.failed", "no column 'a'"),
        ("a,b,c\n1,2,x\n", {}, "source.failed", "line 2"),
        ("a,b,c\n1,2\n", {}, "source.failed", "line 2"),
        ("a,b,c\n", {}, "source.failed", "no rows"),
        ("", {}, "source.failed", "no column 'a'"),
        ("a,b,c\n1,2,3\n", {"columns": ["a"]}, "config.invalid", "lanes.source.columns"),
        ("a,b,c\n1,2,3\n", {"rate_hz": 0.0}, "config.invalid", "rate_hz"),
        ("a,b,c\n1,2,3\n", {"rate_hz": 1e300}, "config.invalid", "rate_hz"),
        ("a,b,c\n1,2,3\n", {"speed": 1e308}, "config.invalid", "speed"),
        ("a,b,c\n1,2,3\n", {"buffer_s": 1e308}, "config.invalid", "buffer_s"),
        ("a,b,c\n1,2,3\n", {"offset": 2**70}, "config.invalid", "offset"),
        ("a,b,c\n1,2,3\n", {"rate_hz": "fast"}, "config.invalid", "rate_hz"),
        ("a,b,c\n1,2,3\n", {"sped": 1.0}, "config.invalid", "sped"),
        ("a,b,c\n1,2,3\n", {"kind": "magic"}, "config.invalid", "lanes.source.kind"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, text: str | None, changes: dict[str, Any], code: str, words: str
):
    path = tmp_path / "r.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PitheadError) as caught:
        played(path, HeldClock(), **changes)
    assert caught.value.code == code
    assert words in caught.value.detail


@pytest.mark.parametrize(
    ("name", "content"), [("r.csv.gz", b"not gzip"), ("r.parquet", b"PAR1 not"), ("r.csv", b"\xff\xfe")]
)
def test_a_file_that_is_not_what_its_name_says_fails(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PitheadError, match=r"source\.failed.*"):
        played(tmp_path / name, HeldClock())


def test_a_truncated_gzip_fails(tmp_path: Path):
    path = as_gzip(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PitheadError, match=r"source\.failed"):
        played(path, HeldClock())


def test_a_rate_must_come_from_somewhere(tmp_path: Path):
    bare = Pipeline(PIPELINE.channels, 1, 1, PIPELINE.mean, PIPELINE.scale)
    with pytest.raises(PitheadError, match="rate_hz is missing"):
        open_source({"kind": "replay", "path": str(as_csv(tmp_path))}, bare, HeldClock().clock)


# ---- system


HOST = Pipeline(HOST_CHANNELS, 1, 1, (0.0,) * 9, (1.0,) * 9, sample_rate_hz=2.0)


def test_the_system_source_has_every_channel_of_host_health(tmp_path: Path):
    held = HeldClock()
    source = open_source({"kind": "system"}, HOST, held.clock)
    assert source.poll(10) is None
    assert source.wait_s() == pytest.approx(0.5)
    held.move(0.5)
    batch = take(source)
    assert batch.values.shape == (1, 9)
    assert batch.lost == 0
    for channel, value in zip(HOST_CHANNELS, batch.values[0], strict=True):
        assert channel.minimum is not None
        assert channel.maximum is not None
        assert channel.minimum <= value <= channel.maximum, channel.name
    assert batch.values[0][1] == pytest.approx(psutil.virtual_memory().percent, abs=20)
    held.move(2.1)
    late = take(source)
    assert (late.lost, late.continues) == (3, True)
    assert source.poll(1) is None
    held.move(3.1)
    gone = take(source)
    assert (gone.lost, gone.continues) == (5, False)


@pytest.mark.parametrize("late_s", [0.0, 0.4, 0.52, 0.7, 1.2])
def test_a_machine_that_wakes_late_has_its_windows_all_the_same(late_s: float):
    """Every third wake-up of a loaded machine comes late; its windows are what the model is for."""
    held = HeldClock()
    source = open_source({"kind": "system"}, HOST, held.clock)
    windower = Windower(4, 2, len(HOST_CHANNELS))
    rows = windows = 0
    for i in range(300):
        held.move(source.wait_s() + (late_s if i % 3 == 0 else 0.001))
        batch = take(source)
        rows += 1
        windows += len(windower.push(batch.values, np.ones(1, bool), continues=batch.continues).starts)
    assert windows == (rows - 4) // 2 + 1


def test_rates_are_logarithms_of_the_growth_per_second():
    held = HeldClock()
    counters = Counters(held.clock)
    assert counters.log_rate("x", 1000) == 0
    held.move(2)
    assert counters.log_rate("x", 1000 + 2 * 999) == pytest.approx(3.0)
    held.move(1)
    assert counters.log_rate("x", 5) == 0, "a counter that was reset"


def test_pressure_is_0_where_the_kernel_has_none():
    assert pressure("no-such-thing") == 0
    if (PRESSURE / "cpu").exists():
        assert 0 <= pressure("cpu") <= 100


def test_a_channel_that_the_system_does_not_have_is_named():
    with pytest.raises(PitheadError, match="no channel 'a'"):
        open_source({"kind": "system"}, PIPELINE, HeldClock().clock)


def test_the_registry_names_modules_with_an_opener():
    for module in SOURCES.values():
        assert callable(import_module(module).open_source)
