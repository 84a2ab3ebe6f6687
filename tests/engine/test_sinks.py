"""Sinks of a real engine's lane: real servers, a real controller, the bypass, and what a dead one costs."""

import csv
import http.server
import json
import re
import threading
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from asyncua import ua

from agent.__main__ import main
from agent.core.layout import Layout
from agent.engine import plugins, sinks
from agent.engine.clock import Clock
from agent.engine.sinks.base import Control, Delivery, Message, Outputs
from agent.engine.sinks.modbus import registers
from agent.engine.sinks.queue import Queue
from agent.engine.sinks.tray import which
from agent.engine.sinks.worker import ControlWorker
from agent.service import bypass
from agent.service.ailing import ailing
from agent.wiring import read_settings
from contract.errors import PitheadError
from tests.engine.conftest import Engine, Supervisor, free_port, make_package, samples, until, write_csv
from tests.engine.test_mqtt import CLOCK, Broker
from tests.engine.test_source_modbus import Plc
from tests.engine.test_source_opcua import URI, Machine
from tests.engine.test_source_plugins import install

PAGE = (Path(__file__).parents[2] / "docs/sinks.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FIRST = Message("press", "m", "1", "2026-01-01T00:00:00.000000Z", 3.0, 2.0, True, {"a": 1.0})


@pytest.fixture
def lane(engine: Engine, tmp_path: Path) -> Any:
    """Configure the one lane of a real engine, always the same but for its sinks."""
    package = make_package(tmp_path / "p", kind="int8.onnx")
    path = write_csv(tmp_path / "r.csv", samples(400))
    supervisor = engine.connect()

    def configured(*tables: dict[str, Any], source: dict[str, Any] | None = None, **more: Any) -> Supervisor:
        replay = {"kind": "replay", "path": str(path), "rate_hz": 100.0}
        supervisor.configure(package.spec(source or replay, sinks=tables, **more))
        return supervisor

    return configured


def sink(supervisor: Supervisor, place: int = 0) -> Any:
    state = supervisor.state()
    return state.sinks[place] if state is not None and len(state.sinks) > place else None


class Hook:
    """A webhook that keeps what it gets; ``answers`` are given first, then 204."""

    def __init__(self, *answers: int) -> None:
        self.got: list[Any] = []
        self.headers: list[Any] = []
        left = list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler) -> None:  # noqa: N805 - the library's names
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                status = left.pop(0) if left else 204
                if status == 204:
                    self.got.append(json.loads(body))
                    self.headers.append(handler.headers)
                handler.send_response(status)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?x=1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_messages_go_to_a_file_a_webhook_and_a_broker_and_a_dead_one_holds_nobody(lane: Any, tmp_path: Path):
    broker, hook = Broker(tmp_path), Hook(503)
    got: list[tuple[str, Any]] = []
    client = broker.publisher()
    client.on_message = lambda _c, _u, m: got.append((m.topic, json.loads(m.payload)))
    client.subscribe("plant/#", qos=1)
    (tmp_path / "token").write_text("s3cret\n")
    try:
        supervisor = lane(
            {"kind": "file", "path": str(tmp_path / "out.jsonl")},
            {"kind": "http", "url": hook.url, "token_file": str(tmp_path / "token"), "batch": 50},
            {
                "kind": "mqtt",
                "port": broker.port,
                "topic": "plant/{lane}/{model}",
                "when": "alarm state changes",
            },
            {
                "kind": "http",
                "name": "dead",
                "url": f"http://127.0.0.1:{free_port()}/",
                "queue": 3,
                "when": "every window",
            },
        )
        supervisor.until(lambda: hook.got and len(got) > 2 and sink(supervisor, 3).lost > 10, "all have some")
        dead = sink(supervisor, 3)
        assert (dead.name, dead.state, dead.code, dead.sent) == ("dead", "failed", "sink.failed", 0)
        (told,) = ailing([supervisor.state()])
        assert (told.lane, told.what, told.sink, told.kind) == ("one", "sink", "dead", "http")
        assert (told.state, told.code, told.waiting > 0, told.lost > 10) == (
            "failed",
            "sink.failed",
            True,
            True,
        )
        supervisor.until(lambda: supervisor.state().windows > 150, "the lane goes on at its pace")
        assert supervisor.state().state == "running"
        lines = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
        reported = {a.score for a in supervisor.anomalies}
        assert {x["score"] for x in lines[:5]} <= reported
        assert all(x["alarm"] and x["score"] > x["threshold"] == 2.0 for x in lines)
        assert set(lines[0]) == set(Message.__struct_fields__)
        assert sum(lines[0]["contributions"].values()) == pytest.approx(1)
        assert hook.got[0][0] == lines[0]  # after a 503 it came again
        assert hook.headers[0]["Authorization"] == "Bearer s3cret"
        assert got[0][0] == "plant/one/demo"
        alarms = [body["alarm"] for _, body in got]
        assert all(a != b for a, b in pairwise(alarms))
    finally:
        client.disconnect()
        client.loop_stop()
        broker.end()
        hook.end()


