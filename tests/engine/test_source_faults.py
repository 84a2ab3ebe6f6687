"""What plants, people and third parties do wrong to sources, and what must not come of it."""

import gzip
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from agent.core.machine import Machine
from agent.engine import plugins, sinks, sources
from agent.engine.check import Tally, render
from agent.engine.clock import Clock
from agent.engine.feed import Feed
from agent.engine.machine import MachineFeed
from agent.engine.sources import http
from agent.engine.sources.base import Batch
from agent.engine.sources.hold import Hold
from agent.engine.sources.sparkplug import EdgeNode
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from tests.engine.conftest import until
from tests.engine.test_mqtt import CLOCK, MOSQUITTO, Broker, pipeline, received
from tests.engine.test_sinks import FIRST
from tests.engine.test_source_sparkplug import metric, payload

PIPE = Pipeline((Channel("a"), Channel("b")), 1, 1, (0.0,) * 2, (1.0,) * 2, sample_rate_hz=10.0)
TAGS = [{"channel": c, "address": f"i={n}"} for n, c in enumerate("ab")]
broker_needed = pytest.mark.skipif(not MOSQUITTO.exists(), reason="mosquitto is not installed (make system)")


class Sensor:
    """A third party's source that does as it is told."""

    def __init__(self) -> None:
        self.opened = self.polled = 0
        self.broken: set[str] = set()
        self.rest: Any = 0.1
        self.batch: Any = Batch(np.zeros((1, 2)), np.zeros(1, np.int64))

    def _maybe(self, what: str) -> None:
        if what in self.broken:
            raise RuntimeError(what)

    def poll(self, _limit: int) -> Any:
        self.polled += 1
        self._maybe("poll")
        return self.batch

    def wait_s(self) -> Any:
        self._maybe("wait_s")
        return self.rest

    def backlog(self) -> int:
        self._maybe("backlog")
        return 0

    def close(self) -> None:
        self._maybe("close")


@pytest.fixture
def sensor(monkeypatch: pytest.MonkeyPatch) -> Sensor:
    """Make ``sensor`` a kind of source."""
    made, module = Sensor(), ModuleType("sensor")

    def opening(*_: Any) -> Sensor:
        made.opened += 1
        return made

    vars(module)["open_source"] = opening
    monkeypatch.setattr(plugins, "load", {"sensor": module}.get)
    return made


# ---- third parties


def test_a_source_that_cannot_be_closed_is_opened_again(sensor: Sensor):
    now = [0]
    feed = Feed("l", Clock(wall=lambda: now[0], mono=lambda: now[0]))
    assert feed.poll({"kind": "sensor"}, PIPE, 10) is not None
    sensor.broken = {"poll", "close"}
    assert feed.poll({"kind": "sensor"}, PIPE, 10) is None
    assert feed.problem is not None
    sensor.broken = {"close"}
    now[0] += 60_000_000
    assert feed.poll({"kind": "sensor"}, PIPE, 10) is not None
    assert sensor.opened == 2
    feed.close()


@pytest.mark.parametrize("rest", [math.nan, "soon", None, -1.0])
def test_a_source_that_does_not_say_how_long_to_wait_spins_nobody(sensor: Sensor, rest: object):
    feed = Feed("l", CLOCK)
    feed.poll({"kind": "sensor"}, PIPE, 10)
    sensor.rest = rest
    assert feed.wait_s() >= 0.001
    sensor.broken = {"wait_s", "backlog"}
    assert (feed.wait_s() >= 0.01, feed.backlog()) == (True, 0)


@pytest.mark.parametrize("lost", [-1, None, 0.5])
def test_a_source_that_counts_its_losses_wrongly_has_failed(sensor: Sensor, lost: Any):
    feed = Feed("l", CLOCK)
    sensor.batch = Batch(np.zeros((1, 2)), np.zeros(1, np.int64), lost=lost)
    assert feed.poll({"kind": "sensor"}, PIPE, 10) is None
    assert feed.problem is not None
    assert feed.problem.code == "source.failed"


