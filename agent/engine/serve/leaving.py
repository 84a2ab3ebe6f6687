"""What leaves memory, and how: it answers what it has admitted, and is freed where nobody waits."""

from collections.abc import Iterable, Iterator

from agent.engine.serve.background import Background
from agent.engine.serve.entries import Version
from agent.engine.serve.opening import Opened
from agent.engine.serve.served import Live


class Leaving:
    """What serves no more, and has not answered yet all that it admitted. On the loop's thread only."""

    def __init__(self) -> None:
        self._held: set[Live] = set()
        self._closer = Background("closer")

    def __iter__(self) -> Iterator[Live]:
        return iter(tuple(self._held))

    def take(self, live: Live) -> None:
        """Free a session when its last answer is given."""
        self._held.add(live)
        live.retire(self._free)

    def free(self, opened: Opened) -> None:
        """Free a session that has never served."""
        self._closer.do(opened.session.close)

    def stop(self) -> None:
        """Free no more."""
        self._closer.stop(0.0)

    def _free(self, live: Live) -> None:
        self._held.discard(live)
        if not live.runner.lost:
            self.free(live.opened)


def least_needed(versions: Iterable[Version], budget: int, newcomer: Live | None) -> list[Version]:
    """Return what is to leave memory for the rest to keep to ``budget`` bytes: least recently used first.

    What answers somebody stays, and so does ``newcomer``, or else what was used last.
    """
    there = [(version.live, version) for version in versions if version.live is not None]
    there.sort(key=lambda pair: pair[0].last_used_ns)
    used = sum(live.all_bytes for live, _ in there)
    if newcomer is None and there:
        newcomer = there[-1][0]
    leaving: list[Version] = []
    for live, version in there:
        if used <= budget:
            break
        if live is not newcomer and not live.in_flight:
            used -= live.all_bytes
            leaving.append(version)
    return leaving
