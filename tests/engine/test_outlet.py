import logging

import msgspec
import pytest

from agent.core.frames import FrameReader
from agent.engine.clock import Clock
from agent.engine.outlet import Outlet
from agent.ports import FitResult, Fitted, FromEngine, LaneState, Product
from contract.messages import Anomaly

DECODER = msgspec.msgpack.Decoder(FromEngine)


def outlet(**limits: int) -> Outlet:
    return Outlet(Clock(wall=lambda: 5, mono=lambda: 10**9), lambda: None, **limits)


def anomaly(i: int) -> Anomaly:
    return Anomaly(model_name="m", version="1.0.0", t=i, score=1.0, threshold=0.5)


def taken(one: Outlet, room: int = 1 << 20) -> list[FromEngine]:
    return [DECODER.decode(p) for p in FrameReader().feed(one.take(room))]


def numbers(messages: list[FromEngine]) -> list[int]:
    return [m.n for m in messages if isinstance(m, Product)]


def test_products_are_numbered_sent_once_and_again_after_a_rewind():
    one = outlet()
    one.products([anomaly(1), anomaly(2)])
    assert numbers(taken(one)) == [1, 2]
    one.products([anomaly(3)])
    assert numbers(taken(one)) == [3]
    one.stored(1)
    one.rewind()
    assert numbers(taken(one)) == [2, 3]
    one.stored(99)
    assert one.waiting == 0
    one.products([anomaly(4)])
    assert numbers(taken(one)) == [4]


def test_no_more_is_taken_than_there_is_room_for():
    one = outlet()
    one.products([anomaly(i) for i in range(10)])
    first = numbers(taken(one, 100))
    assert 0 < len(first) < 10
    seen = first
    while more := numbers(taken(one, 100)):
        seen += more
    assert seen == list(range(1, 11))
    assert numbers(taken(one, 0)) == []


@pytest.mark.parametrize("limits", [{"max_products": 4}, {"max_bytes": 400}])
def test_the_oldest_are_given_up_counted_and_logged(limits: dict[str, int], caplog: pytest.LogCaptureFixture):
    one = outlet(**limits)
    with caplog.at_level(logging.WARNING):
        one.products([anomaly(i) for i in range(10)])
    kept = numbers(taken(one))
    assert kept == list(range(11 - len(kept), 11))
    assert one.lost == 10 - len(kept) > 0
    (record,) = [r for r in caplog.records if r.message == "engine.products_lost"]
    assert record.__dict__["facts"]["total"] == one.lost


def test_only_the_last_state_of_a_lane_counts_and_fits_stay_until_they_are_known():
    one = outlet()
    states = [LaneState(lane="a", model_name="m", state=s) for s in ("loading", "running")]
    fit = Fitted(lane="a", digest="0" * 64, fit=FitResult((0.0,), (1.0,), 1.0, 9, 0))
    for state in states:
        one.state(state)
    one.fitted(fit)
    assert taken(one) == [states[1], fit]
    assert taken(one) == []
    one.rewind()
    assert taken(one) == [fit, states[1]]
    one.forget_fit("a")
    one.rewind()
    assert taken(one) == [states[1]]
    one.forget_lane("a")
    one.rewind()
    assert taken(one) == []