def test_a_state_that_never_ends_does_not_hold_the_lane(sensor: Sensor, tmp_path: Path):
    sensor.batch = Batch(np.ones((1, 1)), np.ones(1, np.int64))
    machine = Machine(tag="s", runs=(1,), source={"kind": "sensor"})
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n")
    both = MachineFeed("l", CLOCK, Feed("l", CLOCK))
    limit = 2000

    def poll(_: int) -> Any:
        sensor.polled += 1
        if sensor.polled > limit:
            pytest.fail("the lane is held")
        return sensor.batch

    sensor.poll = poll  # type: ignore[method-assign]
    batch = both.poll({"kind": "replay", "path": str(path)}, PIPE, 10, machine)
    assert batch is not None
    assert both.mask is not None
    both.close()


# ---- clocks


def test_a_clock_of_the_sensor_that_is_set_back_freezes_nothing():
    hold, now = Hold("x", 1, 10.0), 1_700_000_000_000_000
    hold.put(0, 1.0, now, now)
    hour = 3_600_000_000
    for _ in range(3):
        now += 100_000
        hold.put(0, 2.0, now - hour, now)
    rows = hold.due(now + 100_000).rows
    assert rows[-1][1] == [2.0]


def test_a_value_that_is_a_little_late_still_stands_behind_the_newer():
    hold, now = Hold("x", 1, 10.0), 1_700_000_000_000_000
    hold.put(0, 1.0, now, now)
    hold.put(0, 2.0, now - 50_000, now)
    due = hold.due(now + 200_000)
    assert (due.rows[-1][1], due.lost) == ([1.0], 1)


def test_a_clock_of_the_device_that_is_set_back_forgets_no_state(sensor: Sensor, tmp_path: Path):
    now, mono = [1_700_000_000_000_000], [0]
    clock = Clock(wall=lambda: now[0], mono=lambda: mono[0])
    path = tmp_path / "r.csv"
    path.write_text("a,b\n" + "1,2\n" * 50)
    machine = Machine(tag="s", runs=(1,), source={"kind": "sensor"}, unknown="muted", hold_s=0.0)
    both = MachineFeed("l", clock, Feed("l", clock))

    def judged() -> list[bool]:
        times = np.array([now[0]], np.int64)
        answers = [Batch(np.ones((1, 1)), times), None]
        sensor.poll = lambda _: answers.pop(0) if answers else None  # type: ignore[method-assign]
        now[0] += 200_000
        mono[0] += 200_000
        batch = both.poll({"kind": "replay", "path": str(path)}, PIPE, 10, machine)
        assert batch is not None
        muted = both.judge(batch).muted
        assert muted is not None
        return [bool(m) for m in muted.tolist()]

    judged()
    assert judged()[-1] is False
    now[0] -= 3_600_000_000
    judged()
    assert judged()[-1] is False
    both.close()


def test_a_clock_of_the_device_that_is_set_back_refuses_no_rows_that_are_pushed():
    order, now = http.Order(("a",), 10.0), 1_900_000_000_000_000
    order.sort([http.Row([1.0])], now)
    now -= 3_600_000_000
    stretches, late = order.sort([http.Row([2.0], now), http.Row([3.0])], now + 100_000)
    assert (late, [(s.rows, s.lost, s.gap) for s in stretches]) == (
        0,
        [([(now, [2.0]), (now + 100_000, [3.0])], 0, True)],
    )


# ---- brokers


