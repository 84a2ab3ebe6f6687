"""The links against a real broker and a real TLS server."""

import contextlib
import datetime as dt
import http.server
import queue
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion

from agent.core.trusted_time import BUILT, TOLERANCE_US, clock_is_right
from agent.link import https
from agent.link.mqtt import BrokerAddress, Connected, Disconnected, LinkEvent, MqttLink
from agent.link.tls import DeviceContext
from agent.service.uplink import Uplink
from agent.store.outbox import Entry, Outbox
from contract import codec, topics
from contract.errors import PitheadError
from contract.messages import Ack, AckRange, Anomaly, DesiredHint, PriorityClass, Status
from provisioning.broker import executable

DEVICE = "dev-test0001"
Wait = Callable[..., None]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Broker:
    """A mosquitto of our own."""

    directory: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        config = self.directory / "mosquitto.conf"
        config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence true\n"
            f"persistence_location {self.directory}/\nmax_queued_messages 1000\nuser root\n"
        )
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen([executable(), "-c", str(config)], stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
                return
            time.sleep(0.02)
        pytest.fail((self.directory / "log").read_text())

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    found = Broker(tmp_path)
    yield found
    found.stop()


@dataclass
class ControlPlane:
    """The other side: sees what devices publish, and answers."""

    port: int
    messages: "queue.Queue[mqtt.MQTTMessage]" = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="svc-test", protocol=mqtt.MQTTv5)
        self.client.on_message = lambda _c, _d, message: self.messages.put(message)
        subscribed = threading.Event()
        self.client.on_subscribe = lambda *_: subscribed.set()
        self.client.connect("127.0.0.1", self.port)
        self.client.loop_start()
        self.client.subscribe(topics.all_records(shared=False), qos=1)
        assert subscribed.wait(10)

    def publish(self, topic: str, message: object, *, retain: bool = False) -> None:
        self.client.publish(topic, codec.encode(message), qos=1, retain=retain).wait_for_publish(10)

    def next(self, segment: str) -> mqtt.MQTTMessage:
        while True:
            message = self.messages.get(timeout=10)
            if message.topic.endswith(f"/{segment}"):
                return message

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
        self.client.on_message = self.client.on_subscribe = None  # no circle: its sockets close at once


@contextlib.contextmanager
def control_plane(port: int) -> Iterator[ControlPlane]:
    found = ControlPlane(port)
    try:
        yield found
    finally:
        found.close()


