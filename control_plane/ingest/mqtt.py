"""The connection to the broker: receives for the writer, and publishes to devices.

A message is acknowledged to the broker only when it is committed, and to
the device after that. The session outlives the connection, so the broker
keeps what comes while we are away.
"""

import logging
import queue
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions
from sqlalchemy.exc import InterfaceError, OperationalError

from contract import codec, topics
from contract.messages import Ack, DesiredHint
from control_plane.ingest.decode import STATUS_SEGMENT, Inbound
from control_plane.ingest.writer import Writer, Written
from control_plane.ports import Clock

log = logging.getLogger(__name__)

CLIENT_ID: Final = "svc-ingest"
SESSION_S: Final = 14 * 24 * 3600
RECEIVE_MAXIMUM: Final = 1_000
"""Messages that the broker sends ahead of our acknowledgement; bounds our memory too."""
KEEPALIVE_S: Final = 30
RETRY_S: Final = (0.5, 30.0)
ATTEMPTS: Final = 5
"""At a batch that fails and nobody knows why. The devices send again what was not acknowledged."""
HINT_WAIT_S: Final = 5.0

ALL_STATUS: Final = f"{topics.ROOT}/+/up/{STATUS_SEGMENT}"
"""Subscribed apart: a shared subscription gets no retained messages."""


class BrokerAddress(msgspec.Struct, frozen=True):
    """Where the broker is, and as whom we speak to it."""

    host: str
    port: int
    server_ca: Path
    certificate: Path
    key: Path


class _Arrived(msgspec.Struct, frozen=True):
    message: Inbound
    mid: int
    qos: int
    connection: int


