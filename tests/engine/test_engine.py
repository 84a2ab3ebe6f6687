"""The engine as a process, over its real socket, with real models on both runtimes."""

import signal
import stat
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from agent.engine.clock import Clock
from agent.engine.lane import Lane
from agent.engine.loading import Loader, load
from agent.engine.outlet import Outlet
from agent.ports import FitResult
from contract.errors import PitheadError
from contract.features import Bands, Statistics
from contract.manifest import Fit, Score
from contract.sketch import merge, quantile
from inference.features import Features
from models.dense import Layer, Network
from tests.engine.conftest import (
    CHANNELS,
    Engine,
    Supervisor,
    make_package,
    nan_network,
    samples,
    start_engine,
    until,
    write_csv,
)

EVERY = Score(method="reconstruction_mse", threshold=-1.0)
"""Each window is an alarm, so each score can be seen."""


def replay(path: Path, **changes: Any):
    return {"kind": "replay", "path": str(path), "rate_hz": 400.0} | changes


def windows_of(supervisor: Supervisor):
    return sum(s.count for s in supervisor.summaries)


def bare_tflite(content: bytes, x: Any):
    """Scores of normalised windows by LiteRT alone."""
    interpreter = Interpreter(
        model_content=content,
        num_threads=1,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    before, after = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    scores = []
    for row in x.reshape(len(x), 1, -1):
        feed = row
        if before["dtype"] is np.int8:
            scale, zero = before["quantization"]
            feed = np.clip(np.rint(row / np.float32(scale)) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(before["index"], feed)
        interpreter.invoke()
        output = interpreter.get_tensor(after["index"])
        if after["dtype"] is np.int8:
            scale, zero = after["quantization"]
            output = (output.astype(np.float32) - np.float32(zero)) * np.float32(scale)
        scores.append(np.square(row - output).mean(dtype=np.float64))
    return scores


def bare_onnx(content: bytes, x: Any):
    """Scores of normalised windows by ONNX Runtime alone."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows = x.reshape(len(x), 1, -1)
    return [np.square(r - session.run(None, {name: r})[0]).mean(dtype=np.float64) for r in rows]


@pytest.mark.parametrize(
    ("kind", "window", "stride"), [("int8.tflite", 1, 1), ("int8.onnx", 1, 1), ("int8.tflite", 5, 3)]
)
def test_a_lane_gives_the_very_numbers_of_the_bare_runtime(
    engine: Engine, tmp_path: Path, kind: str, window: int, stride: int
):
    package = make_package(tmp_path, kind=kind, window=window, stride=stride, score=EVERY)
    rows = samples(150)
    path = write_csv(tmp_path / "r.csv", rows)
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(path, loop=False)))
    ends = range(window - 1, 150, stride)
    supervisor.until(lambda: len(supervisor.anomalies) == len(ends), "all windows are there")

    raw = np.stack([rows[e - window + 1 : e + 1] for e in ends])
    x = np.clip((raw - 20) / 3, -6, 6).astype(np.float32)
    bare = bare_tflite if kind.endswith("tflite") else bare_onnx
    assert [a.score for a in supervisor.anomalies] == bare(package.model(), x)
    assert [a.source_ref for a in supervisor.anomalies] == [str(e) for e in ends]
    assert all(sum(a.contributions.values()) == pytest.approx(1) for a in supervisor.anomalies)
    assert all(set(a.contributions) == set(CHANNELS) for a in supervisor.anomalies)
    supervisor.until(lambda: windows_of(supervisor) == len(ends), "the summaries count them")
    last = max(supervisor.summaries, key=lambda s: s.count)
    assert quantile(last.score, 1.0) <= max(a.score for a in supervisor.anomalies)
    assert (last.variant, last.accelerator) == ("v", "cpu")
    loaded = Path(f"/proc/{engine.process.pid}/maps").read_text()
    other = "onnxruntime" if kind.endswith("tflite") else "ai_edge_litert"
    assert other not in loaded, "a runtime that nobody needs costs no memory"
    assert "pyarrow" not in loaded


def test_a_swap_under_load_loses_and_doubles_no_window(engine: Engine, tmp_path: Path):
    first = make_package(tmp_path, score=EVERY)
    second = make_package(tmp_path, version="1.1.0", score=EVERY, kind="int8.onnx")
    path = write_csv(tmp_path / "r.csv", samples(400))
    source = replay(path, rate_hz=50.0)
    supervisor = engine.connect()
    specs = [
        first.spec(source),
        second.spec(source, activation=1),
        second.spec(source, activation=2),  # a sham restart
        first.spec(source, activation=3),
    ]
    for spec in specs:
        seen = len(supervisor.anomalies)
        supervisor.configure(spec)
        supervisor.until_state(state="running", digest=spec.digest, activation=spec.activation)
        supervisor.until(lambda seen=seen: len(supervisor.anomalies) > seen + 15, "some windows")
    assert not sum(s.suppressed for s in supervisor.summaries)
    refs = [int(a.source_ref) for a in supervisor.anomalies]
    assert all(b == (a + 1) % 400 for a, b in pairwise(refs)), "one window after the other"
    versions = [a.version for a in supervisor.anomalies]
    assert [v for i, v in enumerate(versions) if i == 0 or versions[i - 1] != v] == [
        "1.0.0",
        "1.1.0",
        "1.0.0",
    ]
    done = len(supervisor.anomalies)
    supervisor.until(lambda: windows_of(supervisor) >= done, "the summaries catch up")
    by_activation = {s.activation for s in supervisor.summaries}
    assert by_activation == {0, 1, 2, 3}, "each activation has its own records"


def test_a_load_that_fails_leaves_the_old_version_in_service(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path)
    path = write_csv(tmp_path / "r.csv", samples())
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(path)))
    supervisor.until_state(state="running")
    bad = make_package(tmp_path / "bad", version="2.0.0", threshold=3.0)
    model = Path(bad.files[bad.variant.file.path])
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    supervisor.configure(bad.spec(replay(path), activation=1))
    failed = supervisor.until_state(state="failed")
    assert failed.code == "package.file_mismatch"
    assert (failed.wanted_digest, failed.wanted_activation) == (bad.digest, 1)
    assert (failed.digest, failed.activation) == (package.digest, 0)
    supervisor.until(lambda: supervisor.state().windows > failed.windows, "it goes on")
    assert supervisor.state().state == "failed"
    supervisor.configure(package.spec(replay(path)))
    back = supervisor.until_state(state="running", code=None)
    assert back.windows >= failed.windows, "the same session all the time"


def test_no_product_is_lost_when_the_supervisor_dies(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path, score=EVERY)
    path = write_csv(tmp_path / "r.csv", samples(150))
    first = engine.connect()
    first.configure(package.spec(replay(path, loop=False, rate_hz=100.0)))
    first.until(lambda: len(first.products) > 30, "some products")
    stored = first.products[9].n
    assert stored == 10
    first.stored(stored)
    first.close()
    second = engine.connect()
    second.until(lambda: len(second.anomalies) >= 140, "the rest")
    numbers = [p.n for p in second.products]
    assert second.hello.pid == engine.process.pid
    assert numbers[0] in {1, 11}, "what was stored need not come again"
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    refs = {a.source_ref for a in first.anomalies + second.anomalies}
    second.until(lambda: len({a.source_ref for a in first.anomalies + second.anomalies}) == 150, "all rows")
    assert refs
    second.until_state(state="running")


def test_stored_products_are_forgotten(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path, score=EVERY)
    path = write_csv(tmp_path / "r.csv", samples(20))
    first = engine.connect()
    first.configure(package.spec(replay(path, loop=False)), bucket_s=3600.0)
    first.until(lambda: len(first.anomalies) == 20, "all")
    first.stored(20)
    first.configure(package.spec(replay(path, loop=False)), bucket_s=0.2)
    first.until(lambda: len(first.summaries) > 1, "the engine has read that")
    second = engine.connect()
    second.until(lambda: second.summaries, "what is left")
    assert not second.anomalies
    assert second.products[0].n == 21


def test_a_newer_supervisor_replaces_the_older(engine: Engine):
    older = engine.connect()
    older.until(lambda: older.messages, "hello")
    newer = engine.connect()
    newer.until(lambda: newer.messages, "hello")
    older.until(lambda: older.closed, "the older is cut off")
    assert stat.S_IMODE(engine.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x02\x81\xa1",
        b"\x00\x00\x00\x0e\x81\xa4type\xa7no_such",
        b"\x00\x00\x00\x00",
    ],
    ids=["too long", "not msgpack", "cut off", "unknown type", "empty"],
)
def test_a_malformed_message_closes_the_connection_and_not_the_engine(engine: Engine, data: bytes):
    supervisor = engine.connect()
    supervisor.until(lambda: supervisor.messages, "hello")
    supervisor.sock.sendall(data)
    supervisor.until(lambda: supervisor.closed, "the connection ends")
    again = engine.connect()
    assert again.hello.pid == engine.process.pid


def test_a_model_that_gives_nan_is_errors_and_no_scores(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path, kind="float32.onnx", net=nan_network(3))
    path = write_csv(tmp_path / "r.csv", samples())
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(path)))
    state = supervisor.until_state(code="inference.not_finite")
    assert (state.state, state.windows) == ("running", 0)
    supervisor.until(lambda: sum(s.errors for s in supervisor.summaries) > 10, "errors are counted")
    assert not supervisor.anomalies
    assert windows_of(supervisor) == 0


def test_unusable_samples_are_counted_and_never_scored(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path, score=EVERY, window=2)
    rows = samples(100)
    rows[10, 1], rows[20, 0], rows[30, 2] = np.nan, 5000.0, -5000.0
    path = write_csv(tmp_path / "r.csv", rows)
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(path, loop=False)))
    supervisor.until(lambda: len(supervisor.anomalies) == 99 - 6, "all whole windows")
    refs = {int(a.source_ref) for a in supervisor.anomalies}
    assert refs == set(range(1, 100)) - {10, 11, 20, 21, 30, 31}
    supervisor.until(lambda: sum(s.missing for s in supervisor.summaries) == 3, "they are counted")


def test_alarms_are_counted_exactly_and_sent_within_bounds(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path, score=EVERY)
    path = write_csv(tmp_path / "r.csv", samples(600))
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(path, loop=False, rate_hz=2000.0)))
    supervisor.until(lambda: windows_of(supervisor) == 600, "all windows")
    assert sum(s.alarms for s in supervisor.summaries) == 600
    suppressed = sum(s.suppressed for s in supervisor.summaries)
    assert suppressed == 600 - len(supervisor.anomalies)
    assert 200 <= len(supervisor.anomalies) <= 300


def test_summaries_come_for_every_bucket_even_when_nothing_does(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path)
    path = write_csv(tmp_path / "r.csv", samples(5))
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(path, loop=False)))
    supervisor.until(lambda: len([s for s in supervisor.summaries if s.count == 0]) >= 5, "empty ones")
    starts = [s.bucket_start for s in supervisor.summaries]
    assert all(b - a == 200_000 for a, b in pairwise(starts))
    assert all(start % 200_000 == 0 for start in starts)
    assert windows_of(supervisor) == 5


@pytest.mark.parametrize("bucket_s", [1e-9, 1e300, float("inf")])
def test_a_bucket_that_makes_no_sense_is_bounded(engine: Engine, tmp_path: Path, bucket_s: float):
    package = make_package(tmp_path)
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(write_csv(tmp_path / "r.csv", samples()))), bucket_s=bucket_s)
    state = supervisor.until_state(state="running")
    supervisor.until(lambda: supervisor.state().windows > state.windows, "it runs")
    assert all(s.bucket_s == 0.1 for s in supervisor.summaries)


FIT = Fit(
    samples=50,
    mean_range=((0.0, 100.0),) * 3,
    scale_range=((0.1, 100.0),) * 3,
    quantile=0.9,
    margin=1.0,
    threshold_range=(0.001, 1000.0),
)


def test_a_lane_without_its_fit_calibrates_first_while_the_old_version_serves(engine: Engine, tmp_path: Path):
    old = make_package(tmp_path)
    new = make_package(tmp_path, version="2.0.0", fit=FIT)
    source = replay(write_csv(tmp_path / "r.csv", samples()), rate_hz=100.0)
    supervisor = engine.connect()
    supervisor.configure(old.spec(source))
    before = supervisor.until_state(state="running")
    supervisor.configure(new.spec(source, activation=1))
    seen = supervisor.until_state(state="calibrating")
    assert (seen.digest, seen.wanted_digest) == (old.digest, new.digest)
    running = supervisor.until_state(state="running", digest=new.digest, activation=1)
    assert windows_of(supervisor) > before.windows + 20, "the old version served all the while"
    supervisor.until(lambda: supervisor.fits, "the fit")
    fit = supervisor.fits[-1]
    assert fit.samples == 50
    assert fit.mean == pytest.approx((20,) * 3, abs=3)

    # Another supervisor knows of no fit yet: it is sent again, and nothing is calibrated twice.
    second = engine.connect()
    second.configure(new.spec(source, activation=1))
    second.until(lambda: second.fits == [fit], "the fit once more")
    second.configure(new.spec(source, activation=1, fit=fit))
    second.until(lambda: second.state().windows > running.windows, "still the same session")
    assert len([1 for line in engine.log.splitlines() if "lane.swapped" in line]) == 2
    third = engine.connect()
    third.until_state(state="running")
    assert not third.fits, "it came back in the spec"

    # With another activation the fit is in use from the start.
    third.configure(new.spec(source, activation=2, fit=fit))
    third.until_state(state="running", activation=2)
    third.until(lambda: third.anomalies, "alarms")
    assert third.anomalies[-1].threshold == fit.threshold
    assert not [m for m in third.messages if getattr(m, "state", "") == "calibrating"]


def test_another_binding_is_another_calibration_while_the_old_fit_serves(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path, fit=FIT)
    source = replay(write_csv(tmp_path / "r.csv", samples()), rate_hz=100.0)
    supervisor = engine.connect()
    supervisor.configure(package.spec(source, binding="first"))
    supervisor.until(lambda: supervisor.fits, "a fit")
    first = supervisor.fits[-1]
    assert first.binding == "first"
    supervisor.configure(package.spec(source, binding="first", fit=first))
    before = supervisor.until_state(state="running")

    supervisor.configure(package.spec(source, binding="second"))
    seen = supervisor.until_state(state="calibrating")
    assert seen.digest == package.digest, "the old fit serves"
    supervisor.until(lambda: supervisor.fits[-1].binding == "second", "another fit")
    supervisor.until_state(state="running")
    assert windows_of(supervisor) > before.windows + 20


def test_what_is_fitted_to_one_source_never_judges_another(engine: Engine, tmp_path: Path):
    """The second source has other values; by the first one's fit each of its rows would be an alarm."""
    package = make_package(tmp_path, fit=FIT)
    sources = [replay(write_csv(tmp_path / f"{i}.csv", 400 * i + samples()), rate_hz=100.0) for i in range(2)]
    supervisor = engine.connect()
    supervisor.configure(package.spec(sources[0], binding="first"))
    supervisor.until(lambda: supervisor.fits, "a fit")
    supervisor.until_state(state="running")
    supervisor.configure(package.spec(sources[1], binding="second"))
    supervisor.until(lambda: supervisor.fits[-1].binding == "second", "a fit to the other source")
    supervisor.until_state(state="running")
    assert supervisor.fits[-1].mean[0] == 100, "clamped to its range"
    rows = {
        int(a.source_ref) % 40 for a in supervisor.anomalies if a.threshold == supervisor.fits[0].threshold
    }
    assert len(rows) < 20, "ordinary rows of the second source were judged by the first one's fit"


def test_a_calibration_that_is_not_wanted_any_more_never_serves(tmp_path: Path):
    """The fit was under way in the loader's thread when another version was ordered."""
    first, second = make_package(tmp_path, fit=FIT), make_package(tmp_path, version="2.0.0", fit=FIT)
    clock = Clock(wall=lambda: time.time_ns() // 1000, mono=lambda: time.monotonic_ns() // 1000)
    lane = Lane(second.spec({}), 1.0, Outlet(clock, lambda: None), Loader(), clock)
    for result in (FitResult((20.0,) * 3, (3.0,) * 3, 1.0, 50, 0), PitheadError("inference.not_finite")):
        lane._candidate = served = load(first.spec({}))
        lane._fits.append((served, result))
        lane._take_fits(second.spec({}))
        assert (lane._serving, lane._candidate, lane._refused) == (None, None, None)
        served.session.close()


def test_a_calibration_without_a_source_says_so(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path, fit=FIT)
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(tmp_path / "later.csv")))
    failed = supervisor.until_state(state="failed")
    assert (failed.code, failed.digest, failed.wanted_digest) == ("source.failed", None, package.digest)
    write_csv(tmp_path / "later.csv", samples())
    supervisor.until_state(state="running", code=None)


def test_a_lane_computes_features_between_window_and_model(engine: Engine, tmp_path: Path):
    features = (Statistics(("mean", "rms", "kurtosis")), Bands(((5.0, 20.0), (20.0, 51.0)), decibel=True))
    package = make_package(tmp_path, window=20, stride=5, features=features, score=EVERY)
    rows = samples(200)
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(write_csv(tmp_path / "r.csv", rows), rate_hz=100.0, speed=10)))
    ends = range(19, 200, 5)
    supervisor.until(lambda: len(supervisor.anomalies) >= len(ends), "all windows are there")

    raw = np.stack([rows[e - 19 : e + 1] for e in ends])
    x = Features(package.pipeline).of(np.clip((raw - 20) / 3, -6, 6).astype(np.float32))
    anomalies = supervisor.anomalies[: len(ends)]
    assert [a.score for a in anomalies] == bare_tflite(package.model(), x)
    assert all(set(a.contributions) == set(CHANNELS) for a in anomalies)
    assert all(sum(a.contributions.values()) == pytest.approx(1) for a in anomalies)

    supervisor.configure(package.spec(replay(tmp_path / "r.csv", rate_hz=50.0)))
    assert "bands in Hz" in supervisor.until_state(state="failed", code="config.invalid").detail