def read(plc: Plc, function: int, address: int) -> Any:
    return plc._call(plc._server.async_getValues(1, function, address, 1))[0]


@pytest.fixture
def plc() -> Iterator[Plc]:
    made = Plc()
    yield made
    made.end()


def test_a_controller_gets_the_alarm_and_the_safe_value_at_the_end(
    engine: Engine, lane: Any, plc: Plc, tmp_path: Path
):
    stop = tmp_path / "bypass"
    table = {"kind": "modbus", "host": "127.0.0.1", "port": plc.port, "alarm": "holding:10",
             "score": "holding:11", "score_scale": 100.0, "heartbeat": "holding:12", "quality": "coil:3",
             "on": 2, "off": 1, "safe": 9, "refresh_s": 0.05, "hold_s": 0.0}  # fmt: skip
    supervisor = lane(table, bypass=str(stop))
    seen: set[int] = set()

    def both() -> bool:
        supervisor.read()
        seen.add(read(plc, 3, 10))
        return {1, 2} <= seen

    until(both, "the alarm goes on and off")
    assert read(plc, 1, 3) is True
    assert read(plc, 3, 11) > 0
    digest, windows = supervisor.state().digest, supervisor.state().windows

    stop.touch()
    supervisor.until(lambda: sink(supervisor).state == "bypassed", "the engine has seen the bypass")
    count = len(plc.asked)
    supervisor.until(lambda: supervisor.state().windows > windows + 100, "the lane goes on")
    assert len(plc.asked) == count
    stop.unlink()
    before = read(plc, 3, 12)
    until(lambda: read(plc, 3, 12) != before, "the heart beats again")

    # Another sink beside it: neither the session nor the lane begins anew.
    lane(table, {"kind": "file", "path": str(tmp_path / "x.csv"), "format": "csv"}, bypass=str(stop))
    supervisor.until(lambda: sink(supervisor, 1) and sink(supervisor, 1).sent, "the new sink has something")
    assert (supervisor.state().digest, supervisor.state().windows > windows) == (digest, True)
    assert engine.log.count("lane.swapped") == 1

    supervisor.close()
    assert engine.stop() == 0
    assert (read(plc, 3, 10), read(plc, 1, 3)) == (9, False)


def test_a_lane_that_fails_leaves_its_controller_safe(lane: Any, plc: Plc, tmp_path: Path):
    table = {"kind": "modbus", "host": "127.0.0.1", "port": plc.port, "alarm": "coil:5", "safe": True,
             "refresh_s": 0.05, "hold_s": 0.0, "quality": "coil:6"}  # fmt: skip
    supervisor = lane(table)
    until(lambda: read(plc, 1, 6) is True, "the lane judges")
    lane(table, source={"kind": "replay", "path": str(tmp_path / "none.csv"), "rate_hz": 10.0})
    supervisor.until_state(state="failed")
    until(lambda: (read(plc, 1, 5), read(plc, 1, 6)) == (True, False), "the safe value")


def test_nodes_of_an_opcua_server_get_their_own_datatypes():
    machine = Machine()
    try:
        space = machine._nodes["a"].nodeid.NamespaceIndex
        flag = machine._call(
            machine.server.nodes.objects.add_variable(ua.NodeId("flag", space), "flag", False)
        )
        for node in (flag, *machine._nodes.values()):
            machine._call(node.set_writable())
        table = {"kind": "opcua", "url": machine.url, "alarm": f"nsu={URI};s=flag", "safe": True,
                 "score": f"ns={space};s=a", "score_scale": 2.0}  # fmt: skip
        found = sinks.plan(table)
        made = found.open(found.table)
        try:
            made.write(Outputs(1, 1.25, quality=True, heartbeat=0))  # type: ignore[union-attr]
            assert machine._call(flag.read_value()) is True
            assert machine._call(machine._nodes["a"].read_value()) == 2.5
            made.write(Outputs(0, None, quality=False, heartbeat=1))  # type: ignore[union-attr]
            assert machine._call(flag.read_value()) is False
            assert machine._call(machine._nodes["a"].read_value()) == 2.5
        finally:
            made.close()
        wrong = sinks.plan(table | {"alarm": f"ns={space};s=label"})
        opened: Any = wrong.open(wrong.table)
        try:
            with pytest.raises(PitheadError, match="holds a String, no number"):
                opened.write(Outputs(1, None, quality=True, heartbeat=0))
        finally:
            opened.close()
    finally:
        machine.end()


