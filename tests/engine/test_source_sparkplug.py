"""The sparkplug source: a real broker, and a small edge node that writes the wire format by itself."""

import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion

from agent.engine.sources import check, open_source
from agent.engine.sources.base import Source
from agent.engine.sources.hold import Hold
from agent.engine.sources.marks import Marks, Texts
from agent.engine.sources.sparkplug import EdgeNode
from agent.engine.sources.sparkplug_payload import parsed
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from tests.engine.conftest import Engine, free_port, make_package, until
from tests.engine.test_mqtt import CLOCK, MOSQUITTO, Broker

pytestmark = pytest.mark.skipif(not MOSQUITTO.exists(), reason="mosquitto is not installed (make system)")
NOW = 1_800_000_000_000_000

# ---- the wire format, written without the code under test


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: Any) -> bytes:
    if isinstance(value, bool | int):
        return varint(number << 3) + varint(int(value))
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def metric(
    name: str | None = None, value: Any = None, datatype: int = 10, alias: int | None = None, **more: Any
) -> bytes:
    """Datatypes: 1-4 Int8-Int64, 5-8 UInt8-UInt64, 9 Float, 10 Double, 11 Boolean, 12 String."""
    out = b"" if name is None else field(1, name)
    out += b"" if alias is None else field(2, alias)
    out += b"" if "t" not in more else field(3, more["t"])
    out += field(4, datatype) if datatype else b""
    out += field(5, True) if more.get("historical") else b""
    if "quality" in more:
        out += field(9, field(1, "Quality") + field(2, field(1, 3) + field(3, more["quality"])))
    if value is None:
        return out + field(7, True)
    if datatype == 9:
        return out + varint(12 << 3 | 5) + struct.pack("<f", value)
    number, content = {
        4: (11, lambda: value % 2**64),
        8: (11, lambda: value % 2**64),
        10: (13, lambda: float(value)),
        11: (14, lambda: bool(value)),
        12: (15, lambda: str(value)),
    }.get(datatype, (10, lambda: value % 2**32))
    return out + field(number, content())


def payload(*metrics: bytes, seq: int | None = None, t: int | None = None) -> bytes:
    out = field(1, int(time.time() * 1000) if t is None else t)
    out += b"".join(field(2, m) for m in metrics)
    return out if seq is None else out + field(3, seq)


