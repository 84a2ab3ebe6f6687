"""The health message, and the numbers in it."""

import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil
import pytest

from agent.ports import LaneState, SinkState
from agent.service import bypass, vitals
from agent.service.reporting import Clock, Reporter
from contract.messages import (
    Ailing,
    Bypass,
    Health,
    PriorityClass,
)
from tests.agent.bench import CLOCK, Bench


def test_health_has_plausible_numbers(bench: Bench):
    reporter = Reporter(bench.world, bench.outbox, Clock(wall=lambda: 5, mono=lambda: 6))
    reporter.health(engine_pid=None, engine_restarts=2, connected_s=None, clock_offset_s=0.5)
    (record,) = bench.records(PriorityClass.HEALTH)
    body = msgspec.to_builtins(record.body)
    assert body["engine_restarts"] == 2
    assert 0 < body["memory_percent"] < 100
    assert body["agent_pss_bytes"] > 10_000_000
    assert body["disk_free_bytes"] > 0


def test_health_says_of_the_bypass_and_of_what_ails_whoever_wrote_it(bench: Bench):
    reporter = Reporter(bench.world, bench.outbox, CLOCK)

    def sent() -> Health:
        reporter.health(engine_pid=None, engine_restarts=0, connected_s=None, clock_offset_s=None)
        body = bench.records(PriorityClass.HEALTH)[-1].body
        assert isinstance(body, Health)
        return body

    quiet = sent()
    assert (quiet.bypass, quiet.ailing) == (None, ())
    assert not reporter.has_news()
    sinks = (
        SinkState("hook", "http", "failed", lost=2, waiting=3, code="sink.failed", detail="refused"),
        SinkState("lamp", "modbus", "bypassed"),
        SinkState("log\0", "file", "working", sent=9),
    )
    lane = LaneState("line", "pump", "failed", code="source.failed", detail="no route", sinks=sinks)
    bench.world.lane_said(lane, bench.now)
    bypass.switch_on(bench.layout.bypass, datetime(2026, 3, 1, 12, tzinfo=UTC), "ann\0", "valve " * 1000)
    assert reporter.has_news()
    body = sent()
    assert body.bypass is not None
    assert (body.bypass.since, body.bypass.who) == (1_772_366_400_000_000, "ann")
    assert len(body.bypass.why) == 2000
    assert body.ailing == (
        Ailing("line", "sink", "failed", "hook", "http", "sink.failed", "refused", waiting=3, lost=2),
        Ailing("line", "source", "failed", code="source.failed", detail="no route"),
    )
    bench.world.lane_said(msgspec.structs.replace(lane, windows=7), bench.now)
    assert not reporter.has_news(), "counts are none"
    bench.world.lane_said(LaneState("line", "pump", "running", machine="unknown"), bench.now)
    assert reporter.has_news()
    assert [(each.what, each.state, each.code) for each in sent().ailing] == [("machine", "unknown", None)]
    bench.layout.bypass.write_bytes(b"")  # by touch
    os.utime(bench.layout.bypass, (5, 5))
    assert sent().bypass == Bypass(5_000_000)


def test_vitals_agree_with_psutil():
    assert vitals.memory_percent() == pytest.approx(psutil.virtual_memory().percent, abs=5)
    assert vitals.pss([os.getpid()]) == pytest.approx(psutil.Process().memory_full_info().pss, rel=0.2)
    assert 0 <= vitals.CpuMeter().percent() <= 100
    assert vitals.pss([2**22 + 1]) == 0


def test_vitals_read_sensors_where_there_are_any(tmp_path: Path):
    assert vitals.temperature(tmp_path) is None
    for i, text in enumerate(["41500\n", "broken\n", "55250\n"]):
        zone = tmp_path / f"class/thermal/thermal_zone{i}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(text)
    assert vitals.temperature(tmp_path) == 55.25
