"""The supervisor's loop when parts of it fail: the rest goes on."""

import logging
from collections.abc import Callable, Iterator

import pytest

from agent.core import plan
from agent.core.standing import Standing
from agent.link.https import ServerAddress, UpdateServer
from agent.link.mqtt import BrokerAddress, MqttLink
from agent.service import events
from agent.service.children import Children
from agent.service.loop import Parts, Supervisor
from agent.service.updates import Poller
from contract.errors import PitheadError
from contract.messages import AssignmentState, Desired, PriorityClass
from tests.agent.bench import CLOCK, DEVICE, Assign, Bench, hello, product


@pytest.fixture
def supervisor(bench: Bench) -> Iterator[Supervisor]:
    """A supervisor whose turns a test makes; nothing is started."""
    link = MqttLink(
        BrokerAddress("127.0.0.1", 1), device=DEVICE, boot_id="boot", tls=None,
        on_event=bench.box.put, now=CLOCK.wall, fraction=lambda: 0.0,
    )  # fmt: skip
    server = UpdateServer(ServerAddress("127.0.0.1", 1), None)  # type: ignore[arg-type]
    yield Supervisor(
        Parts(
            layout=bench.layout,
            clock=CLOCK,
            fraction=lambda: 0.0,
            world=bench.world,
            outbox=bench.outbox,
            engine=bench.engine,
            children=Children(bench.layout, bench.box.put, server="https://127.0.0.1:1"),
            poller=Poller(server, bench.box.put, etag=None, poll_s=30.0, fraction=lambda: 0.0),
            link=link,
        ),
        bench.box,
    )
    link.stop()


def test_an_event_that_cannot_be_dealt_with_costs_no_other(
    bench: Bench,
    supervisor: Supervisor,
    assign: Assign,
    desire: Callable[..., Desired],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A lost ``Fetched`` would leave its model busy for ever."""
    wanted = assign("1.0.0")
    bench.world.take(desire(wanted), "e1")
    step = plan.Fetch(wanted)
    children = supervisor._parts.children
    children._begin(step)

    def broken(_event: events.EngineSaid) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(supervisor._intake, "said", broken)
    bench.box.put(events.EngineSaid(1, hello()))
    bench.box.put(events.Fetched(step, PitheadError("update.unreachable", "no route")))
    with caplog.at_level(logging.ERROR):
        supervisor._turn()
    assert [r.message for r in caplog.records] == ["supervisor.failed"]
    assert children.running("pump") is None
    assert bench.world.troubles[wanted.manifest_sha256] == ("update.unreachable", "no route")
    assert bench.records(PriorityClass.RECEIPT), "and the turn went on"


def test_an_outbox_that_is_damaged_in_a_turn_keeps_no_turn_from_its_end(
    bench: Bench,
    supervisor: Supervisor,
    assign: Assign,
    desire: Callable[..., Desired],
) -> None:
    bench.world.take(desire(assign("1.0.0")), "e1")
    bench.box.put(events.EngineSaid(1, hello()))
    for n in range(1, 1500):
        bench.box.put(events.EngineSaid(1, product(n)))
    supervisor._turn()
    assert len(bench.records(PriorityClass.ANOMALY)) == 1499
    bench.outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    bench.outbox._db.execute("PRAGMA shrink_memory")
    with bench.outbox.path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(4096)
        file.write(b"x" * (size - 4096))
    bench.box.put(events.EngineSaid(1, product(1500)))
    bench.world.desired = desire(assign("2.0.0"))
    supervisor._turn()
    assert len(bench.records(PriorityClass.ANOMALY)) == 1
    assert bench.outbox.health().lost["anomaly"] == 1499
    kinds = {type(r.body).__name__ for r in bench.records(PriorityClass.RECEIPT)}
    assert kinds == {"Receipt", "Reported"}, "what was lost with the outbox is said again"


def test_a_receipt_that_could_not_be_stored_is_owed(
    bench: Bench,
    supervisor: Supervisor,
    assign: Assign,
) -> None:
    reporter = supervisor._reporter
    bench.outbox._db.execute("PRAGMA query_only=ON")
    with pytest.raises(PitheadError, match=r"storage\.failed"):
        reporter.receipt(assign("1.0.0"), Standing(AssignmentState.PROBED))
    bench.outbox._db.execute("PRAGMA query_only=OFF")
    bench.world.desired = Desired(v=1, device=DEVICE, revision=1)
    supervisor._turn()
    first = bench.records(PriorityClass.RECEIPT)[0].body
    assert type(first).__name__ == "Receipt"
