"""Ends the live connection of a device that was just revoked.

A revocation list is read when somebody connects and cuts nobody off. But a
broker keeps one connection per name: whoever comes under the same name
ends the other. So we come, once, with a certificate of five minutes.
"""

import logging
import tempfile
import threading
from pathlib import Path
from typing import Any, Final

import paho.mqtt.client as mqtt
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion

from provisioning import durable, pki
from provisioning.site import Site

log = logging.getLogger(__name__)

LIFE_MINUTES: Final = 5
WAIT_S: Final = 5.0


def evict(site: Site, device: str, host: str, port: int) -> bool:
    """Take over the broker's connection and session of ``device``, and close them; whether it worked."""
    key = ec.generate_private_key(ec.SECP256R1())
    issued = pki.issue_device(
        site.device_authority, key.public_key(), device, pki.utc_now(), days=LIFE_MINUTES / (24 * 60)
    )
    with tempfile.TemporaryDirectory(prefix="pithead-") as directory:
        certificate, private = Path(directory, "cert.pem"), Path(directory, "key.pem")
        certificate.write_bytes(issued.pem)
        durable.write(private, pki.private_pem(key), durable.PRIVATE)
        done = _visit(site, device, host, port, (certificate, private))
    log.info("device.evicted" if done else "device.not_evicted", extra={"facts": {"device": device}})
    return done


def _visit(site: Site, device: str, host: str, port: int, identity: tuple[Path, Path]) -> bool:
    entered = threading.Event()

    def on_connect(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if not reason.is_failure:
            entered.set()

    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=device, protocol=mqtt.MQTTv5)
    client.tls_set(str(site.server_ca_file), str(identity[0]), str(identity[1]))
    client.on_connect = on_connect
    try:
        client.connect(host, port, clean_start=True)
    except OSError:
        return False
    client.loop_start()
    done = entered.wait(WAIT_S)
    client.disconnect()
    client.loop_stop()
    return done
