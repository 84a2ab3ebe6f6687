"""The broker keeps devices apart. What counts is what is delivered: mosquitto grants every SUBSCRIBE."""

import datetime as dt
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest

from contract import topics
from contract.errors import PitheadError
from contract.messages import PriorityClass
from provisioning import broker, pki
from provisioning.eviction import Proof, evict, make_canary, prove
from provisioning.site import Site
from tests.services import (
    BrokerSite,
    Connection,
    device_identity,
    ingest_identity,
    make_broker_site,
    utc_now,
    wait_for,
)

ALICE = "device-alice"
MALLORY = "device-mallory"


Parties = tuple[Connection, Connection, Connection]


@pytest.fixture
def parties(plant: BrokerSite, tmp_path: Path) -> Iterator[Parties]:
    """The ingest service, an honest device and one that is not."""
    ingest = Connection(plant, ingest_identity(plant.site)).open()
    alice = Connection(plant, device_identity(plant.site, ALICE, tmp_path)).open()
    mallory = Connection(plant, device_identity(plant.site, MALLORY, tmp_path)).open()
    yield ingest, alice, mallory
    for connection in (mallory, alice, ingest):
        connection.close()


def marker(connection: Connection, device: str, text: bytes) -> None:
    """Send something allowed after something forbidden: when it arrives, the other would have too."""
    connection.publish(topics.records(device, PriorityClass.RAW), text)


def test_a_device_speaks_for_itself_only(parties: Parties):
    ingest, alice, mallory = parties
    ingest.subscribe(topics.all_records(shared=False))
    alice.publish(topics.records(ALICE, PriorityClass.RECEIPT), b"mine")
    mallory.publish(topics.records(ALICE, PriorityClass.RECEIPT), b"forged")
    mallory.publish("pithead/v1/everything", b"stray")
    marker(mallory, MALLORY, b"end")
    wait_for(lambda: ingest.got(topics.records(MALLORY, PriorityClass.RAW)), "the marker")
    wait_for(lambda: ingest.got(topics.records(ALICE, PriorityClass.RECEIPT)), "Alice's record")
    assert ingest.got(topics.records(ALICE, PriorityClass.RECEIPT)) == [b"mine"]


def test_a_shared_subscription_gets_every_record_once(parties: Parties):
    ingest, alice, mallory = parties
    ingest.subscribe(topics.all_records())
    for number in range(5):
        alice.publish(topics.records(ALICE, PriorityClass.ANOMALY), b"%d" % number)
    marker(mallory, MALLORY, b"other")
    wait_for(lambda: len(ingest.messages) >= 6, "six records")
    assert sorted(bytes(message.payload) for message in ingest.messages) == sorted(
        [b"0", b"1", b"2", b"3", b"4", b"other"]
    )


@pytest.mark.parametrize(
    "topic", ["#", "pithead/#", "pithead/v1/+/down/#", topics.ack(ALICE), "$share/x/pithead/v1/+/down/+"]
)
def test_a_device_hears_its_own_orders_only(parties: Parties, topic: str):
    ingest, alice, mallory = parties
    mallory.subscribe(topic)
    mallory.subscribe(topics.ack(MALLORY))
    alice.subscribe(topics.ack(ALICE))
    ingest.publish(topics.ack(ALICE), b"for Alice")
    ingest.publish(topics.ack(MALLORY), b"for Mallory")
    wait_for(lambda: mallory.got(topics.ack(MALLORY)), "Mallory's own message")
    wait_for(lambda: alice.got(topics.ack(ALICE)), "Alice's message")
    assert {message.topic for message in mallory.messages} == {topics.ack(MALLORY)}


