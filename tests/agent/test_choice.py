"""Which variant and accelerator is taken: by measurement, and anew when the system changes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from agent.__main__ import main
from agent.core import plan, settings
from agent.core.plan import Activate, Fetch, Package, Probe, Reject, Stage
from agent.core.slots import Serving, Slots, choose_again
from agent.service import events, probe
from agent.service.children import Children
from agent.service.reporting import Clock, Reporter
from agent.service.steps import Steps
from agent.store.slots import SlotStore
from contract.errors import PitheadError
from contract.manifest import Golden, Manifest
from contract.messages import Desired, ModelAssignment
from inference.accelerators import Custom, Resources
from inference.made_up import made_up
from inference.probing import Choice, Placement, ProbeReport
from inference.registry import open_session
from models import golden, package
from models.package import reference_to
from tests.agent.bench import MACHINE, Assign, Bench
from tests.engine.conftest import make_package

NAMES = ("first", "second", "third")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    found = Bench(tmp_path)
    found.world = found.restarted()
    yield found
    found.close()


class Device:
    """A world whose probes are answered by the test."""

    def __init__(self, bench: Bench, assign: Assign, desire: Callable[..., Desired]) -> None:
        self.bench, self.world = bench, bench.world
        made = make_package(bench.layout.objects)
        variants = tuple(
            msgspec.structs.replace(made.variant, name=name, preference=-i, accelerators=("npu", "cpu"))
            for i, name in enumerate(NAMES)
        )
        self.manifest: Manifest = msgspec.structs.replace(made.manifest, name="pump", variants=variants)
        content = msgspec.json.encode(self.manifest)
        digest = bench.objects.put(content)
        self.wanted: ModelAssignment = msgspec.structs.replace(
            assign(self.manifest.version), manifest_sha256=digest, manifest_length=len(content)
        )
        formats = frozenset({made.variant.format})
        self.world.machine = msgspec.structs.replace(
            MACHINE, formats=formats, circumstances={"kernel": "6.1"}, accelerators=("npu", "cpu")
        )
        self.world.take(desire(self.wanted), "e1")
        children = Children(bench.layout, bench.box.put, server="https://127.0.0.1:1")
        reporter = Reporter(self.world, bench.outbox, Clock(wall=lambda: 5, mono=lambda: 6))
        self.steps = Steps(
            self.world, children, reporter,
            now=lambda: bench.now, wall=lambda: 5, renew=lambda: None, fraction=lambda: 0.0,
        )  # fmt: skip

    def next(self) -> plan.Step | None:
        seen = self.world.observe(self.bench.now)
        return plan.plan(self.world.desired, seen, self.bench.now).get("pump")

    def answer(self, step: plan.Step | None, p50_us: float, accelerator: str = "cpu") -> None:
        assert isinstance(step, Probe)
        report = ProbeReport(
            step.variant, accelerator, latency_p50_us=p50_us, placement=Placement({accelerator: {"Add": 1}})
        )
        self.steps.probed(events.Probed(step, Choice(step.variant, accelerator, report, "")))

    @property
    def slots(self) -> Slots:
        return self.world.slots.get("pump")


@pytest.fixture
def device(bench: Bench, assign: Assign, desire: Callable[..., Desired]) -> Device:
    return Device(bench, assign, desire)


def test_a_variant_that_costs_next_to_nothing_is_taken_at_once(device: Device):
    device.answer(device.next(), 20.0)
    assert device.slots.standby is not None
    assert device.slots.standby.variant == "first"
    assert device.next() == Activate(device.wanted)


def test_costly_variants_are_compared_and_the_cheapest_is_taken(device: Device):
    for name, p50 in zip(NAMES, (900.0, 300.0, 400.0), strict=True):
        step = device.next()
        assert step == Probe(device.wanted, name)
        assert device.slots.standby is None
        device.answer(step, p50)
    assert device.next() == Stage(device.wanted)
    assert device.steps.execute("pump", Stage(device.wanted))
    assert device.slots.standby is not None
    assert device.slots.standby.variant == "second"
    assert device.world.measured == {}


def test_a_preferred_variant_keeps_its_place_against_one_that_is_little_cheaper(device: Device):
    for p50 in (300.0, 290.0, 260.0):
        device.answer(device.next(), p50)
    device.steps.execute("pump", device.next() or pytest.fail("nothing to do"))
    assert device.slots.standby is not None
    assert device.slots.standby.variant == "first"


def test_what_passed_is_taken_when_others_fail_or_cannot_be_had(device: Device):
    device.answer(device.next(), 900.0)
    step = device.next()
    assert isinstance(step, Probe)
    device.steps.probed(events.Probed(step, PitheadError("probe.golden_mismatch", "off")))
    rejects = device.next()
    assert rejects == Reject(device.wanted, device.world.failures[device.wanted.manifest_sha256], final=False)
    device.steps.execute("pump", rejects)
    assert device.next() == Probe(device.wanted, "third")
    lost = Fetch(device.wanted, "third")
    device.steps.fetched(events.Fetched(lost, PitheadError("update.hash_mismatch")))
    assert device.next() == Stage(device.wanted)
    device.steps.execute("pump", Stage(device.wanted))
    assert device.world.failures == {}
    assert device.slots.standby is not None
    assert device.slots.standby.variant == "first"


def test_what_passed_does_not_wait_for_what_might_be_better(assign: Assign):
    """A fetch that is to be tried again later holds up nothing."""
    wanted = assign("1.0.0")
    package = Package(NAMES, frozenset({"first"}), frozenset({"first"}))
    seen = plan.Observed(
        Slots("pump"), {wanted.manifest_sha256: package}, not_before={wanted.manifest_sha256: 50.0}
    )
    goal = plan.Goal(active=wanted)
    assert plan.next_step(goal, seen, 10.0) == Stage(wanted)
    assert plan.next_step(goal, seen, 60.0) == Fetch(wanted, "second")


def test_a_device_may_take_the_first_that_passes(device: Device):
    first = settings.Probe(compare="first")
    device.world.settings = msgspec.structs.replace(device.world.settings, probe=first)
    device.answer(device.next(), 900.0)
    assert device.slots.standby is not None
    assert device.slots.standby.variant == "first"


# --- anew


def in_service(device: Device) -> None:
    device.answer(device.next(), 20.0, "npu")
    device.steps.execute("pump", Activate(device.wanted))
    device.steps.execute("pump", plan.Confirm())
    assert device.slots.active is not None
    assert device.slots.active.installed.accelerator == "npu"
    assert device.next() is None


def changed(device: Device) -> Device:
    """The same device after a restart with another kernel."""
    machine = msgspec.structs.replace(device.world.machine, circumstances={"kernel": "6.2"})
    device.world.machine = machine
    device.world._chosen.clear()
    return device


def test_another_system_asks_for_another_choice_of_what_serves(device: Device):
    in_service(device)
    step = changed(device).next()
    assert step == Probe(device.wanted, "first", again=True)
    assert device.world.changes(device.wanted.manifest_sha256) == {"kernel": "6.1 -> 6.2"}
    before = device.slots.active
    device.answer(step, 30.0, "cpu")
    after = device.slots.active
    assert before is not None
    assert after is not None
    assert after.installed.accelerator == "cpu"
    assert (after.digest, after.activation, after.confirmed_at) == (
        before.digest, before.activation, before.confirmed_at,
    )  # fmt: skip
    assert device.next() is None, "asked once, not for ever"
    assert SlotStore(device.bench.layout.slots).get("pump").active == after


def test_a_choice_that_cannot_be_repeated_leaves_what_serves(device: Device):
    in_service(device)
    step = changed(device).next()
    assert isinstance(step, Probe)
    device.steps.probed(events.Probed(step, PitheadError("inference.accelerator_missing", "no driver")))
    assert device.slots.active is not None
    assert device.slots.active.installed.accelerator == "npu"
    assert device.world.failures == {}
    assert device.slots.rejected == ()
    assert device.next() is None


def test_a_busy_device_is_asked_once_more(device: Device):
    in_service(device)
    step = changed(device).next()
    assert isinstance(step, Probe)
    device.steps.probed(events.Probed(step, PitheadError("probe.timeout")))
    assert device.next() is None
    device.bench.now += 1000
    assert device.next() == step
    device.answer(step, 30.0, "cpu")
    assert device.next() is None


def test_only_the_active_version_is_chosen_again(bench: Bench, assign: Assign):
    installed = bench.install(assign("1.0.0"))
    other = bench.install(assign("2.0.0"))
    found = Slots("pump", active=Serving(installed))
    assert choose_again(found, other) == found
    assert choose_again(Slots("pump"), other) == Slots("pump")


def test_circumstances_of_versions_that_are_gone_are_forgotten(device: Device):
    in_service(device)
    device.world.state.put({"chosen/" + "f" * 64: {"kernel": "1"}})
    device.world.forget()
    kept = device.world.state.scan("chosen/", dict[str, str])
    assert set(kept) == {device.wanted.manifest_sha256}


# --- settings, and the lane's order


def test_a_devices_accelerators_and_resources_are_settings():
    table = {
        "engine": {"threads": 2, "cpus": [2, 3], "memory_mb": 64},
        "accelerators": {
            "my-npu": {
                "format": "tflite",
                "library": "/usr/lib/libnpu.so",
                "options": {"cores": 2, "fast": True},
                "devices": ["/dev/npu0"],
            }
        },
    }
    found = settings.parse(table)
    assert found.engine == Resources(2, (2, 3), 64)
    assert found.accelerators["my-npu"].options == {"cores": 2, "fast": True}
    for key, value in (("threads", 0), ("cpus", [-1]), ("memory_mb", 0), ("thread", 1)):
        with pytest.raises(PitheadError, match=r"config\.invalid"):
            settings.parse({"engine": {key: value}})
    with pytest.raises(PitheadError, match=r"config\.invalid"):
        settings.parse({"accelerators": {"x": {"format": "tflite", "devices": ["npu0"]}}})
    over = settings.overridden({}, {"PITHEAD_AGENT_ENGINE_THREADS": "4"})
    assert settings.parse(over).engine.threads == 4


def test_a_lane_is_told_of_its_accelerators_settings_and_resources(bench: Bench, assign: Assign):
    installed = msgspec.structs.replace(bench.install(assign("1.0.0")), accelerator="npu")
    bench.world.slots.save(Slots("pump", active=Serving(installed)))
    own = {"npu": Custom("onnx", provider="NpuExecutionProvider"), "other": Custom("onnx")}
    bench.world.settings = msgspec.structs.replace(
        bench.world.settings, accelerators=own, engine=Resources(threads=3)
    )
    spec = bench.world.lane_specs()[0]
    assert spec.custom == {"npu": own["npu"]}
    assert spec.resources.threads == 3


# --- the command


def test_probe_prints_what_each_variant_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    made = make_package(tmp_path / "objects")
    model = Path(made.files[made.variant.file.path]).read_bytes()
    session = open_session(model, made.variant.format)
    vectors = golden.record(session, [made_up(session.inputs, 1, random=True)])
    variant = msgspec.structs.replace(
        made.variant, golden=Golden(reference_to("golden.npz", vectors), 1, golden.tolerances(session, {}))
    )
    manifest = msgspec.structs.replace(made.manifest, variants=(variant,))
    directory = tmp_path / "package"
    package.write(directory, manifest, {variant.file.path: model, "golden.npz": vectors})
    assert main(["probe", str(directory), "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == [c for c in probe.COLUMNS if c]
    assert "chosen" in out
    assert f"{manifest.name} {manifest.version}: {variant.name} on" in out
    monkeypatch.chdir(tmp_path)
    assert main(["probe", "package/manifest.json", "--root", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["probe", str(directory), "--root", str(tmp_path), "--json"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=probe.Found)
    assert found.choice is not None
    assert found.choice.report.placement.total > 0


def test_probe_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for path, words in (
        (tmp_path / "none.onnx", "neither a package"),
        (tmp_path, "manifest.json"),
        (tmp_path / "x.h5", "neither a package"),
    ):
        assert main(["probe", str(path), "--root", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nonsense")
    assert main(["probe", str(broken), "--root", str(tmp_path)]) == 1
    assert "nothing was chosen" in capsys.readouterr().out
