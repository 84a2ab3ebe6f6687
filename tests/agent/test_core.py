"""The agent's other pure rules: judging a trial, back-off, outbox, variants, settings, receipts."""

import itertools
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core import backoff, health, outbox, settings, standing, variants
from agent.core.blame import Sentence, Suspect, sentence
from agent.core.health import Judgement, LaneSeen
from agent.core.slots import Installed, Serving, Slots
from contract.errors import PitheadError
from contract.manifest import FileRef, Golden, Manifest, Provenance, TensorSpec, Variant
from contract.messages import AckRange, AssignmentState, PriorityClass

RUNNING = LaneSeen("a", "running", serves=True, windows=5)


@dataclass
class Trial:
    """Looks at a trial as the supervisor does."""

    starts: int = 0
    watch: health.Watch | None = None
    now: float = field(default=100.0)
    scored: int = 0

    def look(self, *lanes: LaneSeen, after: float = 0.0, scoring: bool = True) -> health.Verdict:
        self.now += after
        if scoring:
            lanes = tuple(
                msgspec.structs.replace(s, windows=s.windows + self.scored) if s.windows else s for s in lanes
            )
            self.scored += 1
        self.watch = health.watch(self.watch, lanes, self.now)
        return health.judge(self.watch, lanes, self.now, trial_s=10.0, starts=self.starts)


def test_a_trial_is_good_after_its_time_in_service():
    trial = Trial()
    assert trial.look(RUNNING).judgement is Judgement.PENDING
    assert trial.look(RUNNING, after=9.9).judgement is Judgement.PENDING
    assert trial.look(RUNNING, after=0.2).judgement is Judgement.GOOD


def test_without_windows_it_is_never_good():
    idle = msgspec.structs.replace(RUNNING, windows=0)
    trial = Trial()
    trial.look(idle)
    assert trial.look(idle, after=1000.0).judgement is Judgement.PENDING


def test_the_time_counts_from_when_all_lanes_serve_the_trial():
    trial, old = Trial(), LaneSeen("b", "running")
    trial.look(RUNNING, old)
    assert trial.look(RUNNING, old, after=20.0).judgement is Judgement.PENDING
    trial.look(RUNNING, RUNNING)
    assert trial.look(RUNNING, RUNNING, after=10.0).judgement is Judgement.GOOD


def test_a_calibration_may_take_its_time():
    trial, calibrating = Trial(), LaneSeen("a", "calibrating", serves=True)
    for _ in range(10):
        assert trial.look(calibrating, after=health.LOAD_S).judgement is Judgement.PENDING
    trial.look(RUNNING, after=1.0)
    assert trial.look(RUNNING, after=10.0).judgement is Judgement.GOOD


@pytest.mark.parametrize(
    "lane",
    [
        LaneSeen("a", "failed", serves=True, code="inference.run_failed"),
        LaneSeen("a", "running", serves=False, code="inference.load_failed"),
        LaneSeen("a", "failed"),
        LaneSeen("a", "running", serves=True, windows=20, errors=3),
    ],
)
def test_failures_and_errors_are_bad_at_once(lane: LaneSeen):
    verdict = Trial().look(lane)
    assert verdict.judgement is Judgement.BAD
    assert verdict.code == "trial.unhealthy"


def test_a_rare_error_is_not_bad():
    lane = LaneSeen("a", "running", serves=True, windows=1000, errors=3)
    assert Trial().look(lane).judgement is Judgement.PENDING


def test_a_broken_sensor_is_not_the_version_s_fault_for_a_while():
    trial, lane = Trial(), LaneSeen("a", "failed", serves=True, code="source.failed")
    assert trial.look(lane).judgement is Judgement.PENDING
    assert trial.look(lane, after=health.LOAD_S + 1).judgement is Judgement.PENDING
    assert trial.look(lane, after=health.SOURCE_S).judgement is Judgement.BAD


def test_a_session_that_never_serves_is_bad():
    trial = Trial()
    trial.look(LaneSeen("a"))
    assert trial.look(LaneSeen("a"), after=health.LOAD_S).judgement is Judgement.BAD


def test_a_wrong_setting_is_the_version_s_fault_only_where_the_source_has_worked():
    lane = LaneSeen("a", "failed", serves=True, code="config.invalid")
    assert Trial().look(lane).judgement is Judgement.PENDING
    worked = msgspec.structs.replace(lane, source_works=True)
    assert Trial().look(worked).judgement is Judgement.BAD


