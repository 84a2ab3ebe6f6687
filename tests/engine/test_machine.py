"""A machine that does not run mutes its lane: alarms, scores and calibration."""

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.layout import Layout
from agent.core.machine import Machine
from agent.core.settings import parse
from agent.engine.machine import Mask, check
from agent.engine.sources import open_source
from agent.engine.sources.http import Order, Refused, decoded
from agent.engine.sources.marks import Mark, Marks, Texts
from agent.engine.window import Windower
from agent.ports import LaneState
from agent.wiring import read_settings
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from tests.engine.conftest import CHANNELS, Engine, Supervisor, make_package, samples, until
from tests.engine.test_engine import EVERY, FIT, replay, windows_of
from tests.engine.test_mqtt import CLOCK, Broker, broker, closing  # noqa: F401 - fixtures
from tests.engine.test_source_check import checked, configure
from tests.engine.test_source_modbus import Plc, plc, tag  # noqa: F401 - a fixture

SECOND = 1_000_000
NAN = float("nan")


def mask(**changes: Any) -> Mask:
    return Mask(msgspec.convert({"tag": "s", "runs": [2]} | changes, Machine), Texts())


def judged(one: Mask, states: list[float], *, first: int = 0, recipes: list[float] | None = None) -> Any:
    """Judge rows a second apart; return (muted, unfit) as 0 and 1."""
    t = (1000 + first + np.arange(len(states))) * SECOND
    columns = [states] if recipes is None else [states, recipes]
    found = one.judge(t.astype(np.int64), np.array(columns, np.float64).T)
    assert found.muted is not None
    assert found.unfit is not None
    return found.muted.astype(int).tolist(), found.unfit.astype(int).tolist()


@pytest.mark.parametrize(
    ("runs", "states", "muted"),
    [
        ([2], [0, 1, 2, 3], [1, 1, 0, 1]),
        ([1, 3], [0, 1, 2, 3], [1, 0, 1, 0]),
        ([[50, 100]], [49.9, 50, 100, 100.1], [1, 0, 0, 1]),
        ([[50, float("inf")], 7], [49, 1e9, 7, 8], [1, 0, 0, 1]),
        (["on", "set-up"], [0, 1, 2, 3], [1, 0, 0, 1]),
    ],
)
def test_which_states_run(runs: list[Any], states: list[float], muted: list[int]):
    assert judged(mask(runs=runs, states={"1": "on", "2": "set-up"}), states)[0] == muted


def test_a_change_to_running_settles_and_a_start_does_not():
    one = mask(settle_s=2)
    muted, unfit = judged(one, [2, 2, 2, 0, 2, 2, 2])
    assert muted == [0, 0, 0, 1, 1, 1, 0]
    assert unfit == [1, 1, 0, 1, 1, 1, 0], "how long it has run before the start is not known"
    assert judged(one, [0, 2], first=7)[0] == [1, 1]
    assert (one.state, one.muted) == ("settling", "the machine settles for 2 s")
    assert judged(one, [2, 2], first=9)[0] == [1, 0], "over the end of a batch"
    assert (one.state, one.muted) == ("runs", "")


def test_another_recipe_settles():
    one = mask(settle_s=2, recipe="r")
    assert judged(one, [2] * 7, recipes=[NAN, 7, 7, 8, NAN, 8, 8])[0] == [0, 0, 0, 1, 1, 0, 0]
    assert judged(one, [2] * 3, first=7, recipes=[NAN, 9, 9])[0] == [0, 1, 1]
    assert one.recipe() == "9"


