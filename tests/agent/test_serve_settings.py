"""Serving on a device of the fleet: its settings, what the engine is told, how what it says is judged."""

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.core import health
from agent.core.serve_models import PipelineSpec, ServedModel, Step
from agent.core.settings import AgentSettings, Lane, Serve, ServeMqtt, overridden, parse
from agent.core.slots import Serving, Slots
from agent.engine.serve import configuration
from agent.ports import Configure, FromEngine, LaneState, PipelineState, ServeSpec, ServeState, ToEngine
from agent.service import events, status
from agent.service.reporting import Reporter
from agent.service.status import Status
from agent.wiring import with_files
from contract.errors import PitheadError
from tests.agent.conftest import Assign
from tests.agent.test_service import CLOCK, LANE, Bench, Engines, hello, intake

SERVE = Serve(enabled=True)


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    found = Bench(tmp_path)
    yield found
    found.close()


def serves(bench: Bench, *lanes: Lane, serve: Serve = SERVE) -> None:
    bench.world.settings = AgentSettings(lanes=lanes, serve=serve)


# --- settings


def pipeline(*steps: Step) -> dict[str, Any]:
    return {"pipelines": {"p": msgspec.to_builtins(PipelineSpec(("x",), ("y",), steps))}}


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"port": 8000}, "port"),
        ({"mqtt": {"topic": "x"}}, "topic"),
        ({"http_port": 70000}, "http_port"),
        ({"memory_budget_mb": -1}, "memory_budget_mb"),
        ({"host": "0.0.0.0"}, "serve.token_file"),  # noqa: S104 - it is refused
        ({"host": "192.0.2.7"}, "serve.token_file"),
        ({"tls_certificate_file": "c.pem"}, "serve.tls_key_file"),
        ({"tls_key_file": "k.pem"}, "serve.tls_certificate_file"),
        ({"http_port": 8001, "grpc_port": 8001}, "serve.grpc_port"),
        ({"mqtt": {"prefix": "infer/+"}}, "prefix"),
        ({"mqtt": {"prefix": "infer/"}}, "prefix"),
        ({"mqtt": {"prefix": "$SYS/infer"}}, "prefix"),
        ({"mqtt": {"qos": 3}}, "qos"),
        ({"mqtt": {"concurrency": 0}}, "concurrency"),
        ({"models": {"pump": {"cash_mb": 1}}}, "cash_mb"),
        ({"models": {"pump": {"versions": 2}}}, "serve.models.pump.versions: a device serves one version"),
        (
            {"models": {"pump": {"split": {"weights": {"1": 1}}}}},
            "serve.models.pump.split: a device",
        ),
        ({"models": {"pump": {"shadow": {"version": "2"}}}}, "Rollouts compare versions over devices"),
        ({"models": {"pump": {"bandit": {}}}}, "serve.models.pump.bandit"),
        ({"models": 3}, "Expected `object`, got `int` - at `$.serve.models`"),
        (pipeline(Step("a", version="1")), "serve.pipelines.p.steps[0].version: versions are the fleet's"),
        (pipeline(Step("a"), Step("p")), "serve.pipelines.p.steps[1].model: 'p' is a pipeline itself"),
        ({"pipelines": {"p": {"inputs": ["x"], "outputs": ["y"]}}}, "steps"),
        ({"models": {"pump": {"burst": 2}}}, "burst is given without rate"),
        ({"clients": {"*": {"rate": 0}}}, "rate"),
    ],
)
def test_what_cannot_be_served_is_named(table: dict[str, Any], named: str):
    with pytest.raises(PitheadError) as error:
        parse({"serve": table})
    assert error.value.code == "config.invalid"
    assert named in error.value.detail


def test_serving_is_off_and_local_unless_asked_for():
    settings = parse({}).serve
    assert (settings.enabled, settings.host, settings.http_port) == (False, "127.0.0.1", 8000)
    assert (settings.grpc_port, settings.mqtt) == (None, None)
    mqtt = parse({"serve": {"mqtt": {}}}).serve.mqtt
    assert mqtt is not None
    assert (mqtt.host, mqtt.prefix, mqtt.qos) == ("127.0.0.1", "pithead/infer", 1)


def test_the_environment_switches_it_on():
    table = overridden({}, {"PITHEAD_AGENT_SERVE_ENABLED": "true", "PITHEAD_AGENT_SERVE_HTTP_PORT": "9000"})
    settings = parse(table).serve
    assert (settings.enabled, settings.http_port) == (True, 9000)


def test_files_are_found_from_the_configuration():
    said = {
        "token_file": "tokens",
        "mqtt": {"credentials_file": "mqtt.toml", "tls": True, "ca_file": "/ca.pem"},
    }
    found = with_files(parse({"serve": said}), Path("/etc/pithead")).serve
    assert found.token_file == "/etc/pithead/tokens"
    assert found.mqtt is not None
    assert (found.mqtt.credentials_file, found.mqtt.ca_file) == ("/etc/pithead/mqtt.toml", "/ca.pem")


# --- what the engine is told