def test_a_lane_that_falls_silent_is_not_good():
    trial, silent = Trial(), msgspec.structs.replace(RUNNING, state="silent")
    trial.look(RUNNING)
    for _ in range(8):
        assert trial.look(silent, after=2.0).judgement is Judgement.PENDING
    trial.look(RUNNING, after=1.0)
    assert trial.look(RUNNING, after=9.0).judgement is Judgement.PENDING
    assert trial.look(RUNNING, after=1.0).judgement is Judgement.GOOD


def test_a_source_that_stops_neither_confirms_nor_ends_a_trial():
    trial = Trial()
    trial.look(RUNNING)
    for _ in range(4):
        verdict = trial.look(RUNNING, after=health.SOURCE_S, scoring=False)
        assert verdict.judgement is Judgement.PENDING
    assert trial.look(msgspec.structs.replace(RUNNING, windows=6)).judgement is Judgement.GOOD


def test_a_confirmed_version_is_bad_when_it_cannot_serve_for_long():
    failed = LaneSeen("a", "failed", code="inference.load_failed")
    assert health.judge_confirmed([failed], health.LOAD_S - 1, 0).judgement is Judgement.PENDING
    assert health.judge_confirmed([failed], health.LOAD_S, 0).judgement is Judgement.BAD
    assert health.judge_confirmed([RUNNING], 0.0, health.MAX_DEATHS - 1).judgement is Judgement.PENDING
    verdict = health.judge_confirmed([RUNNING], 0.0, health.MAX_DEATHS)
    assert (verdict.judgement, verdict.code) == (Judgement.BAD, "trial.crashed")
    for code in ("source.failed", "config.invalid", "package.file_mismatch"):
        blameless = LaneSeen("a", "failed", serves=True, code=code)
        assert health.judge_confirmed([blameless], 1e6, 0).judgement is Judgement.PENDING


def serving(version: str, confirmed_at: int = 0) -> Serving:
    return Serving(Installed(version, version[0] * 64, "int8", "cpu", {}), confirmed_at=confirmed_at)


def suspect(model: str, version: str) -> Suspect:
    return Suspect(model, version[0] * 64, 0)


def test_a_death_is_blamed_on_what_was_at_work_the_newest_change_first():
    last = serving("1.0.0").installed
    pump = Slots("pump", active=serving("2.0.0", confirmed_at=5), last_good=last)
    fan = Slots("fan", active=serving("2.0.0", confirmed_at=9), last_good=last)
    bare = Slots("bare", active=serving("2.0.0", confirmed_at=99))
    found = {s.model_name: s for s in (pump, fan, bare)}
    everybody = {suspect(name, "2.0.0") for name in found}
    assert sentence(found, everybody) == Sentence(charged="fan")
    assert sentence(found, {suspect("pump", "2.0.0")}) == Sentence(charged="pump")
    assert sentence(found, {suspect("pump", "1.0.0")}) == Sentence()
    found["fan"] = msgspec.structs.replace(fan, trial=serving("3.0.0"))
    assert sentence(found, everybody) == Sentence(charged="pump")
    everybody.add(suspect("fan", "3.0.0"))
    assert sentence(found, everybody) == Sentence(crashed="fan")
    found["pump"] = msgspec.structs.replace(pump, trial=serving("3.0.0"))
    assert sentence(found, everybody | {suspect("pump", "3.0.0")}) == Sentence()
    found = {"pump": msgspec.structs.replace(pump, trial=serving("1.0.0"))}
    assert sentence(found, {suspect("pump", "1.0.0")}) == Sentence(), "it was good once"


def test_a_trial_that_uses_up_engines_is_bad():
    assert Trial(starts=health.MAX_STARTS).look(RUNNING).judgement is Judgement.PENDING
    verdict = Trial(starts=health.MAX_STARTS + 1).look(RUNNING)
    assert (verdict.judgement, verdict.code) == (Judgement.BAD, "trial.crashed")


@given(st.integers(1, 10_000), st.floats(0, 0.999999), st.floats(0.01, 10), st.floats(10, 1000))
def test_backoff_stays_within_its_bounds(failures: int, fraction: float, base: float, cap: float):
    wait = backoff.delay(failures, fraction, base_s=base, cap_s=cap)
    assert 0 < wait <= cap
    assert wait <= backoff.delay(failures + 1, fraction, base_s=base, cap_s=cap)


SIZES = st.dictionaries(st.sampled_from(PriorityClass), st.integers(0, 10_000))