class Ingest:
    """Receives what devices send. Also the ``Publisher`` of hints and acknowledgements."""

    def __init__(
        self,
        address: BrokerAddress,
        writer: Writer,
        clock: Clock,
        *,
        batch: int = 500,
        linger_s: float = 0.05,
    ) -> None:
        self._address = address
        self._writer = writer
        self._clock = clock
        self._batch = batch
        self._linger_s = linger_s
        self._arrived: queue.SimpleQueue[_Arrived | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._connection = 0
        self._thread = threading.Thread(target=self._run, name="ingest", daemon=True)
        self._tls = ssl.create_default_context(cafile=str(address.server_ca))
        self.renewed()
        self._client = self._make_client()

    def start(self) -> None:
        """Begin; the broker need not be there yet."""
        self._client.connect_async(
            self._address.host,
            self._address.port,
            keepalive=KEEPALIVE_S,
            clean_start=False,
            properties=_connect_properties(),
        )
        self._client.loop_start()
        self._thread.start()

    def stop(self) -> None:
        """Store what has arrived, then leave. What was not stored stays with the broker."""
        self._stopping.set()
        self._arrived.put(None)
        self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()
        # A client that nothing ties into a circle closes all of its sockets as soon as it is let go.
        self._client.on_connect = self._client.on_connect_fail = None
        self._client.on_disconnect = self._client.on_message = None

    def renewed(self) -> None:
        """Read our certificate, also again when it was renewed, for the connections from now on."""
        self._tls.load_cert_chain(self._address.certificate, self._address.key)

    @property
    def connected(self) -> bool:
        """Whether the broker is there now."""
        return self._client.is_connected()

    def hints(self, hints: Sequence[DesiredHint]) -> frozenset[str]:
        """See ``ports.Publisher``."""
        if not self.connected:
            return frozenset()
        sent = [
            (
                hint.device,
                self._client.publish(topics.desired(hint.device), codec.encode(hint), qos=1, retain=True),
            )
            for hint in hints
        ]
        deadline = time.monotonic() + HINT_WAIT_S
        taken = set()
        for device, info in sent:
            if info.rc == mqtt.MQTT_ERR_SUCCESS:
                info.wait_for_publish(max(0.0, deadline - time.monotonic()))
                if info.is_published():
                    taken.add(device)
        return frozenset(taken)

    def acks(self, acks: Sequence[Ack]) -> None:
        """See ``ports.Publisher``."""
        if not self.connected:
            return
        for ack in acks:
            payload = codec.encode(ack)
            if len(payload) > codec.MAX_PAYLOAD:
                # the broker would cut us off, and again with every repetition after that
                log.error("ingest.ack_too_large", extra={"facts": {"device": ack.device}})
            else:
                self._client.publish(topics.ack(ack.device), payload, qos=1)

    def _make_client(self) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=CLIENT_ID, protocol=mqtt.MQTTv5, manual_ack=True
        )
        client.tls_set_context(self._tls)
        client.reconnect_delay_set(1, round(RETRY_S[1]))
        client.max_inflight_messages_set(RECEIVE_MAXIMUM)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        return client

    def _on_connect(
        self, client: mqtt.Client, _data: Any, flags: mqtt.ConnectFlags, reason: ReasonCode, _p: Any
    ) -> None:
        if reason.is_failure:
            log.warning("ingest.refused_by_broker", extra={"facts": {"reason": str(reason)}})
            return
        self._connection += 1
        client.subscribe(
            [
                (topics.all_records(), SubscribeOptions(qos=1)),
                (ALL_STATUS, SubscribeOptions(qos=1)),
            ]
        )
        log.info("ingest.connected", extra={"facts": {"session_present": flags.session_present}})

    def _on_connect_fail(self, _client: mqtt.Client, _data: Any) -> None:
        log.warning(
            "ingest.broker_unreachable",
            extra={"facts": {"host": self._address.host, "port": self._address.port}},
        )

    def _on_disconnect(
        self, _client: mqtt.Client, _data: Any, _flags: mqtt.DisconnectFlags, reason: ReasonCode, _p: Any
    ) -> None:
        if not self._stopping.is_set():
            log.warning("ingest.disconnected", extra={"facts": {"reason": str(reason)}})

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        content_type = getattr(message.properties, "ContentType", None)
        self._arrived.put(
            _Arrived(
                Inbound(message.topic, bytes(message.payload), content_type, self._clock()),
                message.mid,
                message.qos,
                self._connection,
            )
        )

    def _run(self) -> None:
        while True:
            batch, last = self._next_batch()
            if batch and not self._store(batch):
                return
            if last:
                return

    def _next_batch(self) -> tuple[list[_Arrived], bool]:
        """Return up to a batch, and whether it is the last."""
        first = self._arrived.get()
        if first is None:
            return [], True
        batch = [first]
        deadline = time.monotonic() + self._linger_s
        while len(batch) < self._batch:
            try:
                item = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                return batch, True
            batch.append(item)
        return batch, False

    def _store(self, batch: Sequence[_Arrived]) -> bool:
        """Store until it is stored, or given up; False when told to stop before that."""
        delay = RETRY_S[0]
        failures = 0
        written = Written()
        while failures < ATTEMPTS:
            try:
                written = self._writer.write([arrived.message for arrived in batch])
            except (OperationalError, InterfaceError) as error:
                log.warning("ingest.database_unavailable", extra={"facts": {"error": str(error)[:500]}})
            except Exception:
                failures += 1
                log.exception("ingest.failed", extra={"facts": {"messages": len(batch), "attempt": failures}})
            else:
                break
            if self._stopping.wait(delay):
                return False
            delay = min(delay * 2, RETRY_S[1])
        self.acks(written.acks)
        for arrived in batch:
            # a packet id belongs to its connection: after a reconnect the broker sends the message again
            if arrived.connection == self._connection:
                self._client.ack(arrived.mid, arrived.qos)
        return True


def _connect_properties() -> Properties:
    make = cast("Callable[[int], Properties]", Properties)  # paho leaves its constructor untyped
    properties = make(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = SESSION_S
    properties.ReceiveMaximum = RECEIVE_MAXIMUM
    return properties
