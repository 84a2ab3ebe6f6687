"""Messages as devices send them."""

from typing import Any

import msgspec

from contract import topics
from contract.codec import encode_batch
from contract.messages import (
    Anomaly,
    AssignmentState,
    Body,
    Envelope,
    Health,
    ModelSummary,
    OutboxHealth,
    PriorityClass,
    Receipt,
    Reported,
)
from contract.sketch import SketchBuilder
from control_plane.ingest.decode import Inbound
from control_plane.store import devices
from control_plane.store.database import Database

DEVICE = "device-one"
OTHER = "device-two"
NOW = 1_790_000_000_000_000


def add_device(database: Database, device: str) -> None:
    """Enrol a device without ceremony."""
    with database.transaction() as tx:
        devices.add_device(
            tx,
            device_id=device,
            name="",
            hardware="x",
            arch="x",
            accelerators=("cpu",),
            agent_version="",
            labels={},
            enrolled_by="test",
            key_hash=device,
            now=NOW,
        )


def receipt(state: AssignmentState = AssignmentState.CONFIRMED, **fields: Any) -> Receipt:
    return Receipt(model_name="shuttle", version="1.0.0", state=state, **fields)


def anomaly(score: float = 2.0, **fields: Any) -> Anomaly:
    return Anomaly(
        model_name="shuttle",
        version="1.0.0",
        t=NOW,
        score=score,
        threshold=1.0,
        contributions={"f1": 1.0},
        **fields,
    )


def health(**fields: Any) -> Health:
    return Health(
        uptime_s=1.0,
        cpu_percent=2.0,
        memory_percent=3.0,
        agent_pss_bytes=4,
        disk_free_bytes=5,
        outbox=OutboxHealth(records=0, bytes=0),
        **fields,
    )


def summary(**fields: Any) -> ModelSummary:
    sketch = SketchBuilder()
    for value in range(1, 101):
        sketch.add(float(value))
    return ModelSummary(
        model_name="shuttle",
        version="1.0.0",
        bucket_start=NOW,
        bucket_s=60.0,
        count=100,
        muted=7,
        latency_us=sketch.build(),
        **fields,
    )


CLASS_OF = {
    Receipt: PriorityClass.RECEIPT,
    Reported: PriorityClass.RECEIPT,
    Anomaly: PriorityClass.ANOMALY,
    Health: PriorityClass.HEALTH,
    ModelSummary: PriorityClass.SUMMARY,
}


def envelope(body: Body, seq: int, device: str = DEVICE, epoch: str = "e1", **fields: Any) -> Envelope:
    values: dict[str, Any] = {
        "v": 1,
        "priority": CLASS_OF[type(body)],
        "boot_id": "b",
        "t_wall": NOW - 1000,
        "t_mono": 1,
        **fields,
    }
    return Envelope(device=device, epoch=epoch, seq=seq, body=body, **values)


def message(
    envelopes: list[Envelope], device: str = DEVICE, priority: PriorityClass | None = None
) -> Inbound:
    payload, content_type = encode_batch(envelopes)
    return Inbound(topics.records(device, priority or envelopes[0].priority), payload, content_type, NOW)


def raw(
    payload: bytes,
    device: str = DEVICE,
    priority: PriorityClass = PriorityClass.ANOMALY,
    content_type: str | None = None,
) -> Inbound:
    return Inbound(topics.records(device, priority), payload, content_type, NOW)


def plain(one: Envelope, **changes: Any) -> dict[str, Any]:
    """Return an envelope as JSON values, with some of them changed."""
    values: dict[str, Any] = msgspec.to_builtins(one)
    return {**values, **changes}
