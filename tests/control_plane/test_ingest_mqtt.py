"""Ingest over a real broker: nothing is lost, and nothing counts twice."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import zstandard
from msgspec.structs import replace

from contract import codec, topics
from contract.messages import Ack, AckRange, DesiredHint, Envelope, PriorityClass, Status
from control_plane.ingest.decode import Inbound
from control_plane.ingest.mqtt import BrokerAddress, Ingest
from control_plane.ingest.writer import Writer, Written
from control_plane.services import desired
from control_plane.store import devices, telemetry
from control_plane.store.database import Database
from control_plane.store.telemetry import Window
from control_plane.workers.hints import HintPublisher
from tests.control_plane.messages import DEVICE, NOW, OTHER, add_device, anomaly, envelope, plain
from tests.services import (
    BrokerSite,
    Connection,
    Postgres,
    device_identity,
    wait_for,
)

MakeIngest = Callable[[], Ingest]


@pytest.fixture
def ready_database(database: Database) -> Database:
    add_device(database, DEVICE)
    add_device(database, OTHER)
    return database


@pytest.fixture
def make_ingest(ready_database: Database, broker_site: BrokerSite) -> Iterator[MakeIngest]:
    """Start the ingest, again after it was stopped; it is stopped at the end."""
    started: list[Ingest] = []
    site = broker_site.site
    address = BrokerAddress(
        "127.0.0.1", broker_site.port, site.server_ca_file, site.ingest_certificate, site.ingest_key
    )

    def start() -> Ingest:
        for earlier in started:
            earlier.stop()
        started.clear()
        ingest = Ingest(address, Writer(ready_database, lambda: NOW), lambda: NOW, linger_s=0.02)
        ingest.start()
        started.append(ingest)
        return ingest

    yield start
    for ingest in started:
        ingest.stop()


class Device(Connection):
    """A device that keeps its records until the control plane has them."""

    def __init__(self, plant: BrokerSite, directory: Path, name: str = DEVICE) -> None:
        super().__init__(plant, device_identity(plant.site, name, directory))
        self.name = name

    def begin(self) -> "Device":
        self.open(clean=False, expiry_s=600)
        self.subscribe(topics.ack(self.name))
        return self

    def send(self, *envelopes: Envelope) -> None:
        payload, content_type = codec.encode_batch(list(envelopes))
        self.publish(topics.records(self.name, envelopes[0].priority), payload, content_type=content_type)

    def acked(self) -> int:
        """Return how far the anomalies are acknowledged."""
        acks = [codec.decode(payload, Ack) for payload in self.got(topics.ack(self.name))]
        return max((one.prefix for ack in acks for one in ack.acks), default=0)


def scores(database: Database) -> list[float]:
    with database.reading() as tx:
        return sorted(row.score for row in telemetry.anomalies(tx, Window(limit=1000)))


def test_a_broker_that_comes_later(
    ready_database: Database, broker_site: BrokerSite, make_ingest: MakeIngest, tmp_path: Path
) -> None:
    ingest = make_ingest()
    assert not ingest.connected
    broker_site.start()
    device = Device(broker_site, tmp_path).begin()
    wait_for(lambda: ingest.connected, "the ingest to connect")
    device.send(envelope(anomaly(1.5), 1), envelope(anomaly(2.5), 2))
    wait_for(lambda: device.acked() == 2, "the acknowledgement")
    assert scores(ready_database) == [1.5, 2.5]
    device.close()


def test_what_is_sent_while_the_ingest_is_away_is_kept(
    ready_database: Database, broker_site: BrokerSite, make_ingest: MakeIngest, tmp_path: Path
) -> None:
    broker_site.start()
    ingest = make_ingest()
    wait_for(lambda: ingest.connected, "the ingest to connect")
    device = Device(broker_site, tmp_path).begin()
    device.send(envelope(anomaly(1), 1))
    wait_for(lambda: device.acked() == 1, "the first acknowledgement")
    ingest.stop()
    for number in range(2, 30):
        device.send(envelope(anomaly(number), number))
    make_ingest()
    wait_for(lambda: device.acked() == 29, "all acknowledgements")
    assert scores(ready_database) == [float(number) for number in range(1, 30)]
    device.close()


def test_every_record_once_through_broker_restarts_and_repetitions(
    ready_database: Database, broker_site: BrokerSite, make_ingest: MakeIngest, tmp_path: Path
) -> None:
    """The broker is killed twice and forgets; the device sends again what was not acknowledged."""
    broker_site.start()
    make_ingest()
    device = Device(broker_site, tmp_path).begin()
    total = 40
    for round_ in range(3):
        for number in range(1, total + 1):
            if number > device.acked():
                device.send(envelope(anomaly(number), number))
            if number == total // 2 and round_ < 2:
                assert broker_site.process is not None
                broker_site.process.kill()
                broker_site.stop()
                broker_site.start()
                wait_for(device.client.is_connected, "the device to be back")
                device.subscribe(topics.ack(DEVICE))
    wait_for(lambda: device.acked() == total, "all acknowledgements")
    assert scores(ready_database) == [float(number) for number in range(1, total + 1)]
    device.close()


def test_poison_does_not_stop_the_rest(
    ready_database: Database, broker_site: BrokerSite, make_ingest: MakeIngest, tmp_path: Path
) -> None:
    broker_site.start()
    make_ingest()
    device = Device(broker_site, tmp_path).begin()
    topic = topics.records(DEVICE, PriorityClass.ANOMALY)
    device.publish(topic, b"{nonsense")
    device.publish(topic, b"x" * (codec.MAX_PAYLOAD + 1))
    device.send(envelope(anomaly(1), 1))
    wait_for(lambda: device.acked() == 1, "the acknowledgement")
    with ready_database.reading() as tx:
        letters = telemetry.dead_letters(tx, Window())
    assert {letter.code for letter in letters} == {"message.malformed", "message.too_large"}
    device.close()


def test_one_device_cannot_cut_the_ingest_off(
    ready_database: Database, broker_site: BrokerSite, make_ingest: MakeIngest, tmp_path: Path
) -> None:
    """Neither by a message that asks for a huge acknowledgement, nor would one ever be sent."""
    broker_site.start()
    ingest = make_ingest()
    evil = Device(broker_site, tmp_path, OTHER).begin()
    good = Device(broker_site, tmp_path).begin()
    wait_for(lambda: ingest.connected, "the ingest to connect")
    one = plain(envelope(anomaly(1), 1, device=OTHER))
    for start in range(0, 12_500, 2_500):
        bomb = msgspec.json.encode([{**one, "epoch": f"{n:064d}"} for n in range(start, start + 2_500)])
        packed = zstandard.ZstdCompressor(level=19).compress(bomb)
        evil.publish(topics.records(OTHER, PriorityClass.ANOMALY), packed, content_type=codec.JSON_ZSTD)
    spans = tuple((n * 10**15, n * 10**15) for n in range(1, 4000))
    ranges = tuple(AckRange(f"e{n}", PriorityClass.RAW, 0, spans) for n in range(10))
    ingest.acks([Ack(1, OTHER, ranges)])
    good.send(envelope(anomaly(1), 1))
    wait_for(lambda: good.acked() == 1, "the acknowledgement")
    good.send(envelope(anomaly(2), 2))
    wait_for(lambda: good.acked() == 2, "the next acknowledgement")
    assert ingest.connected
    evil.close()
    good.close()


def test_a_batch_that_always_fails_is_given_up(
    ready_database: Database,
    broker_site: BrokerSite,
    make_ingest: MakeIngest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Writer.write

    def write(self: Writer, messages: Sequence[Inbound]) -> Written:
        if any(b"poison" in message.payload for message in messages):
            raise RuntimeError("nobody thought of this")
        return original(self, messages)

    monkeypatch.setattr(Writer, "write", write)
    monkeypatch.setattr("control_plane.ingest.mqtt.RETRY_S", (0.01, 0.02))
    broker_site.start()
    make_ingest()
    device = Device(broker_site, tmp_path).begin()
    device.publish(topics.records(DEVICE, PriorityClass.ANOMALY), b"poison")
    numbers = itertools.count(1)

    def heard() -> bool:
        device.send(envelope(anomaly(1), next(numbers)))
        return bool(device.got(topics.ack(DEVICE)))

    wait_for(heard, "an acknowledgement")
    device.close()


def test_presence_and_will_and_what_was_retained(
    ready_database: Database, broker_site: BrokerSite, make_ingest: MakeIngest, tmp_path: Path
) -> None:
    def online() -> bool:
        with ready_database.reading() as tx:
            return devices.device(tx, DEVICE).online

    broker_site.start()
    device = Device(broker_site, tmp_path)
    gone = Status(v=1, device=DEVICE, online=False, boot_id="b", t_wall=NOW)
    device.client.will_set(topics.status(DEVICE), codec.encode(gone), qos=1, retain=True)
    device.begin()
    here = Status(v=1, device=DEVICE, online=True, boot_id="b", t_wall=NOW)
    device.publish(topics.status(DEVICE), codec.encode(here), retain=True)
    make_ingest()  # it comes after the message, and learns it from the broker
    wait_for(online, "the device to be online")
    device.client.socket().shutdown(2)
    wait_for(lambda: not online(), "the will")
    device.close()


def test_hints_are_retained_and_sent_until_the_broker_has_them(
    ready_database: Database, broker_site: BrokerSite, make_ingest: MakeIngest, tmp_path: Path
) -> None:
    def hint(device: str) -> DesiredHint:
        return DesiredHint(v=1, device=device, version=7, sha256="0" * 64)

    ingest = make_ingest()
    worker = HintPublisher(ready_database, hint, ingest)
    with ready_database.transaction() as tx:
        desired.change(tx, DEVICE, lambda before: replace(before, agent_version="2"))
    assert worker.tick() == 0  # the broker is not there
    broker_site.start()
    wait_for(lambda: ingest.connected, "the ingest to connect")
    assert worker.tick() == 1
    assert worker.tick() == 0
    device = Device(broker_site, tmp_path).begin()
    device.subscribe(topics.desired(DEVICE))
    wait_for(lambda: device.got(topics.desired(DEVICE)), "the hint")
    assert codec.decode(device.got(topics.desired(DEVICE))[0], DesiredHint) == hint(DEVICE)
    device.close()


def test_a_database_that_goes_away_loses_nothing(
    postgres: Postgres, migrated_postgres: str, broker_site: BrokerSite, tmp_path: Path
) -> None:
    database = Database(migrated_postgres)
    name = "device-patient"
    add_device(database, name)
    broker_site.start()
    site = broker_site.site
    address = BrokerAddress(
        "127.0.0.1", broker_site.port, site.server_ca_file, site.ingest_certificate, site.ingest_key
    )
    ingest = Ingest(address, Writer(database, lambda: NOW), lambda: NOW, linger_s=0.02)
    ingest.start()
    try:
        device = Device(broker_site, tmp_path, name).begin()
        wait_for(lambda: ingest.connected, "the ingest to connect")
        device.send(envelope(anomaly(1), 1, device=name))
        wait_for(lambda: device.acked() == 1, "the first acknowledgement")
        postgres.stop()
        device.send(envelope(anomaly(2), 2, device=name))
        postgres.run_server()
        wait_for(lambda: device.acked() == 2, "the second acknowledgement", 40)
        device.close()
    finally:
        ingest.stop()
        database.close()