@broker_needed
@pytest.mark.parametrize(("protocol", "logged"), [("5", "p5"), ("3.1.1", "p2")])
def test_a_retained_sample_is_no_sample_of_now_but_a_retained_state_is(
    tmp_path: Path, protocol: str, logged: str
):
    broker = Broker(tmp_path)
    publisher = broker.publisher()
    marks = sources.Marks((("state", ""),), sources.marks.Texts())
    source = None
    try:
        for topic, value in (("x/a", "1"), ("x/b", "2"), ("state", "RUN")):
            publisher.publish(topic, value, qos=1, retain=True).wait_for_publish(5)
        table: Any = {"kind": "mqtt", "port": broker.port, "protocol": protocol} | {
            "client_id": "press",
            "topics": ["x/a", "x/b"],
        }
        sink = sinks.plan({"kind": "mqtt", "port": broker.port, "protocol": protocol})
        made: Any = sink.open(sink.table)
        assert made.send([FIRST]) == 0
        made.close()
        source = sources.open_source(table, PIPE, CLOCK, marks)
        until(lambda: source.poll(1), "the source is subscribed")
        for topic, value in (("x/a", "3"), ("x/b", "4")):
            publisher.publish(topic, value, qos=1, retain=True)
        batch = until(lambda: (b := source.poll(10)) and len(b.t) and b, "a row")
        assert batch.values.tolist() == [[3.0, 4.0]]
        assert marks.texts.text(batch.marks[0, 0]) == "RUN"
        assert f"as press ({logged}," in (tmp_path / "mosquitto.log").read_text()
    finally:
        publisher.disconnect()
        publisher.loop_stop()
        if source is not None:
            source.close()
        broker.end()


@broker_needed
def test_a_payload_that_no_row_can_be_is_not_even_sent(tmp_path: Path):
    broker = Broker(tmp_path)
    publisher = broker.publisher()
    source = sources.open_source({"kind": "mqtt", "port": broker.port, "topic": "t"}, pipeline(("t",)), CLOCK)
    try:
        until(lambda: source.poll(1), "the source is subscribed")
        publisher.publish("t", b"1" * 8_000_000, qos=1)
        publisher.publish("t", b"1", qos=1)
        assert received(source, 1) == ([[1.0]], 0)
    finally:
        publisher.disconnect()
        publisher.loop_stop()
        source.close()
        broker.end()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "mqtt", "topics": ["plant/+/a", "plant/b"]}, "topics"),
        ({"kind": "mqtt", "topic": "t", "ca_file": "ca.pem"}, "tls = true"),
        ({"kind": "sparkplug", "group": "g", "edge_node": "e", "certificate_file": "x"}, "tls = true"),
        ({"kind": "http", "port": 9, "key_file": "x.key"}, "certificate_file"),
        (
            {"kind": "opcua", "url": "opc.tcp://x", "tags": TAGS, "server_certificate_file": "x"},
            "security_policy",
        ),
    ],
)
def test_what_would_never_come_or_go_in_the_clear_is_refused(table: Any, words: str):
    with pytest.raises(PitheadError) as caught:
        sources.open_source(table, PIPE, CLOCK).close()
    assert (caught.value.code, words in caught.value.detail) == ("config.invalid", True), caught.value


def test_a_metric_that_a_new_birth_lacks_does_not_stand_for_ever():
    hold = Hold("x", 2, 10.0)
    node = EdgeNode(("a", "b"), "oven", hold, own_time=False)
    now = 1_700_000_000_000_000
    node.message("NBIRTH", None, payload(metric("bdSeq", 1, 8), seq=0), now)
    assert (
        node.message("DBIRTH", "oven", payload(metric("a", 1.0, 10), metric("b", 2.0, 10), seq=1), now)
        is False
    )
    assert node.born
    with pytest.raises(PitheadError, match="no metric 'b'"):
        node.message("DBIRTH", "oven", payload(metric("a", 1.0, 10), seq=2), now)


# ---- files


def replayed(path: Path) -> list[list[float]]:
    source = sources.open_source({"kind": "replay", "path": str(path), "rate_hz": 1e6}, PIPE, CLOCK)
    batch = until(lambda: source.poll(2), "rows")
    return [list(row) for row in batch.values.tolist()]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffa;b\r\n1,5;-2\r\n3;4,25e1\r\n",
        "a\tb\n1.5\t-2\n3\t42.5\n",
        '"a";"b"\n"1,5";"-2"\n"3";"42,5"\n',
        'a,b\n"1.5",-2\n3,42.5\n',
    ],
    ids=["semicolons", "tabs", "quoted", "commas"],
)
def test_a_recording_of_any_spreadsheet_can_be_played(tmp_path: Path, text: str):
    path = tmp_path / "r.csv"
    path.write_bytes(text.encode())
    assert replayed(path) == [[1.5, -2.0], [3.0, 42.5]]


