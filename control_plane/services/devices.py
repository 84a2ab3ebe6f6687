"""Devices and groups: what is known of them, and what an operator may change."""

import re
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from contract.errors import PitheadError
from contract.messages import Desired
from control_plane.ports import Clock
from control_plane.services import desired, events
from control_plane.store import devices as store
from control_plane.store import telemetry
from control_plane.store.database import Database
from control_plane.store.devices import DeviceRecord, GroupRecord
from provisioning import pki

MAX_LABELS: Final = 32
LABEL_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._/-]{0,62}")
LABEL_VALUE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
GROUP_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
RECENT_RECEIPTS: Final = 20


class DeviceDetail(msgspec.Struct, frozen=True):
    """All that is known of one device."""

    device: DeviceRecord
    desired: Desired
    receipts: list[telemetry.ReceiptRecord]
    summaries: list[telemetry.SummaryRecord]
    """The newest of each model and source."""


class Devices:
    """Use cases on devices and groups.

    ``revoked`` is called with the id of a device that was just revoked, and
    says whether the broker has shut it out already. It never raises.
    """

    def __init__(
        self, database: Database, clock: Clock, *, revoked: Callable[[str], bool] = lambda _device: True
    ) -> None:
        self._database = database
        self._clock = clock
        self._revoked = revoked

    def identify(self, certificate: bytes) -> str:
        """See ``api.auth.Identities``."""
        device_id, serial = pki.device_of(certificate)
        with self._database.reading() as tx:
            found = store.certificate(tx, serial)
        if found is None or found.device_id != device_id:
            raise PitheadError("auth.invalid", "this server never issued this certificate")
        if found.revoked_at is not None:
            raise PitheadError("identity.revoked", f"the certificate {serial} of {device_id} is revoked")
        return device_id

    def page(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        group: str | None = None,
        state: str | None = None,
        online: bool | None = None,
        name: str | None = None,
        troubled: bool | None = None,
        after: str = "",
        limit: int = 100,
    ) -> list[DeviceRecord]:
        """Return a page of devices in the order of their ids."""
        with self._database.reading() as tx:
            selector = dict(labels or {})
            if group is not None:
                selector |= store.group(tx, group).selector
            return store.devices(
                tx,
                labels=selector,
                state=state,
                online=online,
                name=name,
                troubled=troubled,
                after=after,
                limit=limit,
            )

    def detail(self, device_id: str) -> DeviceDetail:
        """Return all that is known of a device."""
        with self._database.reading() as tx:
            return DeviceDetail(
                device=store.device(tx, device_id),
                desired=desired.read(tx, device_id),
                receipts=telemetry.receipts(tx, telemetry.Window(device=device_id, limit=RECENT_RECEIPTS)),
                summaries=telemetry.newest_summaries(tx, device_id),
            )

    def change(
        self,
        *,
        actor: str,
        device_id: str,
        labels: Mapping[str, str | None] | None = None,
        name: str | None = None,
    ) -> DeviceRecord:
        """Merge ``labels`` (None takes one away) and rename."""
        with self._database.transaction() as tx:
            before = store.device(tx, device_id)
            if labels is not None:
                merged = {k: v for k, v in {**before.labels, **labels}.items() if v is not None}
                store.set_labels(tx, device_id, check_labels(merged))
            if name is not None:
                store.set_name(tx, device_id, name)
            events.record(
                tx,
                actor=actor,
                kind="device.changed",
                subject=device_id,
                facts={"labels": dict(labels or {}), "name": name},
                t=self._clock(),
            )
            tx.expire_all()
            return store.device(tx, device_id)

    def revoke(self, *, actor: str, device_id: str) -> bool:
        """Take a device's identity away; whether the broker has shut it out already.

        It may enrol again with a new join token.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            store.device(tx, device_id)
            store.revoke_certificates(tx, device_id, now)
            events.record(tx, actor=actor, kind="device.revoked", subject=device_id, t=now)
        return self._revoked(device_id)

    def revoked(self) -> list[str]:
        """Return the revoked devices that have a certificate which would be good but for that."""
        with self._database.reading() as tx:
            return store.revoked_devices(tx, self._clock())

    def revocations(self) -> list[pki.Revocation]:
        """Return what stands on the revocation list."""
        with self._database.reading() as tx:
            revoked = store.revoked_certificates(tx, self._clock())
        return [pki.Revocation(entry.serial, pki.moment(entry.revoked_at or 0)) for entry in revoked]

    def groups(self) -> list[GroupRecord]:
        """Return all groups."""
        with self._database.reading() as tx:
            return store.groups(tx)

    def group(self, name: str) -> GroupRecord:
        """Return one group."""
        with self._database.reading() as tx:
            return store.group(tx, name)

    def put_group(
        self, *, actor: str, name: str, selector: Mapping[str, str], description: str, replace: bool
    ) -> GroupRecord:
        """Make a group, or ``replace`` one."""
        if GROUP_NAME.fullmatch(name) is None:
            raise PitheadError("request.invalid", "name: up to 63 of a-z, 0-9 and '-'")
        record = GroupRecord(name, check_labels(selector, "selector"), description, self._clock())
        with self._database.transaction() as tx:
            store.put_group(tx, record, replace=replace)
            events.record(
                tx,
                actor=actor,
                kind="group.changed" if replace else "group.created",
                subject=name,
                facts={"selector": record.selector},
                t=record.created_at,
            )
            return store.group(tx, name)

    def delete_group(self, *, actor: str, name: str) -> None:
        """Delete a group. Its devices stay as they are."""
        with self._database.transaction() as tx:
            store.delete_group(tx, name)
            events.record(tx, actor=actor, kind="group.deleted", subject=name, t=self._clock())


def check_labels(labels: Mapping[str, str], field: str = "labels") -> dict[str, str]:
    """Return ``labels``, or raise ``request.invalid`` naming the wrong one of ``field``."""
    if len(labels) > MAX_LABELS:
        raise PitheadError("request.invalid", f"{field}: at most {MAX_LABELS}")
    for name, value in labels.items():
        if LABEL_NAME.fullmatch(name) is None:
            raise PitheadError("request.invalid", f"{field}: {name!r} is not a label (a-z, 0-9 and ._/-)")
        if LABEL_VALUE.fullmatch(value) is None:
            raise PitheadError(
                "request.invalid", f"{field}.{name}: {value!r} is not a value (A-Z, a-z, 0-9 and ._/-)"
            )
    return dict(labels)
