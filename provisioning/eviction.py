"""Comes to the broker under a device's name: to end its connection, or to prove who is let in.

A revocation list is read when somebody connects and cuts nobody off. But a
broker keeps one connection per name: whoever comes under the same name
ends the other. So we come, once, with a certificate of five minutes.

And a reload of mosquitto fails open. So with every list goes the serial
number of a canary, a certificate made for it alone: when the canary is
refused while another of our own is let in, and that one may not speak as
somebody else, this very list and the access list are in force.
"""

import enum
import logging
import ssl
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import paho.mqtt.client as mqtt
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion

from contract import topics
from contract.messages import PriorityClass
from provisioning import durable, pki
from provisioning.site import Site

log = logging.getLogger(__name__)

LIFE_MINUTES: Final = 5
CANARY_DAYS: Final = 3
"""A canary outlives its list by far: one that has expired would be refused in any case."""
WAIT_S: Final = 5.0
CONNECT_S: Final = 3.0


class Canary(NamedTuple):
    """An identity that no device has."""

    name: str
    certificate: bytes
    key: bytes
    serial: str


class Proof(enum.Enum):
    """What a visit has shown."""

    IN_FORCE = "in force"
    """Who is revoked stays outside, and nobody speaks as somebody else."""
    OPEN = "open"
    """Somebody is let in, or may do, what the newest lists forbid."""
    UNREACHABLE = "unreachable"
    """No broker of ours answered, or it lets in nobody at all."""


class _Visit(enum.Enum):
    ENTERED = enum.auto()
    REFUSED = enum.auto()
    UNREACHABLE = enum.auto()


def make_canary(site: Site, now: pki.Moment, days: float = CANARY_DAYS) -> Canary:
    """Return an identity under a new name."""
    return _identity(site, pki.new_device_id(), now, days)


def prove(site: Site, revoked: Canary, host: str, port: int) -> Proof:
    """Show whether the broker has the list on which ``revoked`` stands."""
    trusted = make_canary(site, pki.utc_now(), LIFE_MINUTES / (24 * 60))
    answers: list[bool] = []

    def speak_as_another(client: mqtt.Client) -> bool:
        client.on_publish = lambda _c, _d, _mid, reason, _p: answers.append(reason.is_failure)
        client.publish(topics.records(revoked.name, PriorityClass.RAW), b"", qos=1)
        return _turn(client, lambda: bool(answers))

    visit = _visit(site, trusted, host, port, speak_as_another)
    if visit is not _Visit.ENTERED or not answers:
        return Proof.UNREACHABLE
    if not answers[0]:
        return Proof.OPEN
    return {
        _Visit.ENTERED: Proof.OPEN,
        _Visit.REFUSED: Proof.IN_FORCE,
        _Visit.UNREACHABLE: Proof.UNREACHABLE,
    }[_visit(site, revoked, host, port)]


def evict(site: Site, device: str, host: str, port: int) -> bool:
    """Take over the broker's connection and session of ``device``, and close them; whether it worked."""
    identity = _identity(site, device, pki.utc_now(), LIFE_MINUTES / (24 * 60))
    done = _visit(site, identity, host, port) is _Visit.ENTERED
    log.info("device.evicted" if done else "device.not_evicted", extra={"facts": {"device": device}})
    return done


def _identity(site: Site, name: str, now: pki.Moment, days: float) -> Canary:
    key = ec.generate_private_key(ec.SECP256R1())
    issued = pki.issue_device(site.device_authority, key.public_key(), name, now, days=days)
    return Canary(name, issued.pem, pki.private_pem(key), issued.serial)


def _visit(
    site: Site,
    identity: Canary,
    host: str,
    port: int,
    then: Callable[[mqtt.Client], bool] = lambda _client: True,
) -> _Visit:
    """Connect, do ``then``, and leave."""
    accepted: list[bool] = []

    def on_connect(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        accepted.append(not reason.is_failure)

    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=identity.name, protocol=mqtt.MQTTv5)
    client.connect_timeout = CONNECT_S
    with tempfile.TemporaryDirectory(prefix="pithead-") as directory:
        certificate, private = Path(directory, "cert.pem"), Path(directory, "key.pem")
        certificate.write_bytes(identity.certificate)
        durable.write(private, identity.key, durable.PRIVATE)
        client.tls_set(str(site.server_ca_file), str(certificate), str(private))
    client.on_connect = on_connect
    try:
        client.connect(host, port, clean_start=True)
        heard = _turn(client, lambda: bool(accepted))
        entered = bool(accepted) and accepted[0]
        if entered:
            then(client)
    except ssl.SSLCertVerificationError:
        return _Visit.UNREACHABLE  # somebody else's broker
    except (ssl.SSLError, ConnectionResetError, BrokenPipeError):
        return _Visit.REFUSED
    except OSError:
        return _Visit.UNREACHABLE
    else:
        if entered:
            return _Visit.ENTERED
        # it ended our connection, or says why it does not want us: silence proves nothing
        return _Visit.REFUSED if accepted or not heard else _Visit.UNREACHABLE
    finally:
        client.disconnect()
        client.loop(0.05)
        connection = client.socket()
        if connection is not None:
            connection.close()
        client.on_connect = client.on_publish = None  # a client in no circle closes its sockets when let go


def _turn(client: mqtt.Client, done: Callable[[], bool]) -> bool:
    """Serve the connection until ``done`` or ``WAIT_S`` have passed; False when the broker ended it."""
    deadline = time.monotonic() + WAIT_S
    while not done() and time.monotonic() < deadline:
        if client.loop(0.05) != mqtt.MQTT_ERR_SUCCESS:
            return False
    return True