def test_every_model_in_service_is_served_with_a_lane_or_without(bench: Bench, assign: Assign):
    slots = bench.world.slots
    pump, fan = bench.install(assign("1.0.0")), bench.install(assign("2.0.0", model="fan"))
    slots.save(Slots("pump", active=Serving(pump, 4)))
    slots.save(Slots("fan", active=Serving(pump, 1), trial=Serving(fan, 2)))
    slots.save(Slots("idle", standby=pump))
    assert bench.world.serve_spec() is None
    serves(bench, LANE)
    spec = bench.world.serve_spec()
    assert spec is not None
    assert [(m.model_name, m.version, m.activation) for m in spec.models] == [
        ("fan", "2.0.0", 2),
        ("pump", "1.0.0", 4),
    ]
    (lane,) = bench.world.lane_specs()
    alike = {f: getattr(lane, f) for f in spec.models[1].__struct_fields__}
    assert alike == msgspec.structs.asdict(spec.models[1]), "one version is opened one way"
    bench.objects.path(fan.digest).unlink()
    spec = bench.world.serve_spec()
    assert spec is not None
    assert [m.version for m in spec.models] == ["1.0.0", "1.0.0"], "damaged: what was active stands in"


def test_it_is_part_of_what_is_told_and_told_when_it_changes(
    bench: Bench, assign: Assign, monkeypatch: pytest.MonkeyPatch
):
    told: list[Configure] = []

    def send(message: Configure) -> bool:
        told.append(message)
        return True

    monkeypatch.setattr(bench.engine, "send", send)
    bench.world.slots.save(Slots("pump", active=Serving(bench.install(assign("1.0.0")), 1)))
    taken = intake(bench)
    taken.said(events.EngineSaid(1, hello()))
    taken.configure()
    assert told[-1].serve is None
    serves(bench)
    for _ in range(2):
        taken.configure()
    assert len(told) == 2, "what is the same is not said again"
    assert told[-1].serve is not None
    assert [m.model_name for m in told[-1].serve.models] == ["pump"]
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(told[-1]), type=ToEngine)
    assert again == told[-1]


def test_an_engine_of_before_takes_the_order_without_it():
    class Old(msgspec.Struct, tag="configure"):
        lanes: tuple[int, ...]
        bucket_s: float = 60.0

    sent = msgspec.msgpack.encode(Configure((), 1.0, ServeSpec(SERVE)))
    assert msgspec.msgpack.decode(sent, type=Old).bucket_s == 1.0


# --- how what it says is judged


def said(state: str, serving: Serving, **more: Any) -> ServeState:
    model = LaneState("serving", "pump", "running", serving.digest, serving.activation)
    return ServeState("listening", models=(msgspec.structs.replace(model, state=state, **more),))


def on_trial(bench: Bench, assign: Assign) -> Serving:
    trial = Serving(bench.install(assign("2.0.0")), 3)
    bench.world.slots.save(Slots("pump", trial=trial))
    serves(bench)
    return trial


def verdict(bench: Bench) -> health.Verdict:
    return bench.world.observe(bench.now)["pump"].verdict


def lasts(bench: Bench, state: ServeState, seconds: float = 60.0) -> health.Verdict:
    """Let it say the same for a while."""
    for _ in range(round(seconds)):
        bench.now += 1
        bench.world.serve_said(state, bench.now)
        found = verdict(bench)
        if found.judgement is not health.Judgement.PENDING:
            break
    return found


def test_a_trial_that_only_answers_is_good_when_it_lasts_though_nobody_asks(bench: Bench, assign: Assign):
    trial = on_trial(bench, assign)
    assert verdict(bench).judgement is health.Judgement.PENDING
    bench.world.serve_said(said("running", trial), bench.now)
    assert verdict(bench).judgement is health.Judgement.PENDING
    found = lasts(bench, said("running", trial), bench.world.reporting.trial_s + 2)
    assert found.judgement is health.Judgement.GOOD


@pytest.mark.parametrize(
    ("state", "more", "code"),
    [
        ("running", {"windows": 50, "errors": 3}, "trial.unhealthy"),
        ("failed", {"code": "inference.load_failed", "detail": "x"}, "trial.unhealthy"),
        ("failed", {"code": "serve.model_lost", "detail": "x"}, "trial.unhealthy"),
    ],
)
def test_a_trial_that_fails_those_who_ask_is_bad(
    bench: Bench, assign: Assign, state: str, more: dict[str, Any], code: str
):
    found = lasts(bench, said(state, on_trial(bench, assign), **more), 1)
    assert (found.judgement, found.code) == (health.Judgement.BAD, code)
    assert "serving" in found.detail


def test_a_few_errors_among_many_answers_do_not_end_a_trial(bench: Bench, assign: Assign):
    trial = on_trial(bench, assign)
    assert (
        lasts(bench, said("running", trial, windows=1000, errors=3), 2).judgement is not health.Judgement.BAD
    )


def test_a_trial_that_never_comes_into_service_is_given_up(bench: Bench, assign: Assign):
    trial = on_trial(bench, assign)
    broken = ServeState("failed", code="config.invalid", detail="the port is taken")
    found = lasts(bench, broken, health.LOAD_S + 2)
    assert found.judgement is health.Judgement.BAD
    assert bench.world.soaking(bench.world.slots.get("pump")) is False
    assert trial.activation == 3