def test_a_control_is_safe_until_judged_and_when_a_judgement_is_old():
    now = [0]
    clock = Clock(wall=lambda: 0, mono=lambda: now[0])
    table = {"kind": "modbus", "host": "x", "alarm": "coil:0", "safe": True, "hold_s": 2.0, "max_age_s": 5.0}
    one = ControlWorker("l", sinks.plan(table), clock, "")
    assert (one.outputs(0).alarm, one.outputs(0).quality) == (True, False)
    one.judged(1.0, alarm=False)
    assert (one.outputs(0).alarm, one.outputs(0).quality) == (0, True)
    one.judged(9.0, alarm=True)
    now[0] = 1_000_000
    one.judged(1.0, alarm=False)
    assert one.outputs(1_900_000).alarm == 1  # held
    assert one.outputs(2_100_000) == Outputs(0, 1.0, quality=True, heartbeat=0)
    assert not one.outputs(6_100_000).quality
    one.judged(1.0, alarm=False)
    one.distrust()
    assert one.outputs(now[0]).alarm is True


def test_a_file_is_rotated_and_bounded_and_a_torn_line_ended(tmp_path: Path):
    path = tmp_path / "deep/out.csv"
    found = sinks.plan({"kind": "file", "path": str(path), "format": "csv", "max_bytes": 4096, "files": 3})
    made: Any = found.open(found.table)
    for _ in range(20):
        made.send([FIRST] * 10)
    made.close()
    files = sorted(path.parent.iterdir())
    assert [f.name for f in files] == ["out.csv", "out.csv.1", "out.csv.2"]
    assert all(f.stat().st_size <= 4096 for f in files)
    for file in files:
        rows = list(csv.DictReader(file.read_text().splitlines()))
        assert {(r["lane"], r["alarm"], r["contributions"]) for r in rows} == {("press", "1", '{"a":1.0}')}
    with path.open("ab") as file:
        file.write(b"press,torn")
    made = found.open(found.table)
    made.send([FIRST])
    made.close()
    assert path.read_text().splitlines()[-2:] == ["press,torn", path.read_text().splitlines()[-1]]
    assert path.read_text().splitlines()[-1].startswith("press,m,1,2026")