def test_an_unknown_state_holds_then_runs_but_never_for_a_fit():
    one = mask(hold_s=2)
    assert judged(one, [2, NAN, NAN, NAN, NAN, 2]) == ([0] * 6, [0, 0, 0, 1, 1, 0])
    one = mask(hold_s=2)
    assert judged(one, [0, NAN, NAN]) == ([1] * 3, [1] * 3), "a stopped machine is stopped for a while"
    assert judged(one, [NAN, NAN], first=3) == ([0, 0], [1, 1])
    assert (one.state, one.muted) == ("unknown", "")
    one = mask(hold_s=2, unknown="muted")
    assert judged(one, [2, NAN, NAN, NAN, 2])[0] == [0, 0, 0, 1, 0]
    assert judged(one, [NAN] * 4, first=5)[0] == [0, 0, 1, 1]
    assert one.muted == "the state of the machine is unknown"


def test_the_first_state_is_waited_for():
    one = mask(hold_s=3, settle_s=2)
    assert judged(one, [NAN, NAN])[0] == [1, 1]
    assert judged(one, [2, 2], first=2)[0] == [0, 0], "what was there before it was heard is no change"
    assert judged(mask(hold_s=3), [NAN] * 5)[0] == [1, 1, 1, 0, 0], "not for ever"
    assert judged(mask(hold_s=3), [NAN, 0, 2])[0] == [1, 1, 0]


def test_a_clock_that_is_set_back_does_not_mute_for_long():
    one = mask(settle_s=5)
    assert judged(one, [0, 2, 2], first=10_000)[0] == [1, 1, 1]
    assert judged(one, [2] * 7)[0] == [1, 1, 1, 1, 1, 0, 0]


def test_what_is_said_has_names_and_stays_the_same():
    one = mask(states={"0": "stopped", "1": "set-up"})
    judged(one, [2, 1])
    assert (one.state, one.muted, one.shown()) == (
        "stopped",
        "the machine does not run: set-up",
        "1 (set-up)",
    )
    one = mask(runs=[[50, 3000]])
    said = []
    for speed in (10.0, 11.0, 12.5):
        judged(one, [speed])
        said.append(one.muted)
    assert set(said) == {"the machine does not run"}, "not a new text with each row"


def naive(machine: Machine, t: list[int], states: list[float], recipes: list[float]) -> list[bool]:
    """The definition, row by row."""
    held, held_at, ran, since, recipe, began, found = None, 0, None, -(2**62), None, t[0], []
    for at, state, made in zip(t, states, recipes, strict=True):
        if not np.isnan(state):
            held, held_at = state, at
        waits = held is None and at < began + machine.hold_s * SECOND
        known = held is not None and at - held_at <= machine.hold_s * SECOND
        runs = not waits and (held == 2 if known else machine.unknown == "runs")
        if runs and ran is False:
            since = at
        ran = None if waits else runs
        if not np.isnan(made):
            if recipe is not None and made != recipe:
                since = at
            recipe = made
        found.append(not runs or at < since + machine.settle_s * SECOND)
    return found


@given(
    states=st.lists(st.sampled_from([0.0, 2.0, 2.0, NAN]), min_size=1, max_size=40),
    recipes=st.lists(st.sampled_from([1.0, 1.0, 2.0, NAN]), min_size=40, max_size=40),
    cuts=st.lists(st.integers(1, 9), max_size=10),
    settle=st.integers(0, 3),
    hold=st.integers(0, 3),
    unknown=st.sampled_from(["runs", "muted"]),
)
def test_the_mask_is_the_naive_one_however_the_rows_come(
    states: list[float], recipes: list[float], cuts: list[int], settle: int, hold: int, unknown: str
):
    one = mask(settle_s=settle, hold_s=hold, unknown=unknown, recipe="r")
    t = [(1000 + i) * SECOND for i in range(len(states))]
    recipes = recipes[: len(states)]
    seen: list[bool] = []
    for size in [*cuts, len(states)]:
        part = slice(len(seen), len(seen) + size)
        if not states[part]:
            break
        marks = np.array([states[part], recipes[part]]).T
        result = one.judge(np.array(t[part], np.int64), marks)
        assert result.muted is not None
        seen += result.muted.tolist()
    assert seen == naive(one._machine, t, states, recipes)