def test_a_model_with_a_lane_is_judged_by_it(bench: Bench, assign: Assign):
    trial = on_trial(bench, assign)
    serves(bench, LANE)
    found = lasts(bench, said("failed", trial, code="inference.load_failed"), 5)
    assert found.judgement is health.Judgement.PENDING


def test_an_engine_that_dies_of_what_it_serves_ends_the_trial(
    bench: Bench, assign: Assign, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench.engine, "send", lambda _message: True)
    engines = Engines(bench, intake(bench))
    trial = on_trial(bench, assign)
    engines.start()
    engines.intake.said(events.EngineSaid(1, said("running", trial)))
    engines.die()
    engines.start()
    found = verdict(bench)
    assert (found.judgement, found.code) == (health.Judgement.BAD, "trial.crashed")


def test_an_engine_whose_serving_hangs_is_killed(
    bench: Bench, assign: Assign, monkeypatch: pytest.MonkeyPatch
):
    killed: list[bool] = []
    monkeypatch.setattr(bench.engine, "send", lambda _message: True)
    monkeypatch.setattr(bench.engine, "kill", lambda: killed.append(True))
    trial = on_trial(bench, assign)
    engines = Engines(bench, intake(bench))
    engines.start()
    engines.intake.said(events.EngineSaid(1, said("running", trial)))
    bench.now += health.SILENT_S - 1
    engines.intake.watch()
    assert not killed
    bench.now += 2
    engines.intake.watch()
    assert killed
    engines.die()
    engines.start()
    assert verdict(bench).code == "trial.crashed"


# --- how it is shown


def test_damage_and_trouble_are_said_of_the_model(bench: Bench, assign: Assign):
    active = Serving(bench.install(assign("1.0.0")), 1)
    bench.world.slots.save(Slots("pump", active=active))
    serves(bench)
    reporter = Reporter(bench.world, bench.outbox, CLOCK)

    def reported() -> tuple[str, str | None]:
        (model,) = reporter.document(bench.world.observe(bench.now)).models
        return model.lane, model.code

    assert reported() == ("none", None)
    bench.world.serve_said(said("running", active), bench.now)
    assert reported() == ("running", None)
    bench.world.serve_said(ServeState("failed", code="config.invalid", detail="port"), bench.now)
    assert reported() == ("none", "config.invalid")
    model = bench.objects.path(active.installed.files["model.onnx"])
    model.chmod(0o600)
    model.write_bytes(b"other")
    bench.world.serve_said(said("failed", active, code="package.file_mismatch"), bench.now)
    assert not bench.world.intact(active.installed), "it is deleted, to be fetched again"


def test_the_status_shows_it():
    model = LaneState(
        "serving", "pump", "failed", windows=7, errors=2, code="inference.load_failed", detail="x"
    )
    found = Status(
        device="dev-1", name="", hardware="h", server="s", broker="b", supervisor_running=True, engine_pid=1,
        revision=1, models=(status.ModelStatus("pump", served=model),),
        serve=ServeState(
            "listening", url="http://127.0.0.1:8000", mqtt="failed", mqtt_detail="refused", models=(model,),
            pipelines=(PipelineState("line", requests=4, errors=1), PipelineState("p", "no model 'x'")),
        ),
    )  # fmt: skip
    text = status.render(found)
    assert "serving     listening http://127.0.0.1:8000\n" in text
    assert "MQTT failed refused\n" in text
    assert "pipeline line 4 requests, 1 errors\n" in text
    assert "pipeline p cannot be asked: no model 'x', 0 errors\n" in text
    assert "served    failed, 7 requests, 2 errors: inference.load_failed x\n" in text
    broken = msgspec.structs.replace(found, serve=ServeState("failed", code="config.invalid", detail="taken"))
    assert "serving     failed: config.invalid taken\n" in status.render(broken)


def test_its_state_goes_over_the_wire():
    state = ServeState("listening", models=(LaneState("serving", "pump", "running"),))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=FromEngine) == state


def test_the_page_shows_every_setting_and_its_examples_hold():
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    found_blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    blocks = [block for block in found_blocks if not block.startswith("# serve.toml\n")]
    text = re.sub(r"^# ", "", "\n".join(blocks), flags=re.MULTILINE)
    table = tomllib.loads(text)
    found = parse(table).serve
    assert found.mqtt is not None
    assert set(table["serve"]) == set(Serve.__struct_fields__)
    assert set(table["serve"]["mqtt"]) == set(ServeMqtt.__struct_fields__)
    plain = tomllib.loads("\n".join(blocks))
    assert parse(plain).serve == Serve(enabled=True, mqtt=ServeMqtt())
    others = [block for block in found_blocks if block not in blocks]
    said = configuration.parse(others[0].encode())
    one = tomllib.loads(others[0])["models"]["pump"]
    assert set(one) == {*ServedModel.__struct_fields__, "versions"}
    for other in others:
        configuration.parse(other.encode())
    assert said.models["pump"].cache_mb == 8
    assert said.clients["boss"].rate is None
