"""The planner against a device that loses power between any two steps."""

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core import plan
from agent.core import slots as slot
from agent.core.health import Judgement, Verdict, judge_confirmed
from agent.core.plan import (
    Activate,
    Confirm,
    Discard,
    Failure,
    Fallback,
    Fetch,
    Goal,
    Observed,
    Package,
    Probe,
    Reject,
    Remove,
    Rollback,
)
from agent.core.slots import Installed, Slots
from agent.core.standing import standing
from contract.messages import Aftermath, AssignmentState, Desired, ModelAssignment, Role

GOOD = "1.0.0"
BETTER = "2.0.0"
SICK = "3.0.0"  # passes its probe, fails its trial
WRONG = "4.0.0"  # fails its probe in every variant
FORGED = "5.0.0"  # a file differs from its signed hash
PICKY = "6.0.0"  # only its second variant passes the probe
LATE = "7.0.0"  # passes its trial, and takes engines down afterwards
VERSIONS = (GOOD, BETTER, SICK, WRONG, FORGED, PICKY, LATE)
KEEPS = {GOOD, BETTER, PICKY}
VARIANTS = ("fast", "safe")


@dataclass
class Device:
    """Executes steps as the supervisor does. ``cut`` forgets all that is not durable."""

    slots: Slots = field(default_factory=lambda: Slots("pump"))
    manifests: set[str] = field(default_factory=set)
    files: set[tuple[str, str]] = field(default_factory=set)
    failures: dict[str, Failure] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)
    versions: dict[str, str] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)
    removed: bool = False

    def judge(self) -> None:
        active = self.slots.active
        if self.slots.trial is None:
            if active is not None and active.installed.version == LATE:
                self.slots = slot.died(self.slots, soon=True)
            self.verdict = judge_confirmed([], 0.0, self.slots.deaths)
        else:
            sick = self.versions[self.slots.trial.digest] == SICK
            self.verdict = Verdict(Judgement.BAD if sick else Judgement.GOOD)

    def observe(self) -> Observed:
        return Observed(
            self.slots,
            packages={
                d: Package(VARIANTS, frozenset(v for v in VARIANTS if (d, v) in self.files))
                for d in self.manifests
            },
            failures=self.failures,
            verdict=self.verdict,
        )

    def step(self, desired: Desired) -> plan.Step | None:
        self.versions |= {a.manifest_sha256: a.version for a in desired.models}
        step = plan.plan(desired, {"pump": self.observe()} if not self.removed else {}, 0.0).get("pump")
        if step is not None:
            self.execute(step)
        if self.slots.serving is not None:
            self.served.append(self.slots.serving.installed.version)
        self.judge()
        return step

    def run(self, desired: Desired, steps: int = 60) -> None:
        for _ in range(steps):
            if self.step(desired) is None and not (self.slots.deaths and self.slots.last_good):
                return
        if steps == 60:
            pytest.fail(f"no rest: {self.observe()}")

    def cut(self) -> None:
        self.failures = {}
        self.slots = slot.again(msgspec.json.decode(msgspec.json.encode(self.slots), type=Slots))
        self.judge()

    def execute(self, step: plan.Step) -> None:
        match step:
            case Fetch():
                self.fetch(step)
            case Probe():
                self.probe(step)
            case Activate():
                self.slots = slot.activate(self.slots, step.wanted)
            case Confirm():
                self.slots = slot.confirm(self.slots)
            case Rollback():
                self.slots = slot.roll_back(self.slots, None if step.superseded else self.rejected(step))
            case Fallback():
                assert self.slots.last_good is not None
                self.slots = slot.fall_back(self.slots, self.given_up(step))
            case Reject():
                f = step.failure
                self.failures.pop(step.wanted.manifest_sha256, None)
                self.slots = slot.reject(
                    self.slots,
                    slot.Rejected(step.wanted.version, step.wanted.manifest_sha256, step.wanted.attempt,
                                   step.wanted.activation, f.code, f.detail, f.stage, step.final, f.variant),
                )  # fmt: skip
            case Discard():
                self.slots = slot.discard_standby(self.slots)
            case Remove():
                self.slots, self.removed = Slots("pump"), True

    def fetch(self, step: Fetch) -> None:
        digest = step.wanted.manifest_sha256
        if step.variant is None:
            self.manifests.add(digest)
        elif step.wanted.version == FORGED:
            self.failures[digest] = Failure("fetch", "update.hash_mismatch")
        else:
            self.files.add((digest, step.variant))

    def probe(self, step: Probe) -> None:
        wanted = step.wanted
        assert (wanted.manifest_sha256, step.variant) in self.files
        if wanted.version == WRONG or (wanted.version == PICKY and step.variant == "fast"):
            self.failures[wanted.manifest_sha256] = Failure(
                "probe", "probe.golden_mismatch", variant=step.variant
            )
            return
        installed = Installed(wanted.version, wanted.manifest_sha256, step.variant, "cpu", {"m": "0" * 64})
        self.slots = slot.stage(self.slots, installed)

    def given_up(self, step: Fallback) -> slot.Rejected:
        active = self.slots.active
        assert active is not None
        return slot.Rejected(
            version=active.installed.version,
            digest=active.digest,
            attempt=step.attempt,
            activation=step.activation,
            code=step.code,
            stage="trial",
            aftermath=Aftermath.ROLLED_BACK,
        )

    def rejected(self, step: Rollback) -> slot.Rejected:
        trial = self.slots.trial
        assert trial is not None
        return slot.Rejected(
            version=trial.installed.version,
            digest=trial.digest,
            attempt=trial.attempt,
            activation=trial.activation,
            code=step.code,
            stage="trial",
            aftermath=slot.aftermath(self.slots),
        )