def test_a_device_neither_hears_nor_leaves_retained_messages_of_others(parties: Parties):
    ingest, alice, mallory = parties
    ingest.publish(topics.desired(ALICE), b"hint", retain=True)
    mallory.publish(topics.desired(ALICE), b"forged", retain=True)
    mallory.subscribe(topics.desired(ALICE))
    mallory.subscribe(topics.ack(MALLORY))
    ingest.publish(topics.ack(MALLORY), b"end")
    wait_for(lambda: mallory.got(topics.ack(MALLORY)), "the marker")
    assert mallory.got(topics.desired(ALICE)) == []
    alice.subscribe(topics.desired(ALICE))
    wait_for(lambda: alice.got(topics.desired(ALICE)), "Alice's hint")
    assert alice.got(topics.desired(ALICE)) == [b"hint"]


def test_a_will_on_anothers_topic_is_not_published(plant: BrokerSite, parties: Parties, tmp_path: Path):
    ingest, _alice, _mallory = parties
    ingest.subscribe(topics.all_records(shared=False))
    eve = Connection(plant, device_identity(plant.site, "device-eve", tmp_path))
    eve.client.will_set(topics.status(ALICE), b"forged", qos=1, retain=True)
    eve.open()
    eve.client.socket().shutdown(2)  # the broker publishes the will of a connection that breaks
    wait_for(lambda: eve.losses, "the loss")
    eve.close()
    honest = Connection(plant, device_identity(plant.site, "device-hugo", tmp_path))
    honest.client.will_set(topics.status("device-hugo"), b"gone", qos=1)
    honest.open()
    honest.client.socket().shutdown(2)
    wait_for(lambda: ingest.got(topics.status("device-hugo")), "the honest will")
    honest.close()
    assert ingest.got(topics.status(ALICE)) == []


def test_a_device_cannot_take_over_anothers_session(plant: BrokerSite, parties: Parties, tmp_path: Path):
    _ingest, alice, _mallory = parties
    eve = Connection(plant, device_identity(plant.site, "device-eve", tmp_path), client_id=ALICE).open()
    eve.publish(topics.records("device-eve", PriorityClass.RAW), b"hello")
    assert alice.client.is_connected()
    assert alice.losses == 0
    eve.close()


def test_a_device_cannot_speak_as_a_service(parties: Parties):
    _ingest, alice, mallory = parties
    alice.subscribe(topics.ack(ALICE))
    mallory.publish(topics.ack(ALICE), b"forged")
    _ingest.publish(topics.ack(ALICE), b"real")
    wait_for(lambda: alice.got(topics.ack(ALICE)), "the real one")
    assert alice.got(topics.ack(ALICE)) == [b"real"]


def refused(plant: BrokerSite, certificate: Path | None, key: Path | None) -> bool:
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="x", protocol=mqtt.MQTTv5)
    client.tls_set(str(plant.site.server_ca_file), certificate and str(certificate), key and str(key))
    accepted: list[bool] = []
    client.on_connect = lambda _c, _d, _f, reason, _p: accepted.append(not reason.is_failure)
    try:
        client.connect("127.0.0.1", plant.port)
        for _ in range(100):
            if client.loop(0.05) != mqtt.MQTT_ERR_SUCCESS or accepted:
                break
    except (ssl.SSLError, ConnectionError):
        return True
    finally:
        client.disconnect()
        client.loop(0.05)
        if client.socket() is not None:
            client.socket().close()
    return not any(accepted)


def test_who_has_no_certificate_of_ours_stays_outside(plant: BrokerSite, tmp_path: Path):
    assert refused(plant, None, None)
    stranger = Site(tmp_path / "other")
    stranger.create(["127.0.0.1"], utc_now())
    foreign = device_identity(stranger, ALICE, tmp_path / "foreign")
    assert refused(plant, foreign.certificate, foreign.key)
    own = device_identity(plant.site, ALICE, tmp_path / "own")
    assert not refused(plant, own.certificate, own.key)


def test_a_server_certificate_is_no_client(plant: BrokerSite):
    assert refused(plant, plant.site.server_certificate, plant.site.server_key)


def test_a_revoked_device_stays_outside_after_a_reload(tmp_path: Path):
    plant = make_broker_site(tmp_path)
    identity = device_identity(plant.site, ALICE, tmp_path)
    plant.start()
    try:
        assert not refused(plant, identity.certificate, identity.key)
        plant.revoke(identity.serial)
        assert broker.reload(plant.config.parent)
        wait_for(lambda: refused(plant, identity.certificate, identity.key), "the refusal")
        other = device_identity(plant.site, MALLORY, tmp_path)
        assert not refused(plant, other.certificate, other.key)
    finally:
        plant.stop()


