"""Sinks, and sources beside them, where both sides must show who they are, to real servers."""

import gc
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from asyncua import ua

from agent.engine import sinks
from agent.engine.sources import open_source
from contract.errors import PitheadError
from tests.engine.certificates import Identity
from tests.engine.conftest import Engine, make_package, samples, until, write_csv
from tests.engine.test_mqtt import CLOCK, MOSQUITTO, Broker, pipeline
from tests.engine.test_sinks import FIRST
from tests.engine.test_source_opcua import URI, Machine, Users, secured

LISTENER = (
    "cafile {ca}\ncertfile {cert}\nkeyfile {key}\nrequire_certificate true\n"
    "use_identity_as_username true\nacl_file acl"
)


def sent(table: dict[str, Any]) -> None:
    """Deliver one message as the sink's own thread would; raises what is wrong."""
    plan = sinks.plan(table)
    made: Any = plan.open(plan.table)
    try:
        assert made.send([FIRST]) == 0
    finally:
        made.close()


def refused(table: dict[str, Any]) -> str:
    """Return why a sink cannot deliver."""
    with pytest.raises(PitheadError) as caught:
        sent(table)
    assert caught.value.code == "sink.failed"
    return caught.value.detail


@pytest.mark.skipif(not MOSQUITTO.exists(), reason="mosquitto is not installed (make system)")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket")
def test_a_broker_that_knows_its_clients_by_certificate(tmp_path: Path):
    plant, elsewhere = Identity(tmp_path, "plant"), Identity(tmp_path, "elsewhere")
    server = Identity(tmp_path, "broker", by=plant)
    device, stranger = Identity(tmp_path, "device", by=plant), Identity(tmp_path, "stranger", by=elsewhere)
    (tmp_path / "acl").write_text("user device\ntopic readwrite plant/#\n")
    names = {"ca": plant.certificate, "cert": server.certificate, "key": server.key}
    broker = Broker(tmp_path, LISTENER.format(**names))
    common = {"kind": "mqtt", "host": "localhost", "port": broker.port, "tls": True}
    table = common | {"ca_file": str(plant.certificate), **device.files}
    source = None

    def setup(client: paho.Client) -> None:
        client.tls_set(str(plant.certificate), str(device.certificate), str(device.key))
        client.tls_insecure_set(True)

    publisher = broker.publisher(setup)
    try:
        source = open_source(table | {"topic": "plant/press"}, pipeline(("score",)), CLOCK)
        until(lambda: source.poll(1), "the source is subscribed")
        sent(table | {"topic": "plant/{lane}"})
        batch = until(lambda: (b := source.poll(1)) and len(b.t) and b, "the sink's own message, as a row")
        assert batch.values.tolist() == [[FIRST.score]]
        assert "plant/press" not in refused(table | stranger.files | {"topic": "plant/{lane}"})
        assert "verify failed" in refused(table | {"ca_file": str(elsewhere.certificate)})
        assert "elsewhere/press" in refused(table | {"topic": "elsewhere/{lane}"})
        assert "certificate_file" in refused(table | {"key_file": str(server.key)})
    finally:
        publisher.disconnect()
        publisher.loop_stop()
        if source is not None:
            source.close()
        broker.end()
        gc.collect()  # paho leaves the socket of a failed handshake to the collector


class Hook:
    """A webhook over TLS that asks for a certificate of ``authority``."""

    def __init__(self, own: Identity, authority: Identity) -> None:
        self.got: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler) -> None:  # noqa: N805 - the library's names
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                connection: Any = handler.connection
                self.got.append((connection.getpeercert()["subject"][0][0][1], body))
                handler.send_response(204)
                handler.end_headers()

            def log_message(self, *_: Any) -> None: ...

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None: ...

        self.server = Quiet(("127.0.0.1", 0), Handler)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.certificate)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(own.certificate, own.key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_a_webhook_of_an_authority_of_its_own_that_asks_for_certificates(tmp_path: Path):
    plant, elsewhere = Identity(tmp_path, "plant"), Identity(tmp_path, "elsewhere")
    device, stranger = Identity(tmp_path, "device", by=plant), Identity(tmp_path, "stranger", by=elsewhere)
    hook = Hook(Identity(tmp_path, "hook", by=plant), plant)
    table = {"kind": "http", "url": f"https://localhost:{hook.server.server_port}/x", "timeout_s": 5.0}
    trusting = table | {"ca_file": str(plant.certificate)}
    try:
        sent(trusting | device.files)
        assert [(name, body["lane"]) for name, body in hook.got] == [("device", "press")]
        assert "verify failed" in refused(table | device.files)
        refused(trusting | stranger.files)
        refused(trusting)
        assert len(hook.got) == 1
    finally:
        hook.end()


def test_an_opcua_server_with_certificates_and_a_password_through_a_whole_engine(
    engine: Engine, tmp_path: Path
):
    own, stranger = (Identity(tmp_path, name, uri=f"urn:pithead:{name}") for name in ("device", "stranger"))
    server, setup = secured(tmp_path, own)
    machine = Machine(setup=setup, user_manager=Users())
    secret = tmp_path / "credentials.toml"
    secret.write_text('username = "plant"\npassword = "secret"\n')
    try:
        space = machine._nodes["a"].nodeid.NamespaceIndex
        objects, nodes = machine.server.nodes.objects, {}
        for name, start in (("alarm", 7), ("valid", False), ("beat", 0)):
            kind = ua.VariantType.Boolean if name == "valid" else ua.VariantType.Int16
            made = machine._call(objects.add_variable(ua.NodeId(name, space), name, start, kind))
            machine._call(made.set_writable())
            nodes[name] = made

        def value(name: str) -> Any:
            return machine._call(nodes[name].read_value())

        table = {"kind": "opcua", "url": machine.url, "safe": 9, "on": 2, "off": 1, "refresh_s": 0.05,
                 "hold_s": 0.0, "security_policy": "Basic256Sha256", "credentials_file": str(secret),
                 "server_certificate_file": str(server.certificate), "alarm": f"nsu={URI};s=alarm",
                 "quality": f"nsu={URI};s=valid", "heartbeat": f"nsu={URI};s=beat"}  # fmt: skip
        with pytest.raises(PitheadError, match="not trusted"):
            sent(table | stranger.files)
        assert (value("alarm"), value("beat")) == (7, 0)
        package = make_package(tmp_path / "p", kind="int8.onnx")
        path = write_csv(tmp_path / "r.csv", samples(400))
        source = {"kind": "replay", "path": str(path), "rate_hz": 100.0}
        supervisor = engine.connect()
        supervisor.configure(package.spec(source, sinks=(table | own.files,)))
        seen: set[int] = set()

        def both() -> bool:
            supervisor.read()
            seen.add(value("alarm"))
            return {1, 2} <= seen

        until(both, "the alarm goes on and off")
        assert value("valid") is True
        before = value("beat")
        until(lambda: value("beat") != before, "the heart beats")
        supervisor.close()
        assert engine.stop() == 0
        assert (value("alarm"), value("valid")) == (9, False)
    finally:
        machine.end()