def order(version: str, role: Role = Role.ACTIVE, **more: object) -> ModelAssignment:
    base = ModelAssignment("pump", version, role, f"models/pump/{version}/manifest.json",
                           version.replace(".", "").ljust(64, "0"), 100, int(version[0]))  # fmt: skip
    return msgspec.structs.replace(base, **more)


def wish(*models: ModelAssignment) -> Desired:
    return Desired(v=1, device="dev-test0001", revision=1, models=models)


@given(power_cuts=st.lists(st.integers(0, 9), max_size=12), version=st.sampled_from(VERSIONS))
def test_converges_after_any_power_cuts(power_cuts: list[int], version: str):
    """A good version ends up serving; one that fails its trial never stays."""
    device = Device()
    device.run(wish(order(GOOD)))
    for steps in power_cuts:
        device.run(wish(order(version)), steps)
        device.cut()
    device.run(wish(order(version)))
    assert device.slots.active is not None
    assert device.slots.active.installed.version == (version if version in KEEPS else GOOD)
    assert device.slots.trial is None


Order = tuple[str, str | None, int, int, int, bool]


@settings(max_examples=200)
@given(
    orders=st.lists(
        st.tuples(
            st.sampled_from(VERSIONS),
            st.one_of(st.none(), st.sampled_from(VERSIONS)),
            st.integers(0, 2),
            st.integers(0, 1),
            st.integers(0, 8),
            st.booleans(),
        ),
        max_size=8,
    ),
    last=st.sampled_from(VERSIONS),
)
def test_any_history_ends_at_the_last_wish(orders: list[Order], last: str):
    """Whatever was wanted before, and whenever the power failed: at rest all that can be is as wanted."""
    device = Device()
    device.run(wish(order(GOOD)))
    for active, staged, activation, attempt, steps, cut in orders:
        models = [order(active, activation=activation, attempt=attempt)]
        if staged is not None:
            models.append(order(staged, Role.STAGED))
        device.run(wish(*models), steps)
        if cut:
            device.cut()
    goal = order(last, activation=3, attempt=2)
    device.run(wish(goal))
    found = device.slots
    assert found.trial is None
    assert found.active is not None
    if found.last_good is not None or found.active.installed.version != LATE:
        assert found.active.installed.version not in {SICK, WRONG, FORGED, LATE}
    assert not {WRONG, FORGED} & set(device.served)
    if last in KEEPS:
        assert (found.active.installed.version, found.active.activation) == (last, 3)
        assert standing(goal, device.observe()).state is AssignmentState.CONFIRMED
    else:
        ended = standing(goal, device.observe())
        tried = last in {SICK, LATE}
        assert ended.state is (AssignmentState.ROLLED_BACK if tried else AssignmentState.REFUSED)
        assert ended.code is not None