def test_a_live_connection_is_evicted(plant: BrokerSite, parties: Parties) -> None:
    """And its session with it: nothing that was queued for it is left."""
    _ingest, alice, mallory = parties
    assert evict(plant.site, MALLORY, "127.0.0.1", plant.port)
    wait_for(lambda: mallory.losses, "the eviction")
    assert alice.losses == 0
    assert not evict(plant.site, MALLORY, "127.0.0.1", broker.free_port())


def test_lists_are_in_force_when_the_broker_was_seen_to_obey_them(tmp_path: Path):
    plant = make_broker_site(tmp_path)
    canary = make_canary(plant.site, utc_now())

    def proof() -> Proof:
        return prove(plant.site, canary, "127.0.0.1", plant.port)

    assert proof() is Proof.UNREACHABLE
    plant.start()
    try:
        assert proof() is Proof.OPEN
        plant.revoke(canary.serial)
        assert proof() is Proof.OPEN  # it has not read them
        assert broker.reload(plant.config.parent)
        wait_for(lambda: proof() is Proof.IN_FORCE, "the proof")
        (plant.config.parent / "acl").write_text("pattern readwrite #\n")
        os.kill(broker.running(plant.config.parent) or 0, signal.SIGHUP)
        wait_for(lambda: proof() is Proof.OPEN, "the open access list to be found out")
        (plant.config.parent / "crl.pem").write_bytes(
            plant.site.write_crl((), utc_now() - dt.timedelta(days=30))
        )
        os.kill(broker.running(plant.config.parent) or 0, signal.SIGHUP)
        wait_for(lambda: proof() is Proof.UNREACHABLE, "a broker that lets nobody in to be found out")
        assert broker.stop_running(plant.config.parent)
        assert plant.process is not None
        plant.process.wait(10)
    finally:
        plant.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho leaves its socket open
def test_somebody_elses_broker_proves_nothing(plant: BrokerSite, tmp_path: Path):
    other = Site(tmp_path / "other")
    other.create(["127.0.0.1"], utc_now())
    canary = make_canary(other, utc_now())
    assert prove(other, canary, "127.0.0.1", plant.port) is Proof.UNREACHABLE


def test_a_broker_started_with_a_relative_path_is_found(tmp_path: Path):
    plant = make_broker_site(tmp_path)
    process = subprocess.Popen(
        [broker.executable(), "-c", f"{plant.config.parent.name}/{plant.config.name}"], cwd=tmp_path
    )
    try:
        wait_for(lambda: broker.running(plant.config.parent), "the broker")
        assert broker.running(plant.config.parent) == process.pid
        wait_for(lambda: broker.reload(plant.config.parent), "the broker to listen")
    finally:
        broker.stop(process)


def test_a_broker_that_is_still_starting_survives_a_reload(tmp_path: Path):
    """mosquitto has its process id written before it can be told anything."""
    plant = make_broker_site(tmp_path)
    for _ in range(5):
        process = subprocess.Popen([broker.executable(), "-c", str(plant.config)])
        try:
            wait_for(lambda: broker.running(plant.config.parent), "the process id")
            broker.reload(plant.config.parent)
            wait_for(lambda: broker.reload(plant.config.parent), "the broker to listen")
            assert process.poll() is None
        finally:
            broker.stop(process)
            (plant.config.parent / "data" / broker.PID_FILE).unlink(missing_ok=True)


