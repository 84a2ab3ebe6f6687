"""Devices, their certificates, and groups of them."""

from sqlmodel import Field, SQLModel

from control_plane.store.tables.columns import JSON_TEXT, MICROS


class Device(SQLModel, table=True):
    """A device as it enrolled, and the newest that it said of itself."""

    __tablename__ = "device"

    id: str = Field(primary_key=True, max_length=40)
    name: str = ""
    state: str = Field(default="active", index=True)
    hardware: str = "unknown"
    arch: str = "unknown"
    accelerators: str = Field(default='["cpu"]', sa_type=JSON_TEXT)
    agent_version: str = ""
    labels: str = Field(default="{}", sa_type=JSON_TEXT)
    enrolled_at: int = Field(sa_type=MICROS)
    enrolled_by: str = ""
    """Id of the join token."""
    key_hash: str = ""
    """SHA-256 of the public key with which it enrolled."""
    online: bool = False
    online_at: int | None = Field(default=None, sa_type=MICROS)
    """When ``online`` changed last, by this server's clock."""
    status_t: int | None = Field(default=None, sa_type=MICROS)
    boot_id: str = ""
    last_seen: int | None = Field(default=None, sa_type=MICROS)
    clock_skew_us: int | None = Field(default=None, sa_type=MICROS)
    """Receipt time less the device's time, of the newest record: skew and delay together."""
    reported: str | None = Field(default=None, sa_type=JSON_TEXT)
    reported_at: int | None = Field(default=None, sa_type=MICROS)
    reported_epoch: str = ""
    reported_seq: int = Field(default=0, sa_type=MICROS)
    health: str | None = Field(default=None, sa_type=JSON_TEXT)
    health_at: int | None = Field(default=None, sa_type=MICROS)
    health_epoch: str = ""
    health_seq: int = Field(default=0, sa_type=MICROS)


class DeviceCertificate(SQLModel, table=True):
    """A certificate that this control plane has issued."""

    __tablename__ = "device_certificate"

    serial: str = Field(primary_key=True)
    """Serial number in hex."""
    device_id: str = Field(foreign_key="device.id", index=True)
    issued_at: int = Field(sa_type=MICROS)
    expires_at: int = Field(sa_type=MICROS)
    revoked_at: int | None = Field(default=None, sa_type=MICROS)


class DeviceGroup(SQLModel, table=True):
    """A named label selector."""

    __tablename__ = "device_group"

    name: str = Field(primary_key=True)
    selector: str = Field(default="{}", sa_type=JSON_TEXT)
    """JSON object: a device belongs to the group when it has all of these labels."""
    description: str = ""
    created_at: int = Field(sa_type=MICROS)
