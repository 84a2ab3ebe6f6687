"""From the outbox to the broker, and back to the outbox when the control plane has acknowledged."""

import logging
from collections.abc import Callable
from typing import Final

from agent.core.outbox import ORDER
from agent.link.mqtt import MqttLink
from agent.store.outbox import Outbox
from contract import codec, topics
from contract.messages import PROTOCOL_VERSION, Ack, PriorityClass

log = logging.getLogger(__name__)
BATCH_RECORDS: Final = 200
BATCH_BYTES: Final = 160 * 1024
WINDOW: Final = 1000
"""Records of one class that may be sent without being acknowledged."""
ACK_S: Final = 10.0
ACK_CAP_S: Final = 600.0


class _Lane:
    """How far one class is."""

    def __init__(self) -> None:
        self.sent = 0
        """Sequence number up to which records have been sent."""
        self.oldest = 0
        """The first of them that is not acknowledged; 0 for none."""
        self.since = 0.0
        """When it became the oldest."""
        self.patience = ACK_S


class Uplink:
    """Used by the loop alone. A record is sent again when no acknowledgement comes."""

    def __init__(self, outbox: Outbox, link: MqttLink, now: Callable[[], float]) -> None:
        self._outbox = outbox
        self._link = link
        self._now = now
        self._epoch = ""
        self._lanes: dict[PriorityClass, _Lane] = {}

    def pump(self) -> None:
        """Send what may be sent now, the most important class first."""
        if not self._link.online:
            return
        if self._epoch != self._outbox.epoch:
            self._epoch, self._lanes = self._outbox.epoch, {priority: _Lane() for priority in ORDER}
        for priority, lane in self._lanes.items():
            waiting, oldest = self._outbox.waiting(priority, lane.sent)
            waiting = self._late(priority, lane, waiting, oldest)
            while waiting < WINDOW and self._link.room:
                sent = self._send(priority, lane, WINDOW - waiting)
                if sent == 0:
                    break
                waiting += sent

    def _late(self, priority: PriorityClass, lane: _Lane, waiting: int, oldest: int) -> int:
        """Go back to the oldest record when it has waited too long; return how many are under way.

        The oldest counts, not the newest acknowledgement: what was lost on
        the way stays behind while later records get through.
        """
        if oldest != lane.oldest:
            lane.oldest, lane.since, lane.patience = oldest, self._now(), ACK_S
        if not waiting or self._now() - lane.since <= lane.patience:
            return waiting
        facts = {"class": priority.value, "records": waiting, "after_s": lane.patience}
        log.warning("uplink.not_acknowledged", extra={"facts": facts})
        lane.sent, lane.since = oldest - 1, self._now()
        lane.patience = min(lane.patience * 2, ACK_CAP_S)
        return 0

    def acknowledged(self, ack: Ack) -> None:
        """Delete what the control plane has stored, or refused for good."""
        if ack.v != PROTOCOL_VERSION or ack.device != self._outbox.device:
            log.warning("uplink.foreign_ack", extra={"facts": {"device": ack.device, "v": ack.v}})
            return
        for span in ack.acks:
            self._outbox.acknowledge(span)

    def _send(self, priority: PriorityClass, lane: _Lane, room: int) -> int:
        batch = self._outbox.unsent(priority, lane.sent, records=min(room, BATCH_RECORDS), size=BATCH_BYTES)
        if batch is None:
            return 0
        payload, content_type = codec.join_batch(batch.records)
        if not self._link.publish(topics.records(self._outbox.device, priority), payload, content_type):
            return 0
        lane.sent = batch.last
        return len(batch.records)
