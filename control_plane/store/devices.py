"""Queries on devices, their certificates and groups."""

from collections.abc import Collection, Mapping
from typing import Final

import msgspec
from sqlalchemy import func, not_, or_, update
from sqlmodel import Session, col, select

from contract.errors import PitheadError
from contract.messages import Health, Reported
from control_plane.store.tables.device import Device, DeviceCertificate, DeviceGroup

Labels = dict[str, str]

CHUNK: Final = 500
"""Devices read at once while looking for those with some labels."""

TROUBLE: Final = ('"bypass":{', '"ailing":[')
"""Stand in a health document that tells of trouble; within a text its quotes would be escaped."""


class DeviceRecord(msgspec.Struct, frozen=True):
    """A device as it is known here."""

    id: str
    name: str
    state: str
    hardware: str
    arch: str
    accelerators: tuple[str, ...]
    agent_version: str
    labels: Labels
    enrolled_at: int
    online: bool
    online_at: int | None
    last_seen: int | None
    clock_skew_us: int | None
    reported: Reported | None
    reported_at: int | None
    health: Health | None
    health_at: int | None


class CertificateRecord(msgspec.Struct, frozen=True):
    """A device's certificate."""

    serial: str
    device_id: str
    issued_at: int
    expires_at: int
    revoked_at: int | None = None


class GroupRecord(msgspec.Struct, frozen=True):
    """A named label selector."""

    name: str
    selector: Labels
    description: str
    created_at: int


_labels = msgspec.json.Decoder(Labels)
_names = msgspec.json.Decoder(tuple[str, ...])
_reported = msgspec.json.Decoder(Reported)
_health = msgspec.json.Decoder(Health)


def add_device(
    tx: Session,
    *,
    device_id: str,
    name: str,
    hardware: str,
    arch: str,
    accelerators: Collection[str],
    agent_version: str,
    labels: Mapping[str, str],
    enrolled_by: str,
    key_hash: str,
    now: int,
) -> None:
    """Add a device that has just enrolled."""
    tx.add(
        Device(
            id=device_id,
            name=name,
            hardware=hardware,
            arch=arch,
            accelerators=_json(tuple(accelerators)),
            agent_version=agent_version,
            labels=_json(dict(labels)),
            enrolled_at=now,
            enrolled_by=enrolled_by,
            key_hash=key_hash,
        )
    )
    tx.flush()


def add_certificate(tx: Session, record: CertificateRecord) -> None:
    """Note a certificate that was issued."""
    tx.add(DeviceCertificate(**msgspec.structs.asdict(record)))


def certificate(tx: Session, serial: str) -> CertificateRecord | None:
    """Return the certificate with this serial number."""
    row = tx.get(DeviceCertificate, serial)
    return None if row is None else _certificate(row)


def revoke_certificates(tx: Session, device_id: str, now: int) -> None:
    """Revoke all certificates of a device and the device itself."""
    tx.execute(
        update(DeviceCertificate)
        .where(col(DeviceCertificate.device_id) == device_id, col(DeviceCertificate.revoked_at).is_(None))
        .values(revoked_at=now)
    )
    tx.execute(update(Device).where(col(Device.id) == device_id).values(state="revoked", online=False))


def revoked_certificates(tx: Session, now: int) -> list[CertificateRecord]:
    """Return the revoked certificates that have not expired."""
    statement = select(DeviceCertificate).where(
        col(DeviceCertificate.revoked_at).is_not(None), col(DeviceCertificate.expires_at) > now
    )
    return [_certificate(row) for row in tx.exec(statement)]


def revoked_devices(tx: Session, now: int) -> list[str]:
    """Return the revoked devices of which a certificate has not expired."""
    statement = select(Device.id).where(
        col(Device.state) == "revoked",
        col(Device.id).in_(
            select(DeviceCertificate.device_id).where(col(DeviceCertificate.expires_at) > now)
        ),
    )
    return list(tx.exec(statement))


def enrolled_with(tx: Session, token_id: str, key_hash: str) -> str | None:
    """Return the device that enrolled with this token and this key."""
    statement = select(Device.id).where(
        col(Device.enrolled_by) == token_id, col(Device.key_hash) == key_hash, col(Device.state) == "active"
    )
    return tx.exec(statement).first()


def device(tx: Session, device_id: str) -> DeviceRecord:
    """Return a device; ``request.not_found`` when there is none."""
    row = tx.get(Device, device_id)
    if row is None:
        raise PitheadError("request.not_found", f"no device {device_id}")
    return _device(row)


