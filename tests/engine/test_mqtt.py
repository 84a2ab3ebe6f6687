"""The mqtt source against a real broker."""

import gc
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from agent.engine.clock import Clock
from agent.engine.sources import open_source
from agent.engine.sources.base import Source
from agent.engine.sources.mqtt import Rows
from agent.engine.window import Windower
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from tests.engine.certificates import Identity
from tests.engine.conftest import CHANNELS, Engine, free_port, make_package, until

MOSQUITTO = Path("/usr/sbin/mosquitto")
pytestmark = pytest.mark.skipif(not MOSQUITTO.exists(), reason="mosquitto is not installed (make system)")
CLOCK = Clock(wall=lambda: time.time_ns() // 1000, mono=lambda: time.monotonic_ns() // 1000)


def pipeline(names: tuple[str, ...] = CHANNELS) -> Pipeline:
    return Pipeline(tuple(Channel(n) for n in names), 1, 1, (0.0,) * len(names), (1.0,) * len(names))


class Broker:
    """A mosquitto on a port of its own."""

    def __init__(self, directory: Path, listener: str = "", port: int | None = None) -> None:
        self.port = port or free_port()
        self.directory = directory
        config = directory / "mosquitto.conf"
        config.write_text(
            f"user root\nlistener {self.port} 127.0.0.1\n{listener or 'allow_anonymous true'}\n"
        )
        self._log = (directory / "mosquitto.log").open("ab")
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", config], stdout=self._log, stderr=self._log, cwd=directory
        )

    def publisher(self, setup: Callable[[paho.Client], Any] = lambda _: None) -> paho.Client:
        client = paho.Client(CallbackAPIVersion.VERSION2)
        setup(client)

        def connected() -> bool:
            try:
                client.connect("127.0.0.1", self.port)
            except OSError:
                return False
            return True

        until(connected, "the broker answers")
        client.loop_start()
        until(client.is_connected, "the publisher is connected")
        return client

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self._log.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    started = Broker(tmp_path)
    yield started
    started.end()


@pytest.fixture
def closing() -> Iterator[list[Any]]:
    """Clients and sources to be closed at the end."""
    held: list[Any] = []
    yield held
    for one in held:
        if isinstance(one, paho.Client):
            one.disconnect()
            one.loop_stop()
        else:
            one.close()


def opened(broker: Broker, closing: list[Any], names: tuple[str, ...] = CHANNELS, **table: Any) -> Source:
    source = open_source({"kind": "mqtt", "port": broker.port} | table, pipeline(names), CLOCK)
    closing.append(source)
    until(lambda: source.poll(1), "the source is subscribed")
    return source


def received(source: Source, rows: int) -> tuple[list[list[float]], int]:
    found: list[list[float]] = []
    lost = 0

    def enough() -> bool:
        nonlocal lost
        if (batch := source.poll(100)) is not None:
            found.extend(batch.values.tolist())
            lost += batch.lost
        return len(found) >= rows

    until(enough, f"{rows} rows")
    return found, lost


def test_a_message_is_a_row(broker: Broker, closing: list[Any]):
    publisher = broker.publisher()
    closing.append(publisher)
    source = opened(broker, closing, topic="plant/press")
    for payload in (
        b'{"a": 1, "b": 2.5, "c": true, "other": "x"}',
        b"[4, 5, 6]",
        b"not json",
        b'{"a": "text", "b": 1, "c": 2}',
        b"[1, 2]",
        b"1" * 400,
        b"[" * 100_000,
        b'{"a": 7, "c": null}',
    ):
        publisher.publish("plant/press", payload, qos=1)
    rows, lost = received(source, 3)
    assert rows[:2] == [[1, 2.5, 1], [4, 5, 6]]
    assert rows[2][0] == 7
    assert np.isnan(rows[2][1:]).all()
    assert lost == 5


def test_a_client_that_breaks_is_a_failed_source(
    broker: Broker, closing: list[Any], monkeypatch: pytest.MonkeyPatch
):
    """Whatever goes wrong on the client's thread: the lane must hear of it, and open another."""
    publisher = broker.publisher()
    closing.append(publisher)
    source = opened(broker, closing, ("t",), topic="t")

    def broken(*_: Any) -> None:
        raise KeyError("nobody thought of this")

    monkeypatch.setattr("agent.engine.sources.mqtt._decoded", broken)
    publisher.publish("t", b"1", qos=1)
    with pytest.raises(PitheadError, match=r"source\.failed"):
        until(lambda: source.poll(1) and None, "never")


def test_a_single_value_is_a_row_of_one(broker: Broker, closing: list[Any]):
    publisher = broker.publisher()
    closing.append(publisher)
    source = opened(broker, closing, ("t",), topic="plant/+/t")
    publisher.publish("plant/1/t", b"21.5", qos=1)
    assert received(source, 1) == ([[21.5]], 0)


def test_each_channel_may_have_its_topic(broker: Broker, closing: list[Any]):
    publisher = broker.publisher()
    closing.append(publisher)
    source = opened(broker, closing, topics=["x/a", "x/b", "x/c"])
    for topic, payload in (
        ("x/c", 3),
        ("x/a", 0),
        ("x/a", 1),
        ("x/b", 2),
        ("x/a", 4),
        ("x/b", 5),
        ("x/c", 6),
    ):
        publisher.publish(topic, str(payload), qos=1)
    assert received(source, 2) == ([[1, 2, 3], [4, 5, 6]], 0)