def test_what_a_webhook_refuses_for_good_does_not_come_again():
    hook = Hook(400)
    try:
        found = sinks.plan({"kind": "http", "url": hook.url})
        made: Any = found.open(found.table)
        assert made.send([FIRST, FIRST]) == 1
        made.close()
        assert hook.got == [msgspec.to_builtins(FIRST)]
    finally:
        hook.end()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "fil"}, "kind is 'fil', not one of file, http"),
        ({"kind": "mqtt", "prot": 1}, "prot = 1 is no key of a 'mqtt' sink; did you mean port?"),
        ({"kind": "mqtt", "port": "x"}, "port is 'x': Expected `int"),
        ({"kind": "mqtt", "when": "always"}, "when is 'always': Invalid enum value 'always'"),
        ({"kind": "mqtt", "topic": "a/#"}, "topic is 'a/#'"),
        ({"kind": "http", "url": "http://u:p@host/"}, "url is"),
        ({"kind": "modbus", "host": "x", "alarm": "coil:1"}, "safe is missing"),
        ({"kind": "modbus", "host": "x", "alarm": "input:1", "safe": 0}, "alarm is 'input:1'"),
        ({"kind": "modbus", "host": "x", "alarm": "coil:1", "safe": 7}, "safe is 7; a coil holds"),
        ({"kind": "modbus", "host": "x", "alarm": "coil:1", "safe": 0, "when": "anomalies"}, "when = 'anom"),
        (
            {"kind": "modbus", "host": "x", "alarm": "holding:1", "heartbeat": "holding:1", "safe": 0},
            "heartbeat is 'holding:1', which alarm is written to",
        ),
        ({"kind": "opcua", "url": "opc.tcp://x", "alarm": "i=1", "safe": 0, "security_policy":
          "Basic256Sha256"}, "certificate_file is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(table: dict[str, Any], words: str):
    with pytest.raises(PitheadError) as caught:
        sinks.check(table)
    assert (caught.value.code, words in caught.value.detail) == ("config.invalid", True), caught.value


def test_registers_are_bounded():
    assert registers(70_000.4, "uint16", "big") == [65535]
    assert registers(-5, "int16", "big") == [0xFFFB]
    assert registers(1.5, "float32", "little") == [0, 0x3FC0]


def test_a_queue_loses_the_oldest_and_counts():
    queue = Queue(2)
    queue.put([FIRST, msgspec.structs.replace(FIRST, lane="b"), msgspec.structs.replace(FIRST, lane="c")])
    assert queue.lost == 1
    assert [m.lane for m in queue.take(5)] == ["b", "c"]


def test_which_windows_are_changes():
    alarms = np.array([False, True, True, False])
    assert which("alarm state changes", alarms, before=None).tolist() == [0, 1, 3]
    assert which("alarm state changes", alarms, before=False).tolist() == [1, 3]
    assert which("anomalies", alarms, before=False).tolist() == [1, 2]
    assert which("every window", alarms, before=False).tolist() == [0, 1, 2, 3]


def test_the_bypass_is_a_file_that_a_person_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root, layout = ["--root", str(tmp_path)], Layout(tmp_path)
    assert main(["bypass", "on", "--why", "valve is out", *root]) == 0
    found = bypass.read(layout.bypass)
    assert found is not None
    assert found.why == "valve is out"
    assert main(["bypass", "status", *root]) == 0
    assert "(valve is out): nothing is written" in capsys.readouterr().out
    layout.bypass.write_bytes(b"")  # by touch
    assert bypass.read(layout.bypass) == bypass.Bypass()
    assert main(["bypass", "off", *root]) == 0
    assert bypass.read(layout.bypass) is None


def test_the_configuration_knows_sinks(tmp_path: Path):
    layout = Layout(tmp_path)
    layout.config.parent.mkdir(parents=True)
    text = '[[lanes]]\nname = "a"\nmodel = "m"\nsource = { kind = "system" }\n[[lanes.sinks]]\n'
    layout.config.write_text(text + 'kind = "file"\npath = "out.jsonl"\n')
    (found,) = read_settings(layout).lanes
    assert found.sinks == ({"kind": "file", "path": str(layout.config.parent / "out.jsonl")},)
    layout.config.write_text(text + 'kind = "fax"\n')
    with pytest.raises(PitheadError, match=r"sinks\[0\].kind is 'fax'"):
        read_settings(layout)
    assert plugins.sink_kinds() == ()


def test_a_distribution_adds_a_control_and_the_bypass_holds_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    site, out = tmp_path / "site", tmp_path / "lamp"
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    install(site, "pithead_lamp", code, f"[{plugins.SINKS}]\nlamp = pithead_lamp")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    stop = tmp_path / "bypass"
    table = {"kind": "lamp", "device": str(out), "safe": 1, "on": 1, "off": 0, "refresh_s": 0.05}
    one = ControlWorker("l", sinks.plan(table), CLOCK, str(stop))
    one.start()
    until(lambda: out.exists() and out.read_text() == "1", "safe before it is judged")
    one.judged(0.5, alarm=False)
    until(lambda: out.read_text() == "0", "judged to be well")
    stop.touch()
    until(lambda: one.state().state == "bypassed", "bypassed")
    one.stop()
    assert one.join(5)
    assert out.read_text() == "0"


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "toml" and "lanes" in text])
def test_every_example_of_the_page_is_one(text: str, tmp_path: Path):
    layout = Layout(tmp_path)
    layout.config.parent.mkdir(parents=True)
    layout.config.write_text('[[lanes]]\nname = "press"\nmodel = "m"\nsource.kind = "system"\n' + text)
    (found,) = read_settings(layout).lanes
    for table in found.sinks:
        sinks.check(table)


def test_every_setting_is_on_the_page():
    for kind, module in sinks.SINKS.items():
        section = PAGE.split(f"\n## {kind}\n")[1].split("\n## ")[0]
        for name in import_module(module).SETTINGS.__struct_fields__:
            assert f"`{name}`" in section or f"{name} =" in section, (kind, name)
    for name in (*Delivery.__struct_fields__, *Control.__struct_fields__):
        assert f"`{name}`" in PAGE, name
