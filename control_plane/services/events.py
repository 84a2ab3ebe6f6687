"""The record of what people and the control plane did."""

import time
from collections.abc import Mapping

from sqlmodel import Session

from control_plane.store import events as store


def record(
    tx: Session,
    *,
    actor: str,
    kind: str,
    subject: str,
    facts: Mapping[str, object] | None = None,
    t: int | None = None,
) -> None:
    """Append an event in the caller's transaction, so that it stands exactly when the deed does.

    ``kind`` is a stable name such as ``rollout.halted``; ``actor`` a token's
    name, or ``system``; ``facts`` must be JSON values; ``t`` is now by default.
    """
    store.append(
        tx,
        t=time.time_ns() // 1000 if t is None else t,
        actor=actor,
        kind=kind,
        subject=subject,
        facts=facts or {},
    )