def test_the_latency_is_that_of_the_model(engine: Engine, tmp_path: Path):
    random = np.random.default_rng(0)
    sizes = [(1500, 3), (1500, 1500), (3, 1500)]
    layers = tuple(Layer(random.normal(0, 0.01, s), np.zeros(s[0]), relu=False) for s in sizes)
    small = make_package(tmp_path, kind="float32.onnx")
    large = make_package(tmp_path / "l", kind="float32.onnx", version="2.0.0", net=Network(layers))
    source = replay(write_csv(tmp_path / "r.csv", samples()), rate_hz=50.0)
    supervisor = engine.connect()
    medians = []
    for package in (small, large):
        supervisor.configure(package.spec(source))
        supervisor.until_state(state="running", digest=package.digest)
        version = package.manifest.version
        supervisor.until(
            lambda version=version: sum(s.count for s in supervisor.summaries if s.version == version) > 50,
            "some windows",
        )
        mine = [s.latency_us for s in supervisor.summaries if s.version == version and s.latency_us]
        medians.append(quantile(merge(mine), 0.5))
    assert medians[0] is not None
    assert medians[1] is not None
    assert 0 < medians[0] < medians[1] < 1e6


def test_a_source_that_fails_is_tried_again(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path)
    path = tmp_path / "later.csv"
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(path)))
    failed = supervisor.until_state(state="failed")
    assert failed.code == "source.failed"
    assert "later.csv" in failed.detail
    write_csv(path, samples())
    supervisor.until_state(state="running", code=None)
    supervisor.until(lambda: windows_of(supervisor) > 0, "it runs")