class Press:
    """An edge node ``plant/press`` with a device ``oven``; it answers requests for rebirth."""

    def __init__(self, broker: Broker, bdseq: int = 0) -> None:
        self.bdseq, self.seq, self.births = bdseq, 255, 0
        self.values: dict[str, float] = {"temperature": 20.0, "pressure": 1.5}
        self.client = paho.Client(CallbackAPIVersion.VERSION2)
        self.client.will_set("spBv1.0/plant/NDEATH/press", self.death(), qos=1)
        self.client.on_message = self._command
        until(lambda: self._connect(broker.port), "the broker answers")
        self.client.subscribe("spBv1.0/plant/NCMD/press", qos=1)
        self.client.loop_start()
        self.born()

    def _connect(self, port: int) -> bool:
        try:
            self.client.connect("127.0.0.1", port)
        except OSError:
            return False
        return True

    def _command(self, _client: Any, _data: Any, message: Any) -> None:
        (sample,) = parsed(message.payload).samples
        if sample.name == "Node Control/Rebirth" and sample.raw is True:
            self.born()

    def death(self) -> bytes:
        return payload(metric("bdSeq", self.bdseq, 8))

    def send(self, kind: str, *metrics: bytes, device: str | None = "oven", skip: int = 0) -> None:
        self.seq = (self.seq + 1 + skip) % 256
        topic = f"spBv1.0/plant/{kind}/press" + (f"/{device}" if device else "")
        self.client.publish(topic, payload(*metrics, seq=self.seq), qos=0)

    def born(self) -> None:
        self.births += 1
        self.seq = 255
        control = metric("Node Control/Rebirth", False, 11)
        self.send("NBIRTH", metric("bdSeq", self.bdseq, 8), control, metric("load", 7, 5), device=None)
        self.oven()

    def oven(self) -> None:
        v = self.values
        self.send(
            "DBIRTH",
            metric("temperature", v["temperature"], 10, alias=11),
            metric("pressure", v["pressure"], 10, alias=12),
            metric("note", "warm", 12, alias=13),
        )

    def data(self, alias: int, value: float | None, **more: Any) -> None:
        self.send("DDATA", metric(None, value, 10, alias, **more))

    def vanish(self) -> None:
        """The connection breaks: the broker tells of it."""
        sock = self.client.socket()
        assert sock is not None
        self.client.loop_stop()
        sock.close()

    def end(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
        self.client.on_message = None


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    started = Broker(tmp_path)
    yield started
    started.end()


@pytest.fixture
def press(broker: Broker) -> Iterator[Press]:
    made = Press(broker)
    yield made
    made.end()


NAMES = ("temperature", "pressure")


class Seen:
    """What a source has given so far."""

    def __init__(self, source: Source) -> None:
        self.source, self.lost, self.gaps = source, 0, 0
        self.rows: list[list[float]] = []
        self.times: list[int] = []

    def poll(self) -> None:
        batch = self.source.poll(1000)
        if batch is not None:
            self.rows += batch.values.tolist()
            self.times += batch.t.tolist()
            self.lost += batch.lost
            self.gaps += not batch.continues and bool(len(batch.t))

    def until(self, condition: Callable[[list[float]], Any], what: str) -> None:
        def there() -> bool:
            self.poll()
            return bool(self.rows) and bool(condition(self.rows[-1]))

        until(there, what)


@pytest.fixture
def opened(broker: Broker) -> Iterator[Callable[..., Seen]]:
    held: list[Source] = []

    def opening(names: tuple[str, ...] = NAMES, **table: Any) -> Seen:
        channels = tuple(Channel(n) for n in names)
        width = len(names)
        pipeline = Pipeline(channels, 1, 1, (0.0,) * width, (1.0,) * width, sample_rate_hz=20.0)
        given = {"kind": "sparkplug", "port": broker.port, "group": "plant", "edge_node": "press"}
        given |= {"device": "oven", "delay_s": 0.1}
        held.append(open_source(given | table, pipeline, CLOCK))
        return Seen(held[-1])

    yield opening
    for one in held:
        one.close()
        one.close()


def failure(source: Source) -> str:
    with pytest.raises(PitheadError) as caught:
        until(lambda: source.poll(1) and None, "never")
    assert caught.value.code == "source.failed"
    return caught.value.detail


def test_births_are_asked_for_and_data_come_by_alias(press: Press, opened: Callable[..., Seen]):
    seen = opened()
    seen.until(lambda row: row == [20, 1.5], "the values of the birth")
    assert press.births == 2, "one more was asked for"
    press.data(11, 21.5)
    seen.until(lambda row: row == [21.5, 1.5], "a value by its alias")
    press.send("DDATA", metric("pressure", 1.75))
    seen.until(lambda row: row == [21.5, 1.75], "a value by its name")
    press.data(12, None)
    seen.until(lambda row: row[0] == 21.5 and np.isnan(row[1]), "a null is missing")
    press.data(12, 2.0, quality=0)
    press.data(11, 22.0, quality=192)
    seen.until(lambda row: row[0] == 22 and np.isnan(row[1]), "a value of bad quality is missing")
    assert (seen.lost, press.births) == (0, 2)
    assert set(np.diff(seen.times).tolist()) == {50_000}


def test_the_node_s_own_metrics_and_tags_with_factors(press: Press, opened: Callable[..., Seen]):
    tags = [{"channel": "x", "address": "load", "scale": 2.0, "offset": 1.0}]
    seen = opened(("x",), device=None, tags=tags)
    seen.until(lambda row: row == [15], "the value of the birth")
    press.send("NDATA", metric("load", 9, 5), device=None)
    seen.until(lambda row: row == [19], "new data")


def test_a_value_stands_in_the_row_of_its_own_time(press: Press, opened: Callable[..., Seen]):
    seen = opened(delay_s=1.0)
    seen.until(lambda row: row == [20, 1.5], "the values of the birth")
    taken = CLOCK.wall() // 1000 - 500
    press.data(11, 30.0, t=taken)
    seen.until(lambda row: row == [30, 1.5], "the value")
    first = next(t for t, row in zip(seen.times, seen.rows, strict=True) if row[0] == 30)
    assert 0 <= first - taken * 1000 < 60_000
    assert seen.lost == 0
    press.data(11, 31.0, t=taken - 10_000, historical=True)
    press.data(11, 32.0)
    seen.until(lambda row: row == [32, 1.5], "the next; what is historical is none of now")
    assert [row[0] for row in seen.rows].count(31.0) == 0


def test_a_device_s_death_is_a_gap(press: Press, opened: Callable[..., Seen]):
    seen = opened()
    seen.until(lambda row: row == [20, 1.5], "the values of the birth")
    gaps, rows = seen.gaps, len(seen.rows)
    press.send("DDEATH")
    until(lambda: (seen.poll(), seen.lost > 5)[1], "rows are lost")
    assert all(row == [20, 1.5] for row in seen.rows[rows:])
    press.values["temperature"] = 40.0
    press.oven()
    seen.until(lambda row: row == [40, 1.5], "it lives again")
    assert seen.gaps == gaps + 1
    assert press.births == 2, "no rebirth of the node was needed"


def test_a_node_s_death_is_a_gap_and_an_older_death_is_none(
    broker: Broker, press: Press, opened: Callable[..., Seen]
):
    seen = opened()
    seen.until(lambda row: row == [20, 1.5], "the values of the birth")
    press.client.publish("spBv1.0/plant/NDEATH/press", payload(metric("bdSeq", 77, 8)), qos=1)
    press.data(11, 25.0)
    seen.until(lambda row: row == [25, 1.5], "it lives on")
    assert seen.lost == 0
    press.vanish()
    until(lambda: (seen.poll(), seen.lost > 5)[1], "the broker tells of its death, rows are lost")
    second = Press(broker, bdseq=1)
    try:
        rows = len(seen.rows)
        seen.until(lambda row: len(seen.rows) > rows and row == [20, 1.5], "the node's second life")
    finally:
        second.end()


def test_a_missing_message_is_a_gap_until_the_births_that_are_asked_for(
    press: Press, opened: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("agent.engine.sources.sparkplug.ASK_AGAIN_US", 100_000)
    seen = opened()
    seen.until(lambda row: row == [20, 1.5], "the values of the birth")
    gaps, births = seen.gaps, press.births
    began = CLOCK.mono()
    until(lambda: CLOCK.mono() - began > 150_000, "it may ask again")
    press.values["temperature"] = 50.0
    press.send("DDATA", metric(None, 49.0, 10, 11), skip=1)
    seen.until(lambda row: row == [50, 1.5], "the births that were asked for")
    assert press.births == births + 1
    assert seen.gaps == gaps + 1
    assert [49.0, 1.5] not in seen.rows, "nothing is believed before"


def test_a_message_that_cannot_be_read_is_missing(press: Press, opened: Callable[..., Seen]):
    seen = opened()
    seen.until(lambda row: row == [20, 1.5], "the values of the birth")
    for garbage in (b"\xff\xff\xff", b"\x08", b"x" * 300_000):
        press.client.publish("spBv1.0/plant/DDATA/press/oven", garbage, qos=1)
    press.data(11, 26.0)
    seen.until(lambda row: row == [26, 1.5], "it goes on")
    assert seen.lost == 3


@pytest.mark.parametrize(
    ("names", "words"),
    [(("temperature", "humidity"), "the birth has no metric 'humidity'"), (("note",), "'note' is no number")],
)
def test_a_metric_that_is_none_is_named(
    press: Press, opened: Callable[..., Seen], names: tuple[str, ...], words: str
):
    assert words in failure(opened(names).source)


def test_a_node_that_is_not_there_is_a_failed_source(
    broker: Broker, opened: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("agent.engine.sources.sparkplug.SILENT_US", 300_000)
    somebody = broker.publisher()
    somebody.disconnect()
    somebody.loop_stop()
    assert "sparkplug plant/press/oven has not been born" in failure(opened().source)


def test_a_lane_lives_through_a_broker_that_goes_and_comes(tmp_path: Path, engine: Engine):
    port = free_port()
    package = make_package(tmp_path / "p")
    supervisor = engine.connect()
    tags = [{"channel": n, "address": "temperature"} for n in "abc"]
    table = {"kind": "sparkplug", "port": port, "group": "plant", "edge_node": "press", "device": "oven"}
    supervisor.configure(package.spec(table | {"tags": tags, "delay_s": 0.1}))
    for _ in range(2):
        supervisor.until_state(state="failed", code="source.failed")
        broker = Broker(tmp_path, port=port)
        try:
            press = Press(broker)
            supervisor.until_state(state="running", code=None)
            seen = supervisor.state().windows
            supervisor.until(lambda seen=seen: supervisor.state().windows > seen + 10, "rows are scored")
            press.end()
        finally:
            broker.end()


# ---- without a broker


@pytest.mark.parametrize(
    ("value", "datatype", "seen_as"),
    [
        (-5, 1, -5),
        (251, 1, -5),
        (-300, 2, -300),
        (-70_000, 3, -70_000),
        (-(2**40), 4, -(2.0**40)),
        (200, 5, 200),
        (60_000, 6, 60_000),
        (4_000_000_000, 7, 4e9),
        (2**60, 8, 2.0**60),
        (1.5, 9, 1.5),
        (1e300, 10, 1e300),
        (True, 11, 1),
        (None, 10, np.nan),
    ],
)
def test_every_datatype(value: Any, datatype: int, seen_as: float):
    (sample,) = parsed(payload(metric("x", value, datatype))).samples
    assert np.array_equal(sample.value(datatype), seen_as, equal_nan=True)


KINDS = st.sampled_from(["NBIRTH", "DBIRTH", "DDATA", "NDATA", "DDEATH", "NDEATH"])
SOUND = st.builds(
    lambda seq, v: payload(metric("a", v, 10, 1), metric("bdSeq", 1, 8), seq=seq),
    st.integers(0, 5),
    st.none() | st.floats(allow_nan=False),
)


@given(st.lists(st.tuples(KINDS, st.binary(max_size=60) | SOUND), max_size=20))
def test_no_message_breaks_it(messages: list[tuple[str, bytes]]):
    held = Hold("test", 1, 10.0)
    node = EdgeNode(("a",), "d", held, own_time=False)
    now = NOW
    for kind, data in messages:
        now += 50_000
        try:
            node.message(kind, "d" if kind.startswith("D") else None, data, now)
        except ValueError:
            held.miss(1)
        except PitheadError as error:
            assert error.code == "source.failed"  # noqa: PT017 - anything else is an error of ours
            return
        assert held.due(now).lost >= 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group": "a/b"}, "group"),
        ({"edge_node": "+"}, "edge_node"),
        ({"device": "#"}, "device"),
        ({"edge_node": None}, "edge_node"),
        ({"delay_s": -1}, "delay_s"),
        ({"topic": "x"}, "topic"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str):
    table = {"kind": "sparkplug", "group": "plant", "edge_node": "press"} | changes
    with pytest.raises(PitheadError) as caught:
        check(table)
    assert caught.value.code == "config.invalid"
    assert words in caught.value.detail


def test_a_text_may_be_the_state_of_the_machine(broker: Broker, press: Press):
    table: dict[str, Any] = {
        "kind": "sparkplug",
        "port": broker.port,
        "group": "plant",
        "edge_node": "press",
        "device": "oven",
        "delay_s": 0.1,
    }
    texts = Texts()
    pipeline = Pipeline((Channel("temperature"),), 1, 1, (0.0,), (1.0,), sample_rate_hz=20.0)
    source = open_source(table, pipeline, CLOCK, Marks((("note", ""),), texts))

    def says(text: str) -> bool:
        batch = source.poll(100)
        return (
            bool(batch and batch.marks is not None and len(batch.t))
            and texts.text(batch.marks[-1, 0]) == text
        )

    try:
        until(lambda: says("warm"), "the state of the birth")
        press.send("DDATA", metric(None, "cold", 12, 13))
        until(lambda: says("cold"), "another state, by its alias")
    finally:
        source.close()
