"""Questions about what devices sent and what people did."""

from control_plane.store import events, telemetry
from control_plane.store.database import Database
from control_plane.store.telemetry import (
    AnomalyRecord,
    DeadLetterRecord,
    HealthRecord,
    ReceiptRecord,
    SummaryRecord,
    Window,
)


class Telemetry:
    """Answers with pages, the newest first."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def receipts(self, window: Window) -> list[ReceiptRecord]:
        """Return devices' steps towards versions."""
        with self._database.reading() as tx:
            return telemetry.receipts(tx, window)

    def anomalies(self, window: Window) -> list[AnomalyRecord]:
        """Return alarms."""
        with self._database.reading() as tx:
            return telemetry.anomalies(tx, window)

    def health(self, window: Window) -> list[HealthRecord]:
        """Return samples of devices' health."""
        with self._database.reading() as tx:
            return telemetry.health(tx, window)

    def summaries(self, window: Window) -> list[SummaryRecord]:
        """Return what models did, by bucket of time."""
        with self._database.reading() as tx:
            return telemetry.summaries(tx, window)

    def dead_letters(self, window: Window) -> list[DeadLetterRecord]:
        """Return what was refused."""
        with self._database.reading() as tx:
            return telemetry.dead_letters(tx, window)

    def events(
        self,
        *,
        since: int | None = None,
        until: int | None = None,
        kind: str | None = None,
        subject: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[events.EventRecord]:
        """Return what people and the control plane did."""
        with self._database.reading() as tx:
            return events.query(
                tx, since=since, until=until, kind=kind, subject=subject, before=before, limit=limit
            )