@dataclass
class Device:
    """A link and what it has said."""

    port: int
    events: list[LinkEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.link = MqttLink(
            BrokerAddress("127.0.0.1", self.port),
            device=DEVICE,
            boot_id="boot",
            tls=None,
            on_event=self.events.append,
            now=lambda: time.time_ns() // 1000,
            fraction=lambda: 0.0,
            keepalive_s=5,
            retry_cap_s=0.4,
        )

    def saw(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def device(broker: Broker) -> Iterator[Device]:
    found = Device(broker.port)
    yield found
    found.link.stop()


def test_presence_is_retained_and_the_goodbye_too(broker: Broker, device: Device, wait_until: Wait):
    broker.start()
    device.link.start()
    wait_until(lambda: device.link.online, "the connection")
    with control_plane(broker.port) as plane:
        online = codec.decode(bytes(plane.next("status").payload), Status)
        assert (online.device, online.online, online.boot_id) == (DEVICE, True, "boot")
        device.link.stop()
        assert not codec.decode(bytes(plane.next("status").payload), Status).online


def test_the_will_says_offline_when_the_device_vanishes(broker: Broker, device: Device, wait_until: Wait):
    broker.start()
    device.link.start()
    wait_until(lambda: device.link.online, "the connection")
    with control_plane(broker.port) as plane:
        assert codec.decode(bytes(plane.next("status").payload), Status).online
        sock = device.link._client.socket()
        assert sock is not None
        sock.shutdown(socket.SHUT_RDWR)
        assert not codec.decode(bytes(plane.next("status").payload), Status).online


def test_a_broker_that_is_down_at_start_is_found_later(broker: Broker, device: Device, wait_until: Wait):
    begun = time.monotonic()
    device.link.start()
    assert time.monotonic() - begun < 1
    wait_until(lambda: device.saw(Disconnected), "the first failure")
    assert not device.link.publish("x", b"1", codec.JSON)
    broker.start()
    wait_until(lambda: device.saw(Connected), "the connection")
    broker.stop()
    wait_until(lambda: not device.link.online, "the loss")
    broker.start()
    wait_until(lambda: len(device.saw(Connected)) == 2, "the second connection")


def test_only_the_link_s_thread_touches_the_connection(
    broker: Broker, device: Device, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
):
    """OpenSSL does not stand two threads on one connection: a write beside a read corrupts the heap."""
    broker.start()
    threads: set[str] = set()
    write = device.link._client.loop_write

    def recorded(*arguments: Any) -> Any:
        threads.add(threading.current_thread().name)
        return write(*arguments)

    monkeypatch.setattr(device.link._client, "loop_write", recorded)
    device.link.start()
    wait_until(lambda: device.link.online, "the connection")
    with control_plane(broker.port) as plane:
        begun = time.monotonic()
        assert device.link.publish(topics.records(DEVICE, PriorityClass.HEALTH), b"[]", codec.JSON)
        plane.next("health")
        assert time.monotonic() - begun < 0.5  # the thread is woken, it does not merely look by chance
    device.link.stop()
    assert threads == {"mqtt"}


def test_acks_and_hints_arrive_also_those_sent_while_away(broker: Broker, device: Device, wait_until: Wait):
    broker.start()
    device.link.start()
    wait_until(lambda: device.link.online, "the connection")
    hint = DesiredHint(1, DEVICE, 7, "a" * 64)
    with control_plane(broker.port) as plane:
        plane.publish(topics.desired(DEVICE), hint, retain=True)
        plane.publish(topics.ack(DEVICE), {"v": "one"})
        wait_until(lambda: device.saw(DesiredHint) == [hint], "the hint")
        device.link.stop()
        ack = Ack(1, DEVICE, (AckRange("e", PriorityClass.HEALTH, 3),))
        plane.publish(topics.ack(DEVICE), ack)
        again = Device(broker.port)
        again.link.start()
        wait_until(lambda: again.saw(Ack) == [ack] and again.saw(DesiredHint) == [hint], "both")
        again.link.stop()


def test_records_go_out_by_importance_and_stay_until_the_control_plane_has_them(
    broker: Broker, device: Device, wait_until: Wait, tmp_path: Path
):
    broker.start()
    outbox = Outbox(tmp_path / "outbox.db", device=DEVICE, boot_id="boot", limit=10**7)
    now = [0.0]
    uplink = Uplink(outbox, device.link, lambda: now[0])
    with control_plane(broker.port) as plane:
        anomaly = Anomaly("pump", "1.0.0", 5, 2.0, 1.0)
        outbox.append([Entry(PriorityClass.ANOMALY, 1, 1, anomaly)] * 450)
        uplink.pump()  # no connection: nothing happens
        device.link.start()
        wait_until(lambda: device.link.online, "the connection")
        uplink.pump()
        seqs: list[int] = []
        while len(seqs) < 450:
            message = plane.next("anomaly")
            batch = codec.decode_batch(
                bytes(message.payload), getattr(message.properties, "ContentType", None)
            )
            seqs += [envelope.seq for envelope in batch]
        assert seqs == list(range(1, 451))
        assert outbox.health().records == 450
        uplink.acknowledged(
            Ack(1, DEVICE, (AckRange(outbox.epoch, PriorityClass.ANOMALY, 400, ((405, 410),)),))
        )
        assert outbox.health().records == 44
        uplink.pump()
        assert plane.messages.empty()
        now[0] += 1000  # no acknowledgement comes: the rest is sent again
        uplink.pump()
        message = plane.next("anomaly")
        batch = codec.decode_batch(bytes(message.payload), getattr(message.properties, "ContentType", None))
        assert [e.seq for e in batch] == [*range(401, 405), *range(411, 451)]
        uplink.acknowledged(Ack(1, "dev-another1", (AckRange(outbox.epoch, PriorityClass.ANOMALY, 999),)))
        assert outbox.health().records == 44
    outbox.close()


# --- HTTPS


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path; HTTP/1.1 keeps connections open."""

    protocol_version = "HTTP/1.1"
    connections = 0

    def setup(self) -> None:
        type(self).connections += 1
        super().setup()

    def do_GET(self) -> None:
        if self.path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b".")
                    time.sleep(0.05)
            return
        known = self.headers.get("If-None-Match")
        status, body = (304, b"") if known == '"e1"' else (200, b"bundle")
        if self.path == "/problem":
            status, body = 403, b'{"type": "identity.revoked", "detail": "revoked on Monday"}'
        self.send_response(status)
        self.send_header("ETag", '"e1"')
        self.send_header("Content-Length", str(len(body)))
        if self.path == "/bye":
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def self_signed(directory: Path, age: dt.timedelta = dt.timedelta(hours=1)) -> tuple[Path, Path]:
    """Make a certificate that is as old as ``age``, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - age)
        .not_valid_after(now - age + dt.timedelta(hours=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return directory / "cert.pem", directory / "key.pem"


@contextlib.contextmanager
def tls_server(certificate: Path, key: Path) -> Iterator[https.ServerAddress]:
    Handler.connections = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield https.parse_url(f"https://localhost:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[https.Channel]:
    certificate, key = self_signed(tmp_path)
    with tls_server(certificate, key) as address:
        found = https.Channel(address, ssl.create_default_context(cafile=str(certificate)))
        yield found
        found.close()


def test_a_clock_known_to_be_wrong_is_not_asked_and_the_connection_is_checked_once_it_is_right(
    tmp_path: Path,
):
    """The certificate is not valid yet, as every one is for a device that believes in 1970."""
    certificate, key = self_signed(tmp_path, age=dt.timedelta(days=-1))
    right = False
    with tls_server(certificate, key) as address:
        trust = DeviceContext(lambda: right)
        trust.load_verify_locations(certificate)
        found = https.Channel(address, trust)
        for _ in range(2):
            assert found.exchange("GET", "/").status == 200
        assert Handler.connections == 1
        right = True
        with pytest.raises(PitheadError, match="not yet valid"):
            found.exchange("GET", "/")
        right = False
        (tmp_path / "other").mkdir()
        stranger = DeviceContext(lambda: right)
        stranger.load_verify_locations(self_signed(tmp_path / "other")[0])
        with pytest.raises(PitheadError, match="self-signed"):
            https.Channel(address, stranger).exchange("GET", "/")


@pytest.mark.parametrize(
    ("floor", "now", "right"),
    [(0, BUILT, True), (0, 0, False), (BUILT + 2 * TOLERANCE_US, BUILT, False), (BUILT + 5, BUILT, True)],
)
def test_a_clock_below_what_was_signed_is_wrong(floor: int, now: int, right: bool):  # noqa: FBT001 - a table
    assert clock_is_right(now, floor) is right


def test_one_connection_serves_many_requests_and_a_closed_one_is_made_anew(channel: https.Channel):
    answers = [channel.exchange("GET", "/") for _ in range(3)]
    assert [(a.status, a.body, a.etag) for a in answers] == [(200, b"bundle", '"e1"')] * 3
    assert Handler.connections == 1
    assert channel.exchange("GET", "/", headers={"If-None-Match": '"e1"'}).status == 304
    channel.exchange("GET", "/bye")
    assert channel.exchange("GET", "/").status == 200
    assert Handler.connections == 2


def test_the_deadline_holds_also_for_a_server_that_dribbles(channel: https.Channel):
    begun = time.monotonic()
    with pytest.raises(PitheadError) as caught:
        channel.exchange("GET", "/slow", deadline_s=0.4)
    assert caught.value.code == "update.unreachable"
    assert time.monotonic() - begun < 3


def test_problems_keep_their_code(channel: https.Channel):
    error = https.problem(channel.exchange("GET", "/problem"))
    assert (error.code, error.detail) == ("identity.revoked", "revoked on Monday")


def test_nobody_there_is_unreachable_and_retryable():
    nobody = https.Channel(https.parse_url(f"https://127.0.0.1:{free_port()}"), ssl.create_default_context())
    with pytest.raises(PitheadError) as caught:
        nobody.exchange("GET", "/")
    assert caught.value.code == "update.unreachable"
    assert caught.value.retryable


@pytest.mark.parametrize("url", ["http://a", "https://", "https://a/b", "a:1", "https://a:x"])
def test_a_wrong_url_is_named(url: str):
    with pytest.raises(PitheadError) as caught:
        https.parse_url(url)
    assert caught.value.code == "config.invalid"