def test_a_wrong_setting_names_its_key_and_a_right_one_helps(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path)
    path = write_csv(tmp_path / "r.csv", samples())
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(path, colums=["a"])))
    failed = supervisor.until_state(code="config.invalid")
    assert "colums" in failed.detail
    supervisor.configure(package.spec(replay(path)))
    supervisor.until_state(state="running", code=None)


def test_lanes_stop_when_they_are_not_wanted(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path)
    source = replay(write_csv(tmp_path / "r.csv", samples()))
    threads = Path(f"/proc/{engine.process.pid}/task")
    supervisor = engine.connect()
    supervisor.configure(package.spec(source))
    supervisor.until_state("one", state="running")
    alone = len(list(threads.iterdir()))
    supervisor.configure(package.spec(source), package.spec(source, lane="two"))
    supervisor.until_state("two", state="running")
    assert len(list(threads.iterdir())) == alone + 1
    supervisor.configure(package.spec(source))
    until(lambda: len(list(threads.iterdir())) == alone, "its thread ends")
    seen = supervisor.state("one").windows
    supervisor.until(lambda: supervisor.state("one").windows > seen, "the other goes on")


def test_sigterm_hands_over_what_is_left_and_ends(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path)
    source = replay(write_csv(tmp_path / "r.csv", samples()), rate_hz=100.0)
    supervisor = engine.connect()
    supervisor.configure(package.spec(source), bucket_s=3600.0)
    supervisor.until(lambda: (s := supervisor.state()) and s.windows > 10, "some windows")
    engine.process.send_signal(signal.SIGTERM)
    supervisor.until(lambda: supervisor.summaries, "the bucket at hand")
    supervisor.stored(supervisor.products[-1].n)
    assert engine.process.wait(5) == 0
    assert windows_of(supervisor) > 10
    assert not engine.path.exists()


def test_an_engine_ends_when_another_takes_its_socket(engine: Engine):
    assert engine.connect().hello.pid == engine.process.pid
    before = engine.path.stat().st_ino
    other = start_engine(engine.path)
    try:
        until(lambda: engine.path.stat().st_ino != before, "the other listens")
        assert engine.process.wait(10) == 0
        assert engine.path.exists(), "the socket of the other stays"
        assert other.connect().hello.pid == other.process.pid
        assert other.stop() == 0
    finally:
        other.end()


def test_a_socket_that_cannot_be_made_is_named(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-m", "agent.engine", "--socket", str(tmp_path / "no" / "e.sock")],
        capture_output=True,
        check=False,
        timeout=20,
    )
    assert result.returncode == 2
    assert b"config.invalid: --socket" in result.stderr


def test_the_socket_may_lie_deeper_than_an_address_is_long(tmp_path: Path):
    deep = tmp_path / ("floor" * 30) / ("line" * 30)
    deep.mkdir(parents=True)
    other = start_engine(deep / "engine.sock")
    try:
        assert other.connect().hello.pid == other.process.pid
        assert other.stop() == 0
    finally:
        other.end()
    assert list(deep.glob("*.sock*")) == [], "nothing is left behind"
