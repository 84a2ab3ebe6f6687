"""Who may do what: roles, actions, and the tokens that prove a role."""

import base64
import hashlib
import logging
import secrets
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from contract.errors import PitheadError
from control_plane.ports import Clock
from control_plane.services import events
from control_plane.store import tokens as store
from control_plane.store.database import Database
from control_plane.store.ids import new_id

log = logging.getLogger(__name__)

PREFIX: Final = "pt1."
LAST_USED_GRAIN_US: Final = 60_000_000
"""``last_used`` is exact to a minute only, so that reading does not mean writing."""

_READ: Final = frozenset(
    {
        "devices:read",
        "groups:read",
        "models:read",
        "rollouts:read",
        "telemetry:read",
        "events:read",
    }
)
_OPERATE: Final = frozenset({"devices:write", "groups:write", "rollouts:write", "join-tokens:write"})
_ADMINISTER: Final = frozenset({"tokens:read", "tokens:write"})

ROLES: Final[Mapping[str, frozenset[str]]] = {
    "viewer": _READ,
    "operator": _READ | _OPERATE,
    "releaser": _READ | {"models:release"},
    "approver": _READ | {"rollouts:approve"},
    "admin": _READ | _OPERATE | _ADMINISTER | {"models:release", "rollouts:approve"},
}
"""The one table of roles and their actions."""

ACTIONS: Final = frozenset().union(*ROLES.values())


class Principal(msgspec.Struct, frozen=True):
    """Who calls: the name of the token and its roles."""

    name: str
    roles: frozenset[str]
    token_id: str

    def may(self, action: str) -> bool:
        """Whether one of the roles allows ``action``."""
        return any(action in ROLES.get(role, frozenset()) for role in self.roles)


class IssuedToken(msgspec.Struct, frozen=True):
    """A token just made. The secret is shown this once."""

    id: str
    name: str
    token: str
    roles: tuple[str, ...]
    expires_at: int | None


class Access:
    """Makes, checks and revokes API tokens."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def authenticate(self, token: str) -> Principal:
        """Return whose ``token`` it is, or raise ``auth.invalid``."""
        now = self._clock()
        with self._database.reading() as tx:
            found = store.api_token_by_hash(tx, hash_secret(token))
        if found is None:
            raise PitheadError("auth.invalid", "this API token is not known")
        if found.revoked_at is not None:
            raise PitheadError("auth.invalid", f"the API token {found.name!r} is revoked")
        if found.expires_at is not None and found.expires_at <= now:
            raise PitheadError("auth.invalid", f"the API token {found.name!r} has expired")
        if found.last_used is None or now - found.last_used > LAST_USED_GRAIN_US:
            self._touch(found.id, now)
        return Principal(name=found.name, roles=frozenset(found.roles), token_id=found.id)

    def _touch(self, token_id: str, now: int) -> None:
        """Note the use; who may read shall be able to while the disk is full, or the database read-only."""
        try:
            with self._database.transaction() as tx:
                store.touch_api_token(tx, token_id, now)
        except SQLAlchemyError as error:
            log.warning(
                "token.use_not_noted", extra={"facts": {"token": token_id, "error": str(error)[:200]}}
            )

    def authorise(self, principal: Principal, action: str) -> None:
        """Raise ``auth.forbidden`` unless ``principal`` may do ``action``."""
        if not principal.may(action):
            allowed = sorted(role for role, actions in ROLES.items() if action in actions)
            raise PitheadError(
                "auth.forbidden",
                f"{principal.name} may not {action}; roles that may: {', '.join(allowed)}",
                action=action,
            )

    def create(
        self, *, actor: str, name: str, roles: Iterable[str], ttl_s: float | None = None
    ) -> IssuedToken:
        """Make a token. Names are for people and need not be unique."""
        wanted = tuple(sorted(set(roles)))
        for role in wanted:
            if role not in ROLES:
                known = ", ".join(sorted(ROLES))
                raise PitheadError("request.invalid", f"roles: {role!r} is none of {known}")
        if not wanted:
            raise PitheadError("request.invalid", "roles: a token needs at least one role")
        now = self._clock()
        expires_at = None if ttl_s is None else now + round(ttl_s * 1_000_000)
        secret = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
        issued = IssuedToken(id=new_id(), name=name, token=secret, roles=wanted, expires_at=expires_at)
        with self._database.transaction() as tx:
            store.add_api_token(
                tx,
                store.ApiTokenRecord(
                    id=issued.id,
                    name=name,
                    roles=wanted,
                    created_at=now,
                    created_by=actor,
                    expires_at=expires_at,
                ),
                secret_hash=hash_secret(secret),
            )
            events.record(
                tx,
                actor=actor,
                kind="token.created",
                subject=issued.id,
                facts={"name": name, "roles": list(wanted), "expires_at": expires_at},
                t=now,
            )
        return issued

    def tokens(self) -> list[store.ApiTokenRecord]:
        """Return all tokens without their secrets."""
        with self._database.reading() as tx:
            return store.api_tokens(tx)

    def revoke(self, *, actor: str, token_id: str) -> None:
        """Make a token useless from now on; repeating it changes nothing."""
        now = self._clock()
        with self._database.transaction() as tx:
            if store.revoke_api_token(tx, token_id, now):
                events.record(tx, actor=actor, kind="token.revoked", subject=token_id, t=now)


def hash_secret(secret: str) -> str:
    """Return what is stored of a secret of 256 random bits; no salt is needed for such a one."""
    return hashlib.sha256(secret.encode()).hexdigest()
