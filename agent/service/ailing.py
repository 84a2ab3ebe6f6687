"""What of a device does not do what it should, in the words of its health message."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from agent.ports import LaneState, ServeState, SinkState
from agent.service import bypass
from contract.messages import MAX_LISTED, Ailing, Bypass

LABEL: Final = 200
TEXT: Final = 2000
Signature = tuple[bool, frozenset[tuple[str, str, str, str | None]]]


def ailing(lanes: Iterable[LaneState], serve: ServeState | None = None) -> tuple[Ailing, ...]:
    """Return the lanes, sources, sinks and pipelines that do not work, and the sinks that have lost messages.

    A sink that is bypassed is no trouble of its own: ``told`` says why.
    """
    found = [each for lane in lanes for each in _of_lane(lane)]
    found += [
        Ailing(each.name, "pipeline", "failed", code="serve.not_ready", detail=each.detail)
        for each in (() if serve is None else serve.pipelines)
        if each.detail
    ]
    return tuple(sorted(found, key=lambda each: (each.lane, each.what, each.sink)))[:MAX_LISTED]


def told(path: Path) -> Bypass | None:
    """Return the bypass that is on as the fleet is told of it, or None.

    Of a file that somebody made without ``pithead-agent`` its age tells since when.
    """
    found = bypass.read(path)
    if found is None:
        return None
    return Bypass(bypass.since_us(found, path), _clean(found.who, LABEL), _clean(found.why, TEXT))


def signature(stopped: Bypass | None, found: Iterable[Ailing]) -> Signature:
    """Return what makes health worth sending before its time; counts do not."""
    return stopped is not None, frozenset((each.lane, each.sink, each.state, each.code) for each in found)


def _of_lane(lane: LaneState) -> Iterator[Ailing]:
    if lane.code is not None:
        source = lane.code.startswith("source.")
        yield Ailing(
            lane.lane, "source" if source else "lane", lane.state, code=lane.code, detail=lane.detail
        )
    if lane.machine == "unknown":
        detail = lane.muted or "its state is not known, so nothing is muted"
        yield Ailing(lane.lane, "machine", "unknown", detail=detail)
    for sink in lane.sinks:
        if sink.state == "failed" or sink.lost:
            yield _of_sink(lane.lane, sink)


def _of_sink(lane: str, sink: SinkState) -> Ailing:
    return Ailing(
        lane,
        "sink",
        sink.state,
        sink=_clean(sink.name, LABEL),
        kind=_clean(sink.kind, LABEL),
        code=sink.code,
        detail=sink.detail,
        waiting=sink.waiting,
        lost=sink.lost,
    )


def _clean(text: str, most: int) -> str:
    """Return a text that the control plane takes, whoever wrote it."""
    return text.replace("\0", "")[:most]
