"""A simulated fleet: it reads the real desired documents and writes real receipts and summaries."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from contract.messages import (
    Aftermath,
    AssignmentState,
    Desired,
    Envelope,
    ModelAssignment,
    ModelSummary,
    PriorityClass,
    Receipt,
    Role,
)
from contract.sketch import SketchBuilder
from control_plane.services.rollouts import NewRollout, Rollouts
from control_plane.services.rollouts_worker import Progress
from control_plane.store import desired as desired_store
from control_plane.store import devices as device_store
from control_plane.store import ingest, registry
from control_plane.store.database import Database
from control_plane.workers.rollouts import RolloutWorker

SECOND = 1_000_000
START = 1_750_000_000 * SECOND
MODEL = "shuttle"
S = AssignmentState

POLICY: dict[str, Any] = {
    "bucket_s": 1,
    "health_s": 2,
    "trial_s": 3,
    "max_soak_buckets": 40,
    "min_soak_buckets": 10,
    "pre_buckets": 20,
    "min_pre_buckets": 10,
    "activation_s": 20,
    "deadline_s": 120,
    "delivery_s": 1,
    "silent_buckets": 8,
    "stages": [{"devices": 3}, {"percent": 50}, {"percent": 100}],
    "metrics": [
        {"name": "latency_p95_us", "minimum_harm": 0.3, "margin": 0.5},
        {"name": "alarm_rate", "minimum_harm": 0.02, "margin": 0.06},
        {"name": "error_rate", "minimum_harm": 0.01, "margin": 0.05},
    ],
}
"""Sizes as in a demonstration: buckets of a second, soaks of 10 to 40."""


@dataclass
class Behaviour:
    """How a version behaves on this fleet."""

    alarm_rate: float = 0.07
    latency_us: float = 150.0
    error_rate: float = 0.0
    refuse: str | None = None
    refusing: frozenset[str] | None = None
    """Who refuses; all when None."""
    fail_trial: str | None = None
    dies_after_s: float | None = None


@dataclass
class SimDevice:
    """One light device: staged, active, and what it tells."""

    id: str
    rng: np.random.Generator
    level: float
    clock_offset_us: int = 0
    online: bool = True
    seq: dict[PriorityClass, int] = field(default_factory=dict)
    active: ModelAssignment | None = None
    activated_at: int = 0
    previous: ModelAssignment | None = None
    told: dict[tuple[str, int, int], AssignmentState] = field(default_factory=dict)
    rejected: set[tuple[str, int]] = field(default_factory=set)
    next_bucket: int = 0
    last_revision: int = -1
    stands: bool = False
    """Its machine does not run: nothing is scored, and the summaries say so."""


class Fleet:
    """A database, the services on it, a worker and simulated devices, on a clock of their own."""

    def __init__(self, database: Database, devices: int = 20, seed: int = 1, windows: int = 50) -> None:
        self.database = database
        self.now = START
        self.windows = windows
        self.requests = 0
        """At most so many requests of applications a bucket, beside the lane's windows."""
        self.sent: list[tuple[Envelope, int]] = []
        self.behaviours: dict[str, Behaviour] = {}
        ids = itertools.count(1)
        self.rollouts = Rollouts(database, lambda: self.now, lambda: f"rollout-{next(ids):04d}")
        self.worker = RolloutWorker(Progress(database))
        rng = np.random.default_rng(seed)
        self.devices = [
            SimDevice(
                id=f"device-{index:04d}",
                rng=np.random.default_rng([seed, index]),
                level=float(np.exp(rng.normal(0, 0.15))),
            )
            for index in range(devices)
        ]
        with database.transaction() as tx:
            for device in self.devices:
                device_store.add_device(
                    tx,
                    device_id=device.id,
                    name=device.id,
                    hardware="sim",
                    arch="x86_64",
                    accelerators=("cpu",),
                    agent_version="0",
                    labels={"site": "a"},
                    enrolled_by="test",
                    key_hash=device.id,
                    now=self.now,
                )

    def release(self, version: str, **behaviour: Any) -> None:
        self.behaviours[version] = Behaviour(**behaviour)
        counter = len(self.behaviours)
        with self.database.transaction() as tx:
            registry.add_version(
                tx,
                registry.VersionRecord(
                    model_name=MODEL,
                    version=version,
                    release_counter=counter,
                    manifest_sha256=f"{counter:064x}",
                    manifest_length=10,
                    released_at=self.now,
                    released_by="test",
                ),
                manifest="{}",
                report="{}",
                files=[],
            )

    def create(self, version: str, **policy: Any) -> str:
        new = NewRollout(model_name=MODEL, version=version, policy={**POLICY, **policy})
        return self.rollouts.create(actor="operator", new=new).id

    def install(self, version: str = "1.0.0") -> None:
        """Bring a first version to all devices."""
        self.release(version)
        rollout = self.create(version, strategy="all_at_once")
        assert self.run_until(rollout, {"succeeded", "paused"}, 60) == "succeeded"

    def canaries(self, rollout_id: str) -> list[SimDevice]:
        """Those of the rollout so far, once it has ordered any."""
        while self.rollouts.detail(rollout_id).rollout.ordered_at is None:
            self.run(0.5)
        chosen = {m.device_id for m in self.rollouts.assignments(rollout_id) if m.arm.value == "canary"}
        return [device for device in self.devices if device.id in chosen]

    def state(self, rollout_id: str) -> str:
        return self.rollouts.detail(rollout_id).rollout.state.value

    def reason(self, rollout_id: str) -> str:
        return self.rollouts.detail(rollout_id).rollout.reason

    def new_worker(self) -> None:
        """As if the process had died and come back."""
        self.worker = RolloutWorker(Progress(self.database))

    def run(self, seconds: float, tick_s: float = 0.5) -> None:
        end = self.now + round(seconds * SECOND)
        while self.now < end:
            self.now += round(tick_s * SECOND)
            with self.database.transaction() as tx:
                wanted = {document.device: document for document in desired_store.read_all(tx)}
                for device in self.devices:
                    if device.online and device.id in wanted:
                        self._live(device, wanted[device.id])
                ingest.insert_records(tx, self.sent)
                self.sent.clear()
            self.worker.tick(self.now)

    def run_until(self, rollout_id: str, states: set[str], seconds: float) -> str:
        end = self.now + round(seconds * SECOND)
        while self.now < end:
            self.run(0.5)
            state = self.rollouts.detail(rollout_id).rollout.state.value
            if state in states:
                return state
        detail = self.rollouts.detail(rollout_id)
        raise AssertionError(f"still {detail.rollout.state} {detail.rollout.reason} {detail.states}")

    def versions(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for device in self.devices:
            version = device.active.version if device.active else "none"
            counts[version] = counts.get(version, 0) + 1
        return counts

    def _live(self, device: SimDevice, document: Desired) -> None:
        bucket_us = round(document.reporting.bucket_s * SECOND)
        for wanted in [m for m in document.models if m.model_name == MODEL]:
            self._toward(device, wanted, round(document.reporting.trial_s * SECOND))
        if not document.models:
            device.active = None
        local = self.now + device.clock_offset_us
        if device.next_bucket == 0:
            device.next_bucket = local - local % bucket_us
        while device.next_bucket + bucket_us <= local - SECOND // 5:
            self._summary(device, device.next_bucket, bucket_us / SECOND)
            device.next_bucket += bucket_us

    def _toward(self, device: SimDevice, wanted: ModelAssignment, trial_us: int) -> None:
        behaviour = self.behaviours[wanted.version]
        key = (wanted.version, wanted.attempt)
        if key in device.rejected:
            return
        if behaviour.refuse and (behaviour.refusing is None or device.id in behaviour.refusing):
            device.rejected.add(key)
            self._tell(device, wanted, S.REFUSED, behaviour.refuse, Aftermath.NO_CHANGE)
            return
        if wanted.role is not Role.ACTIVE:
            for state in (S.ACKNOWLEDGED, S.FETCHING, S.VERIFIED, S.READY):
                self._tell(device, wanted, state)
            return
        if device.active is None or device.active.activation < wanted.activation:
            if device.active is not None and device.active.version != wanted.version:
                device.previous = device.active
            device.active = wanted
            device.activated_at = self.now
            self._tell(device, wanted, S.ACTIVATING)
            return
        if self.now - device.activated_at < trial_us / 2:
            self._tell(device, wanted, S.SOAKING)
        elif behaviour.fail_trial and device.active == wanted:
            device.rejected.add(key)
            device.active = device.previous
            self._tell(device, wanted, S.ROLLED_BACK, behaviour.fail_trial, Aftermath.ROLLED_BACK)
        else:
            self._tell(device, wanted, S.CONFIRMED)

    def _tell(
        self,
        device: SimDevice,
        wanted: ModelAssignment,
        state: AssignmentState,
        code: str | None = None,
        aftermath: Aftermath | None = None,
    ) -> None:
        key = (wanted.version, wanted.activation, wanted.attempt)
        if device.told.get(key) is state or (state is S.ACKNOWLEDGED and key in device.told):
            return
        if wanted.role is Role.STAGED and device.told.get(key) is S.READY:
            return
        device.told[key] = state
        body = Receipt(
            model_name=MODEL,
            version=wanted.version,
            state=state,
            activation=wanted.activation,
            attempt=wanted.attempt,
            rollout=wanted.rollout,
            code=code,
            aftermath=aftermath,
        )
        self._send(device, PriorityClass.RECEIPT, body)

    def _summary(self, device: SimDevice, start: int, bucket_s: float) -> None:
        if device.active is None:
            return
        behaviour = self.behaviours[device.active.version]
        age = (self.now - device.activated_at) / SECOND
        if behaviour.dies_after_s is not None and age > behaviour.dies_after_s:
            return
        errors = int(device.rng.binomial(self.windows, behaviour.error_rate))
        count = self.windows - errors
        rate = min(1.0, behaviour.alarm_rate * device.level)
        latency = SketchBuilder()
        center = math.log(behaviour.latency_us * device.level)
        for value in np.exp(device.rng.normal(center, 0.1, 8)):
            latency.add(float(value))
        body = ModelSummary(
            model_name=MODEL,
            version=device.active.version,
            bucket_start=start,
            bucket_s=bucket_s,
            count=count,
            errors=errors,
            alarms=int(device.rng.binomial(count, rate)),
            activation=device.active.activation,
            latency_us=latency.build(),
        )
        if device.stands:
            body = msgspec.structs.replace(
                body, count=0, errors=0, alarms=0, latency_us=None, muted=self.windows
            )
        self._send(device, PriorityClass.SUMMARY, body)
        if self.requests:
            asked = SketchBuilder()
            asked.add(float(device.rng.lognormal(3.0, 1.0)))
            served = msgspec.structs.replace(
                body,
                muted=0,
                count=int(device.rng.integers(1, self.requests)),
                errors=0,
                alarms=0,
                latency_us=asked.build(),
                source="serve",
            )
            self._send(device, PriorityClass.SUMMARY, served)

    def _send(self, device: SimDevice, priority: PriorityClass, body: Receipt | ModelSummary) -> None:
        device.seq[priority] = device.seq.get(priority, 0) + 1
        envelope = Envelope(
            v=1,
            device=device.id,
            priority=priority,
            epoch="e",
            seq=device.seq[priority],
            boot_id="b",
            t_wall=self.now + device.clock_offset_us,
            t_mono=self.now,
            body=body,
        )
        self.sent.append((envelope, self.now))


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database of the newest schema, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    found = Database(f"sqlite:///{path}")
    found.migrate()
    found.close()
    return path


@pytest.fixture
def database(tmp_path: Path, migrated_file: Path) -> Iterator[Database]:
    path = tmp_path / "pithead.db"
    shutil.copy(migrated_file, path)
    found = Database(f"sqlite:///{path}")
    yield found
    found.close()


@pytest.fixture
def make_fleet(database: Database) -> Callable[..., Fleet]:
    return lambda **sizes: Fleet(database, **sizes)


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet]) -> Fleet:
    """Twenty devices with version 1.0.0 in service."""
    made = make_fleet()
    made.install()
    return made


@pytest.fixture
def policy() -> dict[str, Any]:
    """The policy of these tests, to be changed at will."""
    return dict(POLICY)


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    """The same as TOML."""
    lines = [f"{name} = {value}" for name, value in POLICY.items() if not isinstance(value, list)]
    for name in ("stages", "metrics"):
        for entry in POLICY[name]:
            lines.append(f"[[{name}]]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in entry.items()]
    path = tmp_path / "policy.toml"
    path.write_text("\n".join(lines) + "\n")
    return path