@given(SIZES, SIZES, st.integers(0, 50_000))
def test_evictions_make_room_and_spare_what_matters(
    held: dict[PriorityClass, int], coming: dict[PriorityClass, int], limit: int
):
    given_up = outbox.evictions(held, coming, limit)
    have = {p: held.get(p, 0) + coming.get(p, 0) for p in PriorityClass}
    left = sum(have.values()) - sum(given_up.values())
    assert left <= limit
    assert all(0 < given_up[p] <= have[p] for p in given_up)
    assert left == min(limit, sum(have.values()))
    for p in given_up:
        assert all(have[q] == given_up.get(q, 0) for q in outbox.ORDER[outbox.RANK[p] + 1 :])


SPANS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=8)


@given(st.integers(0, 60), SPANS)
def test_an_acknowledgement_covers_exactly_its_numbers(prefix: int, ranges: list[tuple[int, int]]):
    ack = AckRange("e", PriorityClass.HEALTH, prefix, tuple(ranges))
    spans = outbox.acknowledged(ack)
    covered = {n for first, last in spans for n in range(first, last + 1)}
    assert covered == {*range(1, prefix + 1), *(n for a, b in ranges for n in range(a, b + 1))}
    assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(spans))


def variant(name: str, **more: object) -> Variant:
    file = FileRef(name, "0" * 64, 1)
    tensor = TensorSpec("x", "FP32", (1,))
    base = Variant(name, file, "onnx", "int8", (tensor,), (tensor,), Golden(file, 1, {}))
    return msgspec.structs.replace(base, **more)


def test_variants_that_cannot_run_here_are_left_out_and_the_rest_is_in_order():
    manifest = Manifest(
        1, "pump", "1.0.0", 1, "", "MIT", provenance=Provenance("", ""),
        variants=(
            variant("plain"),
            variant("arm", arch=("aarch64",), preference=9),
            variant("tpu", accelerators=("edgetpu",), preference=9),
            variant("lite", format="tflite", preference=9),
            variant("best", preference=1),
        ),
    )  # fmt: skip
    found = variants.candidates(manifest, arch="x86_64", formats={"onnx"}, accelerators={"cpu"})
    assert [v.name for v in found] == ["best", "plain"]


def test_news_go_forward_only():
    def at(state: AssignmentState, code: str | None = None) -> standing.Standing:
        return standing.Standing(state, code)

    assert standing.news(None, at(AssignmentState.ACKNOWLEDGED))
    assert not standing.news(at(AssignmentState.SOAKING), at(AssignmentState.ACTIVATING))
    assert not standing.news(at(AssignmentState.CONFIRMED), at(AssignmentState.CONFIRMED))
    assert standing.news(at(AssignmentState.CONFIRMED), at(AssignmentState.ROLLED_BACK, "trial.unhealthy"))
    assert standing.news(at(AssignmentState.FETCHING), at(AssignmentState.FETCHING, "update.unreachable"))


def lane(**more: object) -> dict[str, object]:
    return {
        "name": "a",
        "model": "pump",
        "source": {"kind": "replay", "path": "x.csv", "columns": ["f1"]},
    } | more


def test_settings_have_defaults_and_take_lanes():
    found = settings.parse({"server": {"poll_s": 2}, "lanes": [lane()]})
    assert found.server.poll_s == 2.0
    assert found.lanes[0].source["columns"] == ["f1"]
    assert settings.parse({}) == settings.AgentSettings()


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"server": {"pol_s": 2}}, "pol_s"),
        ({"sever": {}}, "sever"),
        ({"server": {"url": "http://x"}}, "$.server.url"),
        ({"lanes": [lane(), lane()]}, "two lanes are named 'a'"),
        ({"lanes": [lane(source={})]}, "source.kind"),
        ({"lanes": [lane(source={"kind": "reply"})]}, "replay, sparkplug, system"),
        ({"probe": {"require": "partial"}}, "$.probe.require"),
    ],
)
def test_a_wrong_setting_is_named(table: dict[str, object], named: str):
    with pytest.raises(PitheadError) as caught:
        settings.parse(table)
    assert caught.value.code == "config.invalid"
    assert named in caught.value.detail


def test_the_environment_overrides_the_file():
    table = {"server": {"poll_s": 2.0}, "lanes": [lane()]}
    found = settings.parse(settings.overridden(table, {"PITHEAD_AGENT_SERVER_POLL_S": "7", "HOME": "/"}))
    assert found.server.poll_s == 7.0
    assert settings.parse(settings.overridden({}, {"PITHEAD_AGENT_BROKER_PORT": "99"})).broker.port == 99


@pytest.mark.parametrize(
    ("variable", "text"), [("PITHEAD_AGENT_SERVER_POLLS", "7"), ("PITHEAD_AGENT_BROKER_PORT", "many")]
)
def test_a_wrong_variable_is_named(variable: str, text: str):
    with pytest.raises(PitheadError, match=variable):
        settings.overridden({}, {variable: text})
