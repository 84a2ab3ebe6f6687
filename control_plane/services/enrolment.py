"""How a device becomes one of ours: join tokens, and the exchange of one for an identity."""

import logging
from collections.abc import Mapping
from typing import Final, Protocol

import msgspec

from contract.bundle import EnrolRequest, EnrolResponse
from contract.errors import PitheadError
from control_plane.ports import Clock
from control_plane.services import events
from control_plane.services.devices import check_labels
from control_plane.store import devices, tokens
from control_plane.store.database import Database
from control_plane.store.ids import new_id
from control_plane.store.tokens import JoinTokenRecord
from provisioning import join_tokens, pki

log = logging.getLogger(__name__)

MAX_TTL_S: Final = 90 * 24 * 3600
MAX_USES: Final = 100_000


class TrustAnchors(Protocol):
    """Knows the first roots of both update repositories."""

    def first_roots(self) -> tuple[bytes, bytes]:
        """Return version 1 of the image root and of the director root."""


class IssuedJoinToken(msgspec.Struct, frozen=True):
    """A join token just made. The token itself is shown this once."""

    id: str
    token: str
    labels: dict[str, str]
    expires_at: int
    max_uses: int


class Enrolment:
    """Makes join tokens and takes them."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        *,
        device_authority: pki.Authority,
        server_authority: pki.Authority,
        anchors: TrustAnchors,
        broker: tuple[str, int],
        certificate_days: int,
    ) -> None:
        self._database = database
        self._clock = clock
        self._devices = device_authority
        self._server = server_authority
        self._anchors = anchors
        self._broker = broker
        self._days = certificate_days

    def server_ca(self) -> bytes:
        """Return the server authority's certificate (PEM), which a join token names."""
        return self._server.pem

    def create_token(
        self,
        *,
        actor: str,
        labels: Mapping[str, str] | None = None,
        ttl_s: float = 24 * 3600,
        max_uses: int = 1,
        description: str = "",
    ) -> IssuedJoinToken:
        """Make a token for ``max_uses`` devices, which all get ``labels``."""
        if not 0 < ttl_s <= MAX_TTL_S:
            raise PitheadError("request.invalid", f"ttl_s: must be above 0 and at most {MAX_TTL_S}")
        if not 1 <= max_uses <= MAX_USES:
            raise PitheadError("request.invalid", f"max_uses: must be 1 to {MAX_USES}")
        wanted = check_labels(labels or {})
        now = self._clock()
        token = join_tokens.create(self._server.der)
        record = JoinTokenRecord(
            id=new_id(),
            description=description,
            labels=wanted,
            created_at=now,
            created_by=actor,
            expires_at=now + round(ttl_s * 1_000_000),
            max_uses=max_uses,
        )
        with self._database.transaction() as tx:
            tokens.add_join_token(tx, record, secret_hash=token.secret_hash)
            events.record(
                tx,
                actor=actor,
                kind="join_token.created",
                subject=record.id,
                facts={"labels": wanted, "max_uses": max_uses, "expires_at": record.expires_at},
                t=now,
            )
        return IssuedJoinToken(
            id=record.id, token=str(token), labels=wanted, expires_at=record.expires_at, max_uses=max_uses
        )

    def tokens(self) -> list[JoinTokenRecord]:
        """Return all join tokens without their secrets."""
        with self._database.reading() as tx:
            return tokens.join_tokens(tx)

    def revoke_token(self, *, actor: str, token_id: str) -> None:
        """Make a join token useless; devices that enrolled with it stay."""
        now = self._clock()
        with self._database.transaction() as tx:
            if tokens.revoke_join_token(tx, token_id, now):
                events.record(tx, actor=actor, kind="join_token.revoked", subject=token_id, t=now)

    def enrol(self, request: EnrolRequest) -> EnrolResponse:
        """Take one use of a token and issue an identity for the key of the request.

        A device that lost the answer may repeat its request with the same
        key: it gets a new certificate for the same id, and no second use is
        taken. Raises ``enrol.csr_invalid`` (nothing is taken then) and
        ``enrol.token_invalid``, ``_used``, ``_expired``.
        """
        key = pki.read_request(request.csr)
        key_hash = pki.key_hash(key)
        secret_hash = join_tokens.parse(request.token).secret_hash
        image_root, director_root = self._anchors.first_roots()
        now = self._clock()
        with self._database.transaction() as tx:
            token = tokens.join_token_by_hash(tx, secret_hash)
            if token is None:
                raise PitheadError("enrol.token_invalid", "this server never made this token")
            device_id = devices.enrolled_with(tx, token.id, key_hash)
            again = device_id is not None
            if token.expires_at <= now:
                raise PitheadError(
                    "enrol.token_expired", f"it expired at {pki.moment(token.expires_at).isoformat()}"
                )
            if token.revoked_at is not None:
                raise PitheadError("enrol.token_invalid", "it is revoked")
            if device_id is None:
                if not tokens.take_join_token(tx, token.id, now):
                    raise PitheadError("enrol.token_used", f"all {token.max_uses} uses are taken")
                device_id = pki.new_device_id()
                devices.add_device(
                    tx,
                    device_id=device_id,
                    name=request.facts.name,
                    hardware=request.facts.hardware,
                    arch=request.facts.arch,
                    accelerators=request.facts.accelerators,
                    agent_version=request.facts.agent_version,
                    labels=token.labels,
                    enrolled_by=token.id,
                    key_hash=key_hash,
                    now=now,
                )
            issued = pki.issue_device(self._devices, key, device_id, pki.moment(now), self._days)
            devices.add_certificate(
                tx,
                devices.CertificateRecord(
                    serial=issued.serial,
                    device_id=device_id,
                    issued_at=now,
                    expires_at=round(issued.not_after.timestamp() * 1_000_000),
                ),
            )
            events.record(
                tx,
                actor=f"join-token {token.id}",
                kind="device.enrolled",
                subject=device_id,
                facts={"name": request.facts.name, "serial": issued.serial, "again": again},
                t=now,
            )
        log.info("device.enrolled", extra={"facts": {"device": device_id, "again": again}})
        return EnrolResponse(
            device=device_id,
            certificate=(issued.pem + self._devices.pem).decode(),
            server_ca=self._server.pem.decode(),
            image_root=image_root,
            director_root=director_root,
            broker_host=self._broker[0],
            broker_port=self._broker[1],
            time=now,
        )