@given(
    window=st.integers(1, 6),
    stride=st.integers(1, 7),
    rows=st.lists(st.sampled_from(["good", "good", "muted", "bad"]), max_size=50),
    cuts=st.lists(st.integers(0, 9), max_size=10),
)
def test_windows_that_touch_a_muted_row_are_left_out_and_counted(
    window: int, stride: int, rows: list[str], cuts: list[int]
):
    windower, ends, muted, start = Windower(window, stride, 1), [], 0, 0
    for size in [*cuts, len(rows)]:
        part = rows[start : start + size]
        made = windower.push(
            np.zeros((len(part), 1)),
            np.array([r != "bad" for r in part], np.bool_),
            muted=np.array([r == "muted" for r in part], np.bool_),
        )
        ends += (made.ends + start).tolist()
        muted += made.muted
        start += len(part)
    whole = [(end, rows[end - window + 1 : end + 1]) for end in range(window - 1, len(rows), stride)]
    assert ends == [end for end, touched in whole if set(touched) == {"good"}]
    assert muted == sum("muted" in touched for _, touched in whole)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"tag": "s", "runs": []}, "length >= 1"),
        ({"tag": "", "runs": [1]}, "length >= 1"),
        ({"tag": "s", "runs": [[5, 1]]}, "is no range"),
        ({"tag": "s", "runs": [1], "states": {"on": "running"}}, "is no number"),
        ({"tag": "s", "runs": [1], "states": {"1": "a", "1.0": "b"}}, "stands twice"),
        ({"tag": "s", "runs": ["onn"], "states": {"1": "on"}}, "no state is named 'onn'"),
        ({"tag": "s", "runs": [1], "settles": 5}, "settles"),
        ({"tag": "s", "runs": [1], "unknown": "stopped"}, "unknown"),
        ({"tag": "s", "runs": [1], "source": {"kind": "morse"}}, "machine.source.kind 'morse'"),
    ],
)
def test_what_is_wrong_with_the_table_is_named(table: dict[str, Any], words: str):
    lane = {"name": "press", "model": "demo", "source": {"kind": "system"}, "machine": table}
    with pytest.raises(PitheadError, match=words) as refused:
        parse({"lanes": [lane]})
    assert refused.value.code == "config.invalid"


@pytest.mark.parametrize(
    ("source", "machine", "words"),
    [
        ({"kind": "images", "path": "p", "width": 8, "height": 8}, {}, "pictures come without a state"),
        ({"kind": "replay", "path": "p"}, {"datatype": "int16"}, "datatype means nothing"),
        ({"kind": "system"}, {"source": {"kind": "modbus"}}, "host"),
    ],
)
def test_doctor_sees_what_cannot_work(source: dict[str, Any], machine: dict[str, Any], words: str):
    given_machine = msgspec.convert({"tag": "s", "runs": [1]} | machine, Machine)
    with pytest.raises(PitheadError, match=words):
        check(source, given_machine)


def pipeline(names: tuple[str, ...] = CHANNELS) -> Pipeline:
    width = len(names)
    return Pipeline(
        tuple(Channel(n) for n in names), 1, 1, (0.0,) * width, (1.0,) * width, sample_rate_hz=1e5
    )