def devices(
    tx: Session,
    *,
    labels: Mapping[str, str] | None = None,
    state: str | None = None,
    online: bool | None = None,
    name: str | None = None,
    troubled: bool | None = None,
    after: str = "",
    limit: int | None = None,
) -> list[DeviceRecord]:
    """Return devices in the order of their ids, those that have all of ``labels``.

    ``troubled`` are those whose newest health tells of a bypass or of something that ails.
    """
    statement = select(Device).order_by(col(Device.id)).limit(CHUNK)
    if state is not None:
        statement = statement.where(col(Device.state) == state)
    if online is not None:
        statement = statement.where(col(Device.online).is_(online))
    if name is not None:
        statement = statement.where(col(Device.name) == name)
    if troubled is not None:
        health = func.coalesce(col(Device.health), "")
        tells = or_(*(health.contains(part, autoescape=True) for part in TROUBLE))
        statement = statement.where(tells if troubled else not_(tells))
    found: list[DeviceRecord] = []
    while True:
        rows = tx.exec(statement.where(col(Device.id) > after)).all()
        for row in rows:
            if not labels or matches(_labels.decode(row.labels), labels):
                found.append(_device(row))
                if limit is not None and len(found) >= limit:
                    return found
        if len(rows) < CHUNK:
            return found
        after = rows[-1].id


def set_labels(tx: Session, device_id: str, labels: Mapping[str, str]) -> None:
    """Replace a device's labels."""
    tx.execute(update(Device).where(col(Device.id) == device_id).values(labels=_json(dict(labels))))


def set_name(tx: Session, device_id: str, name: str) -> None:
    """Rename a device; its id stays."""
    tx.execute(update(Device).where(col(Device.id) == device_id).values(name=name))


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether ``labels`` has all of ``selector``. An empty selector matches every device."""
    return all(labels.get(name) == value for name, value in selector.items())


def put_group(tx: Session, record: GroupRecord, *, replace: bool) -> None:
    """Store a group.

    Raises ``request.conflict`` for one that is there already and
    ``request.not_found`` for one that is not, as ``replace`` asks.
    """
    row = tx.get(DeviceGroup, record.name)
    if row is not None and not replace:
        raise PitheadError("request.conflict", f"there is a group {record.name} already")
    if row is None:
        if replace:
            raise PitheadError("request.not_found", f"no group {record.name}")
        tx.add(
            DeviceGroup(
                name=record.name,
                selector=_json(record.selector),
                description=record.description,
                created_at=record.created_at,
            )
        )
    else:
        row.selector = _json(record.selector)
        row.description = record.description
    tx.flush()


def group(tx: Session, name: str) -> GroupRecord:
    """Return a group; ``request.not_found`` when there is none."""
    row = tx.get(DeviceGroup, name)
    if row is None:
        raise PitheadError("request.not_found", f"no group {name}")
    return _group(row)


def groups(tx: Session) -> list[GroupRecord]:
    """Return all groups by name."""
    return [_group(row) for row in tx.exec(select(DeviceGroup).order_by(col(DeviceGroup.name)))]


def delete_group(tx: Session, name: str) -> None:
    """Delete a group; ``request.not_found`` when there is none. Its devices stay as they are."""
    row = tx.get(DeviceGroup, name)
    if row is None:
        raise PitheadError("request.not_found", f"no group {name}")
    tx.delete(row)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _group(row: DeviceGroup) -> GroupRecord:
    return GroupRecord(
        name=row.name,
        selector=_labels.decode(row.selector),
        description=row.description,
        created_at=row.created_at,
    )


def _certificate(row: DeviceCertificate) -> CertificateRecord:
    return CertificateRecord(
        serial=row.serial,
        device_id=row.device_id,
        issued_at=row.issued_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )


def _device(row: Device) -> DeviceRecord:
    return DeviceRecord(
        id=row.id,
        name=row.name,
        state=row.state,
        hardware=row.hardware,
        arch=row.arch,
        accelerators=_names.decode(row.accelerators),
        agent_version=row.agent_version,
        labels=_labels.decode(row.labels),
        enrolled_at=row.enrolled_at,
        online=row.online,
        online_at=row.online_at,
        last_seen=row.last_seen,
        clock_skew_us=row.clock_skew_us,
        reported=None if row.reported is None else _reported.decode(row.reported),
        reported_at=row.reported_at,
        health=None if row.health is None else _health.decode(row.health),
        health_at=row.health_at,
    )