def test_a_confirmed_version_that_kills_engines_gives_way_to_the_one_before_and_waits_for_an_order():
    device = Device()
    device.run(wish(order(GOOD)))
    device.run(wish(order(LATE, rollout="r")))
    assert device.slots.active is not None
    assert device.slots.active.installed.version == GOOD
    told = standing(order(LATE, rollout="r"), device.observe())
    assert (told.state, told.code) == (AssignmentState.ROLLED_BACK, "trial.crashed")
    assert told.aftermath is Aftermath.ROLLED_BACK
    assert device.step(wish(order(LATE))) is None
    served = len(device.served)
    device.run(wish(order(LATE, attempt=1)))
    assert LATE in device.served[served:]
    assert device.slots.active.installed.version == GOOD


def test_going_back_by_order_comes_before_falling_back():
    device = Device()
    device.run(wish(order(GOOD)))
    device.run(wish(order(BETTER)))
    seen = msgspec.structs.replace(device.observe(), verdict=Verdict(Judgement.BAD, "trial.crashed"))
    back = order(GOOD, activation=1)
    assert plan.next_step(Goal(back), seen, 0.0) == Activate(back)
    assert isinstance(plan.next_step(Goal(order(SICK)), seen, 0.0), Fallback), "nothing serves meanwhile"
    assert isinstance(plan.plan(None, {"pump": seen}, 0.0)["pump"], Fallback)
    refused = slot.reject(
        device.slots, slot.Rejected(GOOD, back.manifest_sha256, 0, 1, "trial.crashed", stage="trial")
    )
    seen = msgspec.structs.replace(seen, slots=refused)
    assert isinstance(plan.next_step(Goal(back), seen, 0.0), Fallback)
    gone = msgspec.structs.replace(seen, broken=frozenset({back.manifest_sha256}))
    assert plan.next_step(Goal(back), gone, 0.0) is None, "what it would go back to is damaged"


def test_a_rejected_version_waits_for_a_higher_attempt():
    device = Device()
    device.run(wish(order(GOOD)))
    device.run(wish(order(SICK, attempt=1)))
    served = len(device.served)
    assert device.step(wish(order(SICK, attempt=1))) is None
    assert device.step(wish(order(SICK, attempt=0, activation=9))) is None
    assert SICK not in device.served[served:]
    device.run(wish(order(SICK, attempt=2)))
    assert SICK in device.served[served:]
    assert device.slots.active is not None
    assert device.slots.active.installed.version == GOOD


def test_a_healthy_trial_that_nobody_wants_is_rolled_back():
    device = Device()
    device.run(wish(order(GOOD)))
    while device.slots.trial is None:
        device.step(wish(order(BETTER)))
    assert device.verdict.judgement is Judgement.GOOD
    step = device.step(wish(order(GOOD)))
    assert isinstance(step, Rollback)
    assert step.superseded
    assert device.slots.serving is not None
    assert device.slots.serving.installed.version == GOOD
    assert not device.slots.rejected


def test_the_confirmed_version_becomes_the_last_good_of_the_next():
    device = Device()
    for version in (GOOD, BETTER):
        device.run(wish(order(version)))
    assert device.slots.last_good is not None
    assert device.slots.last_good.version == GOOD
    device.run(wish(order(SICK)))
    assert device.slots.last_good.version == GOOD
    assert device.slots.active is not None
    assert device.slots.active.installed.version == BETTER