def recording(path: Path, states: list[str]) -> Path:
    rows = samples(len(states)).tolist()
    lines = ["a,b,c,state"] + [",".join([*map(str, row), s]) for row, s in zip(rows, states, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_text_is_a_state_in_a_recording_and_a_channel_is_never_a_text(tmp_path: Path):
    states = ["RUN", "RUN", "", "STOP", "2"]
    path, texts = recording(tmp_path / "r.csv", states), Texts()
    table: dict[str, Any] = {"kind": "replay", "path": str(path), "loop": False}
    source = open_source(table, pipeline(), CLOCK, Marks((("state", ""),), texts))
    batch = until(lambda: source.backlog() == len(states) and source.poll(100), "all rows")
    assert batch.values.shape == (5, 3)
    assert batch.marks[:, 0].tolist() == pytest.approx(
        [texts.number("RUN"), texts.number("RUN"), NAN, texts.number("STOP"), 2.0], nan_ok=True
    )
    assert texts.text(batch.marks[0, 0]) == "RUN"
    with pytest.raises(PitheadError, match="could not convert"):
        open_source(table, pipeline((*CHANNELS, "state")), CLOCK)


def test_texts_of_parquet_and_numbers_of_numpy(tmp_path: Path):
    import pyarrow as pa  # noqa: PLC0415 - only here
    import pyarrow.parquet as pq  # noqa: PLC0415

    columns = {name: [1.0, 2.0] for name in CHANNELS}
    pq.write_table(pa.table(columns | {"state": ["RUN", None]}), tmp_path / "r.parquet")
    np.savez(tmp_path / "r.npz", **{k: np.array(v) for k, v in columns.items()}, state=np.array([2, 0]))
    texts = Texts()
    for name, expected in (("r.parquet", [texts.number("RUN"), NAN]), ("r.npz", [2.0, 0.0])):
        table: dict[str, Any] = {"kind": "replay", "path": str(tmp_path / name), "loop": False}
        source = open_source(table, pipeline(), CLOCK, Marks((("state", ""),), texts))
        batch = until(lambda s=source: s.backlog() == 2 and s.poll(100), "all rows")
        assert batch.marks[:, 0].tolist() == pytest.approx(expected, nan_ok=True)


def test_a_pushed_row_may_say_its_state_in_words():
    texts = Texts()
    order = Order(("a", "state"), None, (Channel("a"), Mark(name="state", texts=texts)))
    body = b'[{"values": {"a": 1, "state": "RUN"}}, {"values": [2, null]}]'
    (stretch,), _ = order.sort(decoded(body, b""), 1_800_000_000_000_000)
    assert [values for _, values in stretch.rows] == [
        [1.0, texts.number("RUN")],
        pytest.approx([2.0, NAN], nan_ok=True),
    ]
    with pytest.raises(Refused, match="channel 'a'"):
        order.sort(decoded(b'{"values": {"a": "RUN", "state": 1}}', b""), 1_800_000_001_000_000)


# ---- through real engines


def machine(**changes: Any) -> Machine:
    return msgspec.convert({"tag": "state", "runs": [2]} | changes, Machine)


def told(supervisor: Supervisor) -> list[tuple[str, str]]:
    """Return the states of the machine that were told so far; short ones come and go unseen by ``state``."""
    return [(m.machine, m.muted) for m in supervisor.messages if isinstance(m, LaneState)]


def test_windows_of_a_stopped_machine_are_not_scored_and_are_counted(engine: Engine, tmp_path: Path):
    states = ["2"] * 40 + ["0"] * 30 + ["2"] * 50
    package = make_package(tmp_path, score=EVERY, window=3)
    path = recording(tmp_path / "r.csv", states)
    supervisor = engine.connect()
    supervisor.configure(
        package.spec(replay(path, loop=False, rate_hz=100.0), machine=machine(settle_s=0.095))
    )
    supervisor.until(lambda: ("stopped", "the machine does not run") in told(supervisor), "stopped")
    supervisor.until_state(machine="runs", muted="")
    whole = set(range(2, 40)) | set(range(82, 120))  # ten rows settle, and two more stand in their windows
    supervisor.until(lambda: windows_of(supervisor) == len(whole), "all windows")
    assert {int(a.source_ref) for a in supervisor.anomalies} == whole
    supervisor.until(lambda: sum(s.muted for s in supervisor.summaries) == 118 - len(whole), "counted")
    assert sum(s.score.count for s in supervisor.summaries if s.score) == len(whole), "none in the sketch"
    assert sum(s.missing for s in supervisor.summaries) == 0


def test_a_calibration_learns_nothing_of_a_stopped_machine(engine: Engine, tmp_path: Path):
    rows = samples(400)
    rows[:200] = 90.0  # it stands
    state = np.array([0.0] * 200 + [2.0] * 200)
    path = tmp_path / "r.npz"
    np.savez(path, **{name: rows[:, i] for i, name in enumerate(CHANNELS)}, state=state)
    package = make_package(tmp_path, fit=FIT)
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(path, loop=False), machine=machine()))
    waiting = supervisor.until_state(state="calibrating", machine="stopped")
    assert waiting.progress == 0
    supervisor.until_state(state="running")
    supervisor.until(lambda: supervisor.fits, "the fit")
    assert supervisor.fits[-1].mean == pytest.approx((20,) * 3, abs=3)