def test_a_renewed_certificate_is_shown_after_a_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plant = make_broker_site(tmp_path)
    plant.start()

    def shown() -> bool:
        context = ssl.create_default_context(cafile=str(plant.site.server_ca_file))
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        identity = ingest_identity(plant.site)
        context.load_cert_chain(identity.certificate, identity.key)
        with (
            socket.create_connection(("127.0.0.1", plant.port), 5) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
        ):
            certificate = connection.getpeercert(binary_form=True)
        assert certificate is not None
        return ssl.DER_cert_to_PEM_cert(certificate) in plant.site.server_certificate.read_text()

    try:
        assert shown()
        old = plant.site.server_certificate.read_bytes()
        monkeypatch.setattr("provisioning.site.RENEW_BEFORE", dt.timedelta(days=pki.SERVER_DAYS + 1))
        assert plant.site.renew(["127.0.0.1"], utc_now())
        assert plant.site.server_certificate.read_bytes() != old
        broker.write_certificate(
            plant.config.parent,
            plant.site.server_certificate.read_bytes(),
            plant.site.server_key.read_bytes(),
        )
        assert broker.reload(plant.config.parent)
        wait_for(shown, "the new certificate")
    finally:
        plant.stop()


def test_a_broken_list_is_never_loaded(tmp_path: Path):
    plant = make_broker_site(tmp_path)
    plant.start()
    try:
        broker.write_revocations(plant.config.parent, b"nothing")
        with pytest.raises(PitheadError, match=r"config.invalid"):
            broker.reload(plant.config.parent)
        plant.revoke()
        (plant.config.parent / "acl").write_text("topic readwrite #\n")
        with pytest.raises(PitheadError, match="acl"):
            broker.reload(plant.config.parent)
    finally:
        plant.stop()
    assert not broker.reload(plant.config.parent)


def test_a_taken_port_is_told(plant: BrokerSite, tmp_path: Path):
    config = broker.write(
        tmp_path / "broker", plant.site.broker_files((), utc_now()), port=plant.port, bind="127.0.0.1"
    )
    with pytest.raises(PitheadError, match=f"broker_port.*{plant.port}"):
        broker.start(config)


def test_a_broken_configuration_is_told_with_the_brokers_own_words(tmp_path: Path):
    plant = make_broker_site(tmp_path)
    plant.config.write_text(plant.config.read_text() + "no_such_setting true\n")
    with pytest.raises(PitheadError, match="no_such_setting"):
        broker.start(plant.config)


def test_a_message_above_the_limit_does_not_pass(plant: BrokerSite, parties: Parties):
    ingest, alice, _mallory = parties
    ingest.subscribe(topics.all_records(shared=False))
    alice.client.publish(topics.records(ALICE, PriorityClass.RAW), b"x" * (broker.MESSAGE_LIMIT + 1), qos=1)
    wait_for(lambda: alice.losses, "the broker to cut off")
    assert ingest.messages == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start it as somebody else")
def test_an_ordinary_user_can_run_it(tmp_path: Path):
    """The whole of it as ``nobody``, who has no access to what root has made."""
    script = (
        "import sys; from pathlib import Path; from tests.services import make_broker_site;"
        "site = make_broker_site(Path(sys.argv[1])); site.start(); site.stop()"
    )
    home = tmp_path / "home"
    home.mkdir()
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == 0 and str(directory).startswith("/tmp/"):
            directory.chmod(0o755)
    os.chown(home, 65534, 65534)
    root = Path(__file__).parents[2]
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = subprocess.run(
        [*nobody, sys.executable, "-c", script, home],
        cwd=root, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_pid_file_of_another_process_is_not_believed(tmp_path: Path):
    plant = make_broker_site(tmp_path)
    (plant.config.parent / "data" / broker.PID_FILE).write_text(str(os.getpid()))
    before = signal.getsignal(signal.SIGHUP)
    assert not broker.reload(plant.config.parent)
    assert signal.getsignal(signal.SIGHUP) == before


def test_site_renews_its_own_certificates(tmp_path: Path):
    plant = make_broker_site(tmp_path)
    later = utc_now() + dt.timedelta(days=pki.SERVER_DAYS - 30)
    assert not plant.site.renew(["127.0.0.1"], utc_now())
    assert plant.site.renew(["127.0.0.1"], later)
    assert pki.expires(plant.site.server_certificate.read_bytes()) > later