def test_topics_at_different_rates_fill_windows():
    """Twenty values a second beside ten: the slower sets the pace, and no window is lost."""
    rows, windower = Rows(("fast", "slow"), ("f", "s"), CLOCK), Windower(4, 1, 2)
    windows = 0
    for i in range(100):
        for topic, payload in (("f", b"1"), ("f", b"2"), ("s", b"[[" if i == 50 else b"3")):
            rows.message(topic, payload)
        taken, _, gap = rows.take(1000)
        values = np.array([row for _, row in taken]).reshape(-1, 2)
        windows += len(windower.push(values, np.ones(len(values), bool), continues=not gap).starts)
    assert windows == 99 - 3


def test_a_message_that_cannot_be_read_is_missing_and_breaks_no_window():
    rows = Rows(("a",), None, CLOCK)
    for payload in (b"1", b"?", b"2"):
        rows.message("t", payload)
    taken, lost, gap = rows.take(100)
    assert ([row for _, row in taken], lost, gap) == ([[1], [2]], 1, False)


def test_rows_that_nobody_takes_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("agent.engine.sources.mqtt.MAX_WAITING", 5)
    rows = Rows(("a",), None, CLOCK)
    for i in range(8):
        rows.message("t", str(i).encode())
    taken, lost, gap = rows.take(100)
    assert [row for _, row in taken] == [[3], [4], [5], [6], [7]]
    assert (lost, gap) == (3, True)
    assert rows.take(100) == ([], 0, False)


def test_a_lane_lives_through_a_broker_that_goes_and_comes(tmp_path: Path, engine: Engine):
    port = free_port()
    package = make_package(tmp_path / "p")
    supervisor = engine.connect()
    supervisor.configure(package.spec({"kind": "mqtt", "port": port, "topic": "plant"}))
    failed = supervisor.until_state(state="failed")
    assert failed.code == "source.failed"
    assert f"127.0.0.1:{port}" in failed.detail
    for _ in range(2):
        broker = Broker(tmp_path, port=port)
        publisher = broker.publisher()
        supervisor.until_state(state="running", code=None)
        before = sum(s.count for s in supervisor.summaries)
        publisher.publish("plant", msgspec.json.encode({"a": 20, "b": 20, "c": 20}), qos=1)
        supervisor.until(
            lambda before=before: sum(s.count for s in supervisor.summaries) > before, "the row is scored"
        )
        publisher.loop_stop()
        broker.end()
        supervisor.until_state(state="failed")


@pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket")
def test_tls_with_a_password_from_a_file(tmp_path: Path, closing: list[Any]):
    own = Identity(tmp_path, "tls")
    cert, key = own.certificate, own.key
    passwords = tmp_path / "passwords"
    passwords.write_text("plant:secret\n")
    subprocess.run(["/usr/bin/mosquitto_passwd", "-U", passwords], check=True, capture_output=True)
    for path in (key, passwords):
        path.chmod(0o644)
    broker = Broker(
        tmp_path, f"certfile {cert}\nkeyfile {key}\nallow_anonymous false\npassword_file {passwords}"
    )
    credentials = tmp_path / "credentials.toml"
    credentials.write_text('username = "plant"\npassword = "secret"\n')
    table = {"host": "localhost", "tls": True, "ca_file": str(cert), "topic": "t"}
    try:

        def setup(client: paho.Client) -> None:
            context = ssl.create_default_context(cafile=cert)
            context.check_hostname = False
            client.tls_set_context(context)
            client.username_pw_set("plant", "secret")

        publisher = broker.publisher(setup)
        closing.append(publisher)
        source = opened(broker, closing, ("t",), credentials_file=str(credentials), **table)
        publisher.publish("t", b"1", qos=1)
        assert received(source, 1) == ([[1.0]], 0)

        credentials.write_text('username = "plant"\npassword = "wrong"\n')
        refused = open_source(
            {"kind": "mqtt", "port": broker.port, "credentials_file": str(credentials)} | table,
            pipeline(("t",)),
            CLOCK,
        )
        closing.append(refused)
        with pytest.raises(PitheadError, match="refused: Not authorized"):
            until(lambda: refused.poll(1), "never")
        untrusted = open_source(
            {"kind": "mqtt", "port": broker.port, "topic": "t", "host": "localhost", "tls": True},
            pipeline(("t",)),
            CLOCK,
        )
        closing.append(untrusted)
        with pytest.raises(PitheadError, match="certificate verify failed"):
            until(lambda: untrusted.poll(1), "never")
        gc.collect()  # paho leaves the socket of a failed handshake to the collector
    finally:
        broker.end()


@pytest.mark.parametrize(
    ("table", "code", "words"),
    [
        ({}, "config.invalid", "one of topic and topics"),
        ({"topic": "a", "topics": ["a", "b", "c"]}, "config.invalid", "one of topic and topics"),
        ({"topics": ["a"]}, "config.invalid", "lanes.source.topics names 1"),
        ({"topic": "a", "columns": ["a"]}, "config.invalid", "lanes.source.columns names 1"),
        ({"topic": "a", "port": 0}, "config.invalid", "port"),
        ({"topic": "a", "tls": True, "ca_file": "/no/such"}, "source.failed", "ca_file"),
        ({"topic": "a", "credentials_file": "/no/such"}, "source.failed", "credentials_file"),
        ({"topic": "a", "credentials_file": __file__}, "config.invalid", "credentials_file"),
    ],
)
def test_what_is_wrong_is_named(table: dict[str, Any], code: str, words: str):
    with pytest.raises(PitheadError) as caught:
        open_source({"kind": "mqtt"} | table, pipeline(), CLOCK)
    assert caught.value.code == code
    assert words in caught.value.detail