def test_another_table_neither_loads_nor_fits_anew(engine: Engine, tmp_path: Path):
    package = make_package(tmp_path, fit=msgspec.structs.replace(FIT, samples=10))
    path = recording(tmp_path / "r.csv", ["2"] * 400)
    source = replay(path)
    supervisor = engine.connect()
    supervisor.configure(package.spec(source, machine=machine()))
    supervisor.until_state(state="running")
    for table, wanted in (
        (machine(runs=[1]), {"machine": "stopped"}),
        (machine(runs=[1, 2]), {"machine": "runs", "muted": ""}),
        (machine(tag="a", runs=[[1e6, 2e6]]), {"machine": "stopped"}),
        (None, {"machine": None, "muted": ""}),
    ):
        supervisor.configure(package.spec(source, machine=table))
        supervisor.until_state(state="running", **wanted)
    before = supervisor.state().windows
    supervisor.until(lambda: supervisor.state().windows > before, "it goes on")
    assert engine.log.count("lane.swapped") == 1
    assert len({f.t for f in supervisor.fits}) == 1


def test_the_state_comes_from_a_controller_and_the_samples_from_elsewhere(
    engine: Engine,
    plc: Plc,  # noqa: F811 - the fixture
    tmp_path: Path,
):
    package = make_package(tmp_path)
    plc.write(3, 5, [2])
    table = machine(
        tag="holding:5",
        hold_s=0.2,
        source={"kind": "modbus", "host": "127.0.0.1", "port": plc.port, "rate_hz": 50.0},
    )
    supervisor = engine.connect()
    supervisor.configure(package.spec(replay(recording(tmp_path / "r.csv", ["1"] * 400)), machine=table))
    supervisor.until_state(machine="runs", muted="")
    plc.write(3, 5, [0])
    muted = supervisor.until_state(machine="stopped")
    supervisor.until(lambda: len(supervisor.summaries) and supervisor.summaries[-1].muted > 0, "counted")
    plc.write(3, 5, [2])
    supervisor.until_state(machine="runs")
    supervisor.until(lambda: supervisor.state().windows > muted.windows, "it goes on")
    plc.hold.clear()  # the controller does not answer any more
    unknown = supervisor.until_state(machine="unknown", muted="")
    supervisor.until(lambda: supervisor.state().windows > unknown.windows, "a broken wire mutes nothing")
    assert supervisor.state().state == "running"


def test_a_register_beside_the_samples_mutes(engine: Engine, plc: Plc, tmp_path: Path):  # noqa: F811
    package = make_package(tmp_path)
    plc.write(3, 0, [20, 20, 20, 2])
    source = {
        "kind": "modbus",
        "host": "127.0.0.1",
        "port": plc.port,
        "rate_hz": 50.0,
        "tags": [tag(name, f"holding:{i}", "uint16") for i, name in enumerate(CHANNELS)],
    }
    table = machine(tag="holding:3.1", runs=[1])
    supervisor = engine.connect()
    supervisor.configure(package.spec(source, machine=table))
    supervisor.until_state(machine="runs")
    plc.asked.clear()
    until(lambda: len(plc.asked) > 3, "it is read")
    assert set(plc.asked) == {(3, 0, 4)}, "with the samples, by one request"
    plc.write(3, 3, [1])
    supervisor.until_state(machine="stopped", muted="the machine does not run")
    plc.write(3, 3, [3])
    running = supervisor.until_state(machine="runs")
    supervisor.until(lambda: supervisor.state().windows > running.windows, "it goes on")


