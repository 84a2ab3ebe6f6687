"""What plants, people and third parties do wrong to sinks, and what must not come of it."""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from asyncua import ua

from agent.engine import plugins, sinks
from agent.engine.sinks.base import Outputs
from agent.engine.sinks.tray import Tray
from agent.engine.sinks.worker import ControlWorker, MessageWorker, Worker
from agent.service import bypass
from agent.store import durable
from contract.errors import PitheadError
from tests.engine.conftest import until
from tests.engine.test_mqtt import CLOCK, Broker
from tests.engine.test_sinks import FIRST, Hook
from tests.engine.test_source_modbus import Plc
from tests.engine.test_source_opcua import URI, Machine

SAFE = {"safe": 9, "on": 2, "off": 1, "refresh_s": 0.05}


class Wire:
    """A third party's sink that does as it is told; ``calls`` is all that came."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fails: list[BaseException] = []
        self.answer: Any = 0
        self.held = threading.Event()
        self.held.set()

    def send(self, messages: Any) -> Any:
        self.calls.append(list(messages))
        return self.answer

    def write(self, outputs: Outputs) -> None:
        self.held.wait(20)
        if self.fails:
            raise self.fails.pop()
        self.calls.append(outputs.alarm)

    def close(self) -> None: ...


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Wire]]:
    """Make ``wire`` a kind of sink, of a module with the given attributes."""

    def made(**attributes: Any) -> Wire:
        wire, module = Wire(), ModuleType("wire")
        vars(module).update({"open_sink": lambda _: wire} | attributes)
        found = {"wire": module}
        monkeypatch.setattr(plugins, "load_sink", found.get)
        return wire

    return made


@pytest.fixture
def running() -> Iterator[Callable[[Worker], Any]]:
    held: list[Worker] = []

    def started(one: Worker) -> Any:
        held.append(one)
        one.start()
        return one

    yield started
    for one in held:
        one.stop()
    assert all(one.join(10) for one in held)


# ---- third parties


@pytest.mark.parametrize(
    "attributes",
    [{"check": lambda *_: {}["no"]}, {"SETTINGS": object()}, {"SETTINGS": 7, "CONTROL": True}],
    ids=["check raises", "settings are none", "settings are a number"],
)
def test_a_sink_that_cannot_be_planned_is_refused_alone(
    third_party: Callable[..., Wire], attributes: dict[str, Any], tmp_path: Path
):
    third_party(**attributes)
    tray = Tray("one", CLOCK)
    try:
        tray.configure([{"kind": "wire", "safe": 1}, {"kind": "file", "path": str(tmp_path / "x")}], "")
        states = {s.kind: s for s in tray.states()}
        assert states["wire"].code == "sink.plugin_broken"
        assert states["file"].code is None
    finally:
        tray.stop()
        assert tray.join(10)


def test_a_module_that_leaves_the_process_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "leaver-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: leaver\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugins.SINKS}]\nleaver = pithead_leaver\n")
    (tmp_path / "pithead_leaver.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PitheadError, match="SystemExit") as caught:
        sinks.plan({"kind": "leaver"})
    assert caught.value.code == "sink.plugin_broken"
    assert "pithead_leaver" not in sys.modules


@pytest.mark.parametrize("answer", [None, 5, -1, "1"])
def test_a_sink_that_does_not_count_its_refusals_is_named_and_goes_on(
    third_party: Callable[..., Wire], running: Callable[[Worker], Any], answer: object
):
    wire = third_party()
    wire.answer = answer
    one = running(MessageWorker("l", sinks.plan({"kind": "wire"}), CLOCK))
    one.queue.put([FIRST])
    until(lambda: one.state().state == "failed", "it is seen")
    assert "how many messages were refused" in one.state().detail
    wire.answer = 0
    until(lambda: (one.state().state, one.state().sent) == ("working", 1), "it is tried again")


def test_a_write_that_never_ends_is_seen(
    third_party: Callable[..., Wire], running: Callable[[Worker], Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("agent.engine.sinks.worker.HANGS_US", 50_000)
    wire = third_party(CONTROL=True)
    one = running(ControlWorker("l", sinks.plan({"kind": "wire", **SAFE}), CLOCK, ""))
    until(lambda: wire.calls, "it is written")
    wire.held.clear()
    until(lambda: one.state().state == "failed", "that it hangs is said")
    assert "no answer" in one.state().detail
    wire.held.set()
    until(lambda: one.state().state == "working", "and that it works again")


# ---- controls


def test_the_last_word_is_tried_again_where_the_connection_had_gone(
    third_party: Callable[..., Wire], running: Callable[[Worker], Any]
):
    wire = third_party(CONTROL=True)
    one = running(ControlWorker("l", sinks.plan({"kind": "wire", **SAFE, "refresh_s": 60.0}), CLOCK, ""))
    until(lambda: wire.calls == [9], "safe at first")
    one.judged(1.0, alarm=True)
    until(lambda: wire.calls == [9, 2], "the alarm")
    wire.fails = [ConnectionResetError("idle for too long"), SystemExit("a library gave up")]
    one.stop()
    assert one.join(10)
    assert wire.calls == [9, 2, 9]


def test_a_bypass_stops_a_write_of_many_requests_between_two(tmp_path: Path):
    plc, stop = Plc(), tmp_path / "bypass"
    table = {"kind": "modbus", "host": "127.0.0.1", "port": plc.port, "alarm": "holding:1",
             "quality": "coil:1", "heartbeat": "holding:2", "safe": 0}  # fmt: skip
    found = sinks.plan(table)
    made: Any = found.open(found.table)
    try:
        answers = iter([True, False])
        with pytest.raises(PitheadError, match="bypass"):
            made.write(Outputs(1, None, quality=True, heartbeat=5, may_write=lambda: next(answers)))
        assert plc._call(plc._server.async_getValues(1, 3, 1, 2)) == [1, 0]
    finally:
        made.close()
        plc.end()
    assert not stop.exists()


def test_an_alarm_that_a_node_cannot_hold_is_never_another_one(
    machine: Machine, running: Callable[[Worker], Any]
):
    space, seen = machine._nodes["a"].nodeid.NamespaceIndex, []
    for node, values, words in (
        ("Boolean", {"on": 2, "off": 1, "safe": 1}, "on = 2"),
        ("Byte", {"on": 1, "off": 0, "safe": 300}, "safe = 300"),
        ("UInt16", {"on": 1, "off": 0, "safe": -1}, "safe = -1"),
        ("Int16", {"on": 0.5, "off": 0, "safe": 0}, "on = 0.5"),
    ):
        start: Any = False if node == "Boolean" else 0
        objects, place = machine.server.nodes.objects, ua.NodeId(f"n{node}", space)
        made = machine._call(objects.add_variable(place, f"n{node}", start, ua.VariantType[node]))
        machine._call(made.set_writable())
        table = {"kind": "opcua", "url": machine.url, "alarm": f"nsu={URI};s=n{node}", **values}
        seen.append((running(ControlWorker("l", sinks.plan(table), CLOCK, "")), made, start, node, words))
    for one, made, start, node, words in seen:
        until(lambda one=one: one.state().state == "failed", "it is refused before anything is written")
        assert f"is a {node}, which cannot hold {words}" in one.state().detail
        assert machine._call(made.read_value()) == start


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.end()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("", "no answer in 0.2 s"),
        ("777700000006010600010001", "no answer in 0.2 s"),
        ("{tid}0000000501030200 01", "of function 3"),
        ("{tid}00000003018602", "exception 2"),
        ("{tid}0000000601", "no answer|onnection"),
    ],
    ids=["silent", "of another request", "of another function", "refused", "half"],
)
def test_a_controller_that_answers_something_else_has_not_been_written(answer: str, words: str):
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            asked = connection.recv(64)
            connection.sendall(bytes.fromhex(answer.format(tid=asked[:2].hex())))
            connection.recv(64)  # until the client leaves

    thread = threading.Thread(target=serve)
    thread.start()
    port = server.getsockname()[1]
    found = sinks.plan({"kind": "modbus", "host": "127.0.0.1", "port": port, "alarm": "holding:1", "safe": 0,
                        "timeout_s": 0.2})  # fmt: skip
    made: Any = found.open(found.table)
    try:
        with pytest.raises(PitheadError, match=words):
            made.write(Outputs(1, None, quality=True, heartbeat=1))
    finally:
        made.close()
        thread.join(10)
        server.close()


# ---- messages


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_webhook_that_takes_nothing_from_us_fails_and_loses_nothing(
    running: Callable[[Worker], Any], status: int
):
    hook = Hook(status)
    try:
        one = running(MessageWorker("l", sinks.plan({"kind": "http", "url": hook.url}), CLOCK))
        one.queue.put([FIRST])
        until(lambda: one.state().state == "failed", "it is said")
        assert str(status) in one.state().detail
        until(lambda: hook.got, "it comes again")
        until(lambda: one.state().state == "working", "and works")
        assert one.state().lost == 0
    finally:
        hook.end()


def test_what_was_taken_does_not_come_again_with_what_was_not(running: Callable[[Worker], Any]):
    hook = Hook(204, 204, 500, 500)
    try:
        one = MessageWorker("l", sinks.plan({"kind": "http", "url": hook.url}), CLOCK)
        one.queue.put([FIRST] * 4)
        running(one)
        until(lambda: one.state().sent == 4, "all are there")
        assert len(hook.got) == 4
    finally:
        hook.end()


def test_a_token_file_that_holds_no_token_shows_nothing_of_it(
    running: Callable[[Worker], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for text in ("two\nlines", "sec ret", "", "ümlaut"):
        path = tmp_path / "hook.token"
        path.write_text(text)
        table = {"kind": "http", "url": "http://127.0.0.1:9/", "token_file": str(path)}
        one = running(MessageWorker("l", sinks.plan(table), CLOCK))
        one.queue.put([FIRST])
        until(lambda one=one: one.state().state == "failed", "it is said")
        assert "token_file" in one.state().detail
        said = one.state().detail + caplog.text
        assert not any(word in said for word in ("two", "sec", "mlaut"))


def test_a_broker_that_refuses_a_message_is_heard(tmp_path: Path, running: Callable[[Worker], Any]):
    (tmp_path / "acl").write_text("topic read #\ntopic write open/#\n")
    broker = Broker(tmp_path, "allow_anonymous true\nacl_file acl")
    try:
        broker.publisher().disconnect()
        table = {"kind": "mqtt", "port": broker.port, "topic": "closed/x"}
        one = running(MessageWorker("l", sinks.plan(table), CLOCK))
        one.queue.put([FIRST])
        until(lambda: one.state().state == "failed", "that nobody got it is said")
        assert "closed/x" in one.state().detail
        assert "uthor" in one.state().detail
        assert one.state().sent == 0
        other = running(MessageWorker("l", sinks.plan(table | {"topic": "open/x"}), CLOCK))
        other.queue.put([FIRST])
        until(lambda: other.state().sent == 1, "others are taken")
    finally:
        broker.end()


def test_a_file_that_somebody_rotated_is_left_to_him(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    found = sinks.plan({"kind": "file", "path": str(path)})
    made: Any = found.open(found.table)
    made.send([FIRST])
    path.rename(tmp_path / "aside")
    path.touch()  # as logrotate does with "create"
    made.send([FIRST])
    made.close()
    assert len(path.read_text().splitlines()) == 1
    assert len((tmp_path / "aside").read_text().splitlines()) == 1


def test_a_bypass_is_possible_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise PitheadError("storage.full", "no space left on device")

    monkeypatch.setattr(durable, "write", full)
    path = tmp_path / "bypass"
    bypass.switch_on(path, datetime(2026, 1, 1, tzinfo=UTC), "me", "it burns")
    assert bypass.read(path) is not None
    assert os.path.lexists(path)