def test_going_back_to_a_cached_version_needs_no_download():
    device = Device()
    for version in (GOOD, BETTER):
        device.run(wish(order(version)))
    assert isinstance(device.step(wish(order(GOOD, activation=1))), Activate)


def test_a_sham_restart_is_a_trial_of_the_same_version():
    device = Device()
    device.run(wish(order(GOOD)))
    steps = [device.step(wish(order(GOOD, activation=4))) for _ in range(3)]
    assert [type(s) for s in steps] == [Activate, Confirm, type(None)]
    assert device.slots.active is not None
    assert device.slots.active.activation == 4
    assert device.slots.last_good is None


def test_a_failed_sham_restart_leaves_the_version_in_service_and_may_be_repeated():
    device = Device()
    device.run(wish(order(GOOD)))
    device.step(wish(order(GOOD, activation=4)))
    device.verdict = Verdict(Judgement.BAD, "trial.unhealthy")
    device.execute(Rollback("trial.unhealthy"))
    device.verdict = Verdict()
    assert device.step(wish(order(GOOD, activation=4))) is None
    assert device.slots.serving is not None
    assert device.slots.serving.activation == 0
    assert standing(order(GOOD, activation=4), device.observe()).state is AssignmentState.ROLLED_BACK
    assert isinstance(device.step(wish(order(GOOD, activation=5))), Activate)


def test_a_staged_version_is_ready_and_not_in_service():
    device = Device()
    device.run(wish(order(GOOD)))
    staged = order(BETTER, Role.STAGED)
    device.run(wish(order(GOOD), staged))
    assert set(device.served) == {GOOD}
    assert standing(staged, device.observe()).state is AssignmentState.READY
    assert isinstance(device.step(wish(order(BETTER, activation=1))), Activate)


def test_a_standby_that_nobody_wants_is_discarded():
    device = Device()
    device.run(wish(order(GOOD), order(BETTER, Role.STAGED)))
    device.run(wish(order(GOOD)))
    assert device.slots.standby is None


def test_a_model_that_nobody_wants_is_removed_but_never_without_a_document():
    device = Device()
    device.run(wish(order(GOOD)))
    assert plan.plan(None, {"pump": device.observe()}, 0.0) == {}
    assert plan.plan(wish(), {"pump": device.observe()}, 0.0) == {"pump": Remove()}


def test_a_damaged_version_in_service_is_fetched_again_and_stays():
    device = Device()
    device.run(wish(order(GOOD)))
    digest = order(GOOD).manifest_sha256
    seen = msgspec.structs.replace(device.observe(), broken=frozenset({digest}))
    assert plan.next_step(Goal(order(GOOD)), seen, 0.0) == Fetch(order(GOOD), "fast")


def test_a_retry_waits_for_its_time():
    seen = Observed(Slots("pump"), not_before={order(GOOD).manifest_sha256: 5.0})
    assert plan.next_step(Goal(order(GOOD)), seen, 4.0) is None
    assert plan.next_step(Goal(order(GOOD)), seen, 5.0) == Fetch(order(GOOD))


def test_nothing_to_run_here_is_refused_with_its_code():
    device = Device()
    device.manifests.add(order(GOOD).manifest_sha256)
    seen = msgspec.structs.replace(device.observe(), packages={order(GOOD).manifest_sha256: Package(())})
    step = plan.next_step(Goal(order(GOOD)), seen, 0.0)
    assert isinstance(step, Reject)
    assert step.final
    assert step.failure.code == "probe.no_variant"


def test_a_first_version_that_fails_leaves_nothing_to_go_back_to():
    device = Device()
    device.run(wish(order(SICK)))
    assert device.slots.serving is None
    assert standing(order(SICK), device.observe()).aftermath is Aftermath.UNABLE_TO_ROLL_BACK
