"""Tells devices over MQTT that their desired document changed. A lost hint costs one poll interval."""

from collections.abc import Callable

from contract.errors import PitheadError
from contract.messages import DesiredHint
from control_plane.ports import Publisher
from control_plane.services import desired
from control_plane.store.database import Database


class HintPublisher:
    """Publishes for every device that was not told yet, and marks it told when the broker has it."""

    def __init__(self, database: Database, hint: Callable[[str], DesiredHint], publisher: Publisher) -> None:
        self._database = database
        self._hint = hint
        self._publisher = publisher

    def tick(self) -> int:
        """Tell those that wait; return how many the broker took."""
        if not self._publisher.connected:
            return 0  # to make a hint costs a signature
        with self._database.reading() as tx:
            waiting = desired.dirty(tx, limit=200)
        if not waiting:
            return 0
        hints = []
        failure: PitheadError | None = None
        for device, _revision in waiting:
            try:
                hints.append(self._hint(device))
            except PitheadError as error:  # one device's trouble is not the others'
                failure = error
        taken = self._publisher.hints(hints)
        if taken:
            with self._database.transaction() as tx:
                for device, revision in waiting:
                    if device in taken:
                        desired.clear(tx, device, revision)
        if failure is not None:
            raise failure
        return len(taken)
