"""The modbus source against a real server of pymodbus."""

import asyncio
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymodbus.constants import ExcCodes
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from agent.engine.sources import check, open_source
from agent.engine.sources.base import Source
from agent.engine.sources.modbus import MAX_REGISTERS, grouped, parsed
from agent.engine.sources.tags import Address
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from tests.engine.conftest import Engine, free_port, make_package, until
from tests.engine.test_mqtt import CLOCK


class Plc:
    """A controller with two units: registers 0 to 199 of each kind, and what it was asked."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.asked: list[tuple[int, int, int]] = []
        """Function, address and count of each request."""
        self.fault: Callable[[int, int], ExcCodes | None] = lambda _function, _address: None
        self.registers: dict[int, list[int]] = {}
        self.hold = threading.Event()
        self.hold.set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = self._call(self._start())

    async def _start(self) -> ModbusTcpServer:
        async def action(
            function: int, _start: int, address: int, count: int, _registers: list[int], _values: Any
        ) -> ExcCodes | None:
            self.asked.append((function, address, count))
            await asyncio.to_thread(self.hold.wait, 30)
            return self.fault(function, address)

        block = [SimData(0, count=200, values=0, datatype=DataType.REGISTERS)]
        bits = [SimData(0, count=64, values=0, datatype=DataType.BITS)]
        units = [SimDevice(unit, (bits, bits, block, block), action=action) for unit in (1, 3)]
        server = ModbusTcpServer(units, address=("127.0.0.1", self.port))
        await server.serve_forever(background=True)
        return server

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def write(self, function: int, address: int, values: list[Any], unit: int = 1) -> None:
        """Set registers (function 3 or 4) or bits (1 or 2), past the protocol."""
        self._call(self._server.async_setValues(unit, function, address, values))

    def write_value(self, address: int, code: str, value: float, *, little: bool = False) -> None:
        data = struct.pack(">" + code, value)
        words = list(struct.unpack(f">{len(data) // 2}H", data))
        self.write(3, address, words[::-1] if little else words)

    def end(self) -> None:
        self.hold.set()
        self._call(self._server.shutdown())
        self._call(self._settle())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _settle(self) -> None:
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)


@pytest.fixture
def plc() -> Iterator[Plc]:
    made = Plc()
    yield made
    made.end()


@pytest.fixture
def opened(plc: Plc) -> Iterator[Callable[..., Source]]:
    held: list[Source] = []

    def opening(tags: list[dict[str, Any]], rate_hz: float = 50.0, **table: Any) -> Source:
        channels = tuple(Channel(tag["channel"], unit="bar") for tag in tags)
        pipeline = Pipeline(channels, 1, 1, (0.0,) * len(tags), (1.0,) * len(tags), sample_rate_hz=rate_hz)
        given = {"kind": "modbus", "host": "127.0.0.1", "port": plc.port, "tags": tags}
        held.append(open_source(given | table, pipeline, CLOCK))
        return held[-1]

    yield opening
    for one in held:
        one.close()
        one.close()


def tag(channel: str, address: str, datatype: str = "", **more: Any) -> dict[str, Any]:
    return {"channel": channel, "address": address, "datatype": datatype, **more}


def row(source: Source) -> Any:
    """The newest row that is there."""
    batch = until(lambda: (b := source.poll(1000)) is not None and len(b.values) and b, "a row")
    return batch.values[-1]


def test_every_kind_and_datatype(plc: Plc, opened: Callable[..., Source]):
    for address, code, value in (
        (0, "h", -5),
        (1, "H", 65000),
        (2, "i", -100_000),
        (4, "I", 4_000_000_000),
        (6, "f", 1.5),
        (8, "d", 1e-3),
        (12, "q", -(2**40)),
        (16, "Q", 2**50),
    ):
        plc.write_value(address, code, value)
    plc.write(4, 7, [321])
    plc.write(3, 30, [0b100000])
    plc.write(1, 5, [True])
    plc.write(2, 6, [True])
    plc.write(3, 0, [7], unit=3)
    source = opened(
        [
            tag("a", "holding:0", "int16", scale=0.5, offset=1.0, unit="bar"),
            tag("b", "holding:1"),
            tag("c", "holding:2", "int32"),
            tag("d", "holding:4", "uint32"),
            tag("e", "holding:6", "float32"),
            tag("f", "holding:8", "float64"),
            tag("g", "holding:12", "int64"),
            tag("h", "holding:16", "uint64"),
            tag("i", "input:7"),
            tag("j", "holding:30.5"),
            tag("k", "holding:30.4", "bit"),
            tag("l", "coil:5"),
            tag("m", "coil:4"),
            tag("n", "discrete:6"),
            tag("o", "3/holding:0"),
        ]
    )
    found = row(source).tolist()
    assert found == [-1.5, 65000, -1e5, 4e9, 1.5, 1e-3, -(2.0**40), 2.0**50, 321, 1, 0, 1, 0, 1, 7]


def test_words_may_come_the_other_way_round(plc: Plc, opened: Callable[..., Source]):
    plc.write_value(0, "f", 3.25, little=True)
    plc.write_value(2, "i", -7, little=True)
    source = opened([tag("a", "holding:0", "float32"), tag("b", "holding:2", "int32")], word_order="little")
    assert row(source).tolist() == [3.25, -7]


def test_neighbours_are_read_at_once_and_gaps_only_when_allowed(plc: Plc, opened: Callable[..., Source]):
    tags = [
        tag("a", "holding:3"),
        tag("b", "holding:0", "float32"),
        tag("c", "holding:2"),
        tag("d", "holding:9"),
    ]
    row(opened(tags))
    assert {(3, 0, 4), (3, 9, 1)} == set(plc.asked)
    plc.asked.clear()
    row(opened(tags, max_gap=5))
    assert (3, 0, 10) in plc.asked


def test_no_request_is_longer_than_the_protocol_allows():
    tags = [Address(str(i), f"holding:{i}") for i in range(300)]
    blocks = grouped(parsed(tags, 1), 0)
    assert [block.count for block in blocks] == [MAX_REGISTERS, MAX_REGISTERS, 50]
    assert sorted(p.place for block in blocks for p in block.points) == list(range(300))
    wide = [Address(str(i), f"holding:{4 * i}", "float64") for i in range(40)]
    assert all(block.count <= MAX_REGISTERS for block in grouped(parsed(wide, 1), 0))


def test_values_change_at_the_rate_and_rows_have_their_time(plc: Plc, opened: Callable[..., Source]):
    source = opened([tag("a", "holding:0")], rate_hz=50.0)
    row(source)
    plc.write(3, 0, [42])
    until(lambda: row(source)[0] == 42, "the new value")
    times: list[int] = []

    def enough() -> bool:
        if (batch := source.poll(1000)) is not None:
            times.extend(batch.t.tolist())
        return len(times) >= 25

    until(enough, "25 rows")
    assert np.median(np.diff(times)) == pytest.approx(20_000, rel=0.2)
    assert abs(times[-1] - CLOCK.wall()) < 5_000_000


def test_what_a_busy_controller_does_not_say_is_missing(plc: Plc, opened: Callable[..., Source]):
    plc.fault = lambda function, _: ExcCodes.DEVICE_BUSY if function == 4 else None
    source = opened([tag("a", "holding:0"), tag("b", "input:0")])
    assert np.isnan(row(source)).tolist() == [False, True]
    plc.fault = lambda _function, _address: None
    until(lambda: not np.isnan(row(source)).any(), "the controller is not busy any more")


def test_periods_that_a_slow_controller_ate_are_lost_and_break_the_window(
    plc: Plc, opened: Callable[..., Source]
):
    source = opened([tag("a", "holding:0")], rate_hz=50.0, timeout_s=5.0)
    row(source)
    plc.hold.clear()
    asked = len(plc.asked)
    until(lambda: len(plc.asked) > asked, "a request that is held")
    began = CLOCK.mono()
    until(lambda: CLOCK.mono() - began > 300_000, "15 periods")
    while source.poll(1000).values.size:
        pass
    plc.hold.set()
    found = until(lambda: (b := source.poll(1)) is not None and b.lost and b, "rows were lost")
    assert found.lost >= 10
    until(lambda: (b := source.poll(1000)) is not None and not b.lost and len(b.values), "it goes on")


def failure(source: Source) -> str:
    with pytest.raises(PitheadError) as caught:
        until(lambda: source.poll(1) and None, "never")
    assert caught.value.code == "source.failed"
    return caught.value.detail


def test_an_address_that_is_not_there_is_named(plc: Plc, opened: Callable[..., Source]):
    words = failure(opened([tag("a", "holding:5000")]))
    assert f"modbus 127.0.0.1:{plc.port}: 1/holding:5000..5000: illegal address (exception 2)" in words


def test_a_controller_that_does_not_answer_in_time_fails(plc: Plc, opened: Callable[..., Source]):
    plc.hold.clear()
    assert "no answer in 0.2 s" in failure(opened([tag("a", "holding:0")], timeout_s=0.2))


def test_close_does_not_wait_for_a_controller_that_hangs(plc: Plc, opened: Callable[..., Source]):
    plc.hold.clear()
    source = opened([tag("a", "holding:0")], timeout_s=60.0)
    until(lambda: plc.asked, "a request that hangs")
    began = CLOCK.mono()
    source.close()
    assert CLOCK.mono() - began < 1_000_000


def test_a_lane_lives_through_a_controller_that_goes_and_comes(tmp_path: Path, engine: Engine):
    port = free_port()
    package = make_package(tmp_path / "p")
    supervisor = engine.connect()
    tags = [tag(name, f"holding:{i}") for i, name in enumerate("abc")]
    supervisor.configure(package.spec({"kind": "modbus", "host": "127.0.0.1", "port": port, "tags": tags}))
    failed = supervisor.until_state(state="failed")
    assert failed.code == "source.failed"
    assert f"modbus 127.0.0.1:{port}: " in failed.detail
    for _ in range(2):
        plc = Plc(port)
        plc.write(3, 0, [20, 20, 20])
        supervisor.until_state(state="running", code=None)
        seen = supervisor.state().windows
        supervisor.until(lambda seen=seen: supervisor.state().windows > seen + 10, "rows are scored")
        plc.end()
        supervisor.until_state(state="failed")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tags": []}, "no tag"),
        ({"tags": [tag("a", "40001")]}, "'40001' is none of holding:N"),
        ({"tags": [tag("a", "holding:65536")]}, "beyond register 65535"),
        ({"tags": [tag("a", "holding:65535", "float32")]}, "beyond register 65535"),
        ({"tags": [tag("a", "300/holding:1")]}, "unit 255"),
        ({"tags": [tag("a", "holding:1.16")]}, "0 to 15"),
        ({"tags": [tag("a", "coil:1.1")]}, "0 to 15"),
        ({"tags": [tag("a", "coil:1", "int16")]}, "does not go with datatype 'int16'"),
        ({"tags": [tag("a", "holding:1", "bit")]}, "does not go with datatype 'bit'"),
        ({"tags": [tag("a", "holding:1", "int24")]}, "'int24', not one of int16"),
        ({"host": ""}, "host"),
        ({"unit_id": 256}, "unit_id"),
        ({"word_order": "middle"}, "word_order"),
        ({"tags": None}, "needs tags"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str):
    table = {"kind": "modbus", "host": "127.0.0.1", "tags": [tag("a", "holding:0")]} | changes
    pipeline = Pipeline((Channel("a"),), 1, 1, (0.0,), (1.0,), sample_rate_hz=1.0)
    with pytest.raises(PitheadError) as caught:
        open_source(table, pipeline, CLOCK)
    assert caught.value.code == "config.invalid"
    assert words in caught.value.detail


def test_settings_can_be_checked_without_a_controller():
    check({"kind": "modbus", "host": "plc", "tags": [tag("a", "holding:0", unit="bar")]})
    with pytest.raises(PitheadError, match="hots"):
        check({"kind": "modbus", "hots": "plc"})