@pytest.mark.parametrize(
    ("text", "words"),
    [("a,b,a\n1,2,3\n", "two columns 'a'"), ("a,b\n1_0,2\n", "line 2"), ("a;b\n1.000,5;2\n", "line 2")],
)
def test_a_recording_that_can_be_misread_is_not_read(tmp_path: Path, text: str, words: str):
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(PitheadError, match=words):
        replayed(path)


class Bomb:
    """What a pickle would do when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["r.npy", "r.npz", "records.npy"])
def test_a_pickle_in_a_recording_is_not_read(tmp_path: Path, name: str):
    path, sprung = tmp_path / name, tmp_path / "sprung"
    bombs = np.array([[Bomb(str(sprung))] * 2], object)
    if name == "records.npy":
        bombs = np.array([(1.0, Bomb(str(sprung)))], [("a", float), ("b", object)])
    if name == "r.npz":
        np.savez(path, a=bombs[0], b=bombs[0])
    else:
        np.save(path, bombs, allow_pickle=True)
    with pytest.raises(PitheadError, match=r"allow_pickle|Object arrays|objects"):
        replayed(path)
    assert not sprung.exists()


def test_a_torn_archive_is_named(tmp_path: Path):
    path = tmp_path / "r.csv.gz"
    whole = gzip.compress(b"a,b\n" + os.urandom(0) + b"1,2\n" * 5000, mtime=0)
    path.write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
    with pytest.raises(PitheadError, match=str(path)):
        replayed(path)


def test_a_pipe_among_the_pictures_holds_nobody(tmp_path: Path):
    pil = pytest.importorskip("PIL.Image")
    pipe = Pipeline((Channel("g"),), 4, 4, (0.0,), (1.0,))
    table: Any = {"kind": "images", "path": str(tmp_path), "width": 2, "height": 2, "poll_s": 0.01}
    source = sources.open_source(table, pipe, CLOCK)
    try:
        os.mkfifo(tmp_path / "a.png")
        pil.new("L", (2, 2), 7).save(tmp_path / "b.part", format="PNG")
        (tmp_path / "b.part").rename(tmp_path / "b.png")
        batch = until(lambda: (b := source.poll(4)) and len(b.t) and b, "the picture behind it")
        assert batch.values.tolist() == [[7.0]] * 4
    finally:
        source.close()


def test_pictures_whose_names_begin_anew_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pil = pytest.importorskip("PIL.Image")
    pipe = Pipeline((Channel("g"),), 4, 4, (0.0,), (1.0,))
    pil.new("L", (2, 2), 7).save(tmp_path / "img_9.png")
    table: Any = {"kind": "images", "path": str(tmp_path), "width": 2, "height": 2, "poll_s": 0.01}
    source = sources.open_source(table, pipe, CLOCK)
    try:
        pil.new("L", (2, 2), 7).save(tmp_path / "img_10.png")
        until(lambda: "source.name_not_newer" in caplog.text, "it is said")
    finally:
        source.close()


# ---- the wiring test


@pytest.mark.parametrize(("rate", "words"), [(10.0, ""), (100.0, "TOO FAST"), (2.0, "TOO SLOW")])
def test_a_rate_that_the_model_was_not_made_for_is_no_good_wiring(rate: float, words: str):
    tally = Tally("l", {"kind": "mqtt"}, PIPE)
    t = (np.arange(100) * 1e6 / rate).astype(np.int64)
    tally.add(Batch(np.ones((100, 2)), t), int(t[-1]))
    seen = tally.seen(5.0, None)
    assert seen.good == (not words)
    assert words in render(seen)
    assert ("TOO" in render(seen)) == bool(words)


def test_a_recording_that_is_played_faster_is_not_too_fast():
    tally = Tally("l", {"kind": "replay", "speed": 10.0}, PIPE)
    t = (np.arange(100) * 1e4).astype(np.int64)
    tally.add(Batch(np.ones((100, 2)), t), int(t[-1]))
    assert tally.seen(5.0, None).good