def test_a_topic_of_the_state_waits_for_nothing(
    broker: Broker,  # noqa: F811 - the fixture
    closing: list[Any],  # noqa: F811
):
    publisher = broker.publisher()
    closing.append(publisher)
    texts = Texts()
    table: dict[str, Any] = {"kind": "mqtt", "port": broker.port, "topics": ["p/a", "p/b"]}
    publisher.publish("p/state", b"RUN", qos=1, retain=True).wait_for_publish(5)
    source = open_source(table, pipeline(("a", "b")), CLOCK, Marks((("p/state", ""),), texts))
    closing.append(source)
    until(lambda: source.poll(1), "the source is subscribed")
    rows: list[tuple[list[float], float]] = []

    def came(n: int) -> bool:
        if (batch := source.poll(10)) is not None and batch.marks is not None:
            rows.extend(zip(batch.values.tolist(), batch.marks[:, 0].tolist(), strict=True))
        return len(rows) >= n

    def publish(topic: str, payload: bytes) -> None:
        publisher.publish(topic, payload, qos=1).wait_for_publish(5)

    for value in (b"1", b"2"):
        publish("p/a", value)
        publish("p/b", value)
    until(lambda: came(2), "two rows, one state")
    publish("p/state", b'"STOP"')
    publish("p/a", b"3")
    publish("p/b", b"3")
    until(lambda: came(3), "a third")
    run, stop = texts.number("RUN"), texts.number("STOP")
    assert rows == [([1, 1], run), ([2, 2], run), ([3, 3], stop)]


def test_check_source_shows_the_state_live(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plc = Plc()  # noqa: F811
    try:
        plc.write(3, 0, [1234, 1])
        source = (
            f'kind = "modbus"\nhost = "127.0.0.1"\nport = {plc.port}\nrate_hz = 20.0\n'
            'tags = [{ channel = "t", address = "holding:0" }]\n'
            '[lanes.machine]\ntag = "holding:1"\nruns = ["production"]\n'
            'states = { 1 = "set-up", 2 = "production" }\n'
        )
        configure(tmp_path, source)
        code, seen = checked(tmp_path, "--seconds", "1", capsys=capsys)
        assert code == 0, seen
        assert seen["machine"] == {
            "tag": "holding:1",
            "value": "1 (set-up)",
            "state": "stopped",
            "muted": "the machine does not run: set-up",
            "recipe": None,
            "missing": 0,
            "result": "ok",
        }
        plc.write(3, 1, [2])
        checked_text(tmp_path, "machine holding:1 = 2 (production), runs", capsys)
    finally:
        plc.end()


PAGE = (Path(__file__).parents[2] / "docs/lanes.md").read_text()


@pytest.mark.parametrize("text", re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
def test_every_example_of_the_page_is_one(text: str, tmp_path: Path):
    layout = Layout(tmp_path)
    layout.config.parent.mkdir(parents=True)
    layout.config.write_text(text)
    (lane,) = read_settings(layout).lanes
    check(lane.source, lane.machine)


def test_every_setting_is_on_the_page():
    assert all(f"`{name}`" in PAGE for name in Machine.__struct_fields__)


def checked_text(root: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from agent.__main__ import main  # noqa: PLC0415 - as the test of check-source does

    assert main(["check-source", "press", "--root", str(root), "--seconds", "0.5"]) == 0
    assert words in capsys.readouterr().out
