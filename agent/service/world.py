"""What the device is now: its stores, its engine's lanes and its last failures, as values for the planner."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from agent.core import blame, health, plan, slots, variants
from agent.core.blame import Suspect
from agent.core.layout import Layout
from agent.core.settings import AgentSettings, Lane
from agent.core.slots import Installed, Serving, Slots
from agent.errors import from_os
from agent.ports import FitResult, LaneSpec, LaneState, ModelSpec, ServeSpec, ServeState
from agent.service.specs import binding_of, lane_seen, model_spec
from agent.store.objects import ObjectStore
from agent.store.slots import SlotStore
from agent.store.state import StateStore
from contract.errors import PitheadError
from contract.manifest import Manifest, Variant
from contract.messages import Desired, ErrorCode, ModelAssignment, Name, Reporting, Sha256
from contract.package import parse_manifest
from inference.circumstances import differences
from inference.probing import ProbeReport

log = logging.getLogger(__name__)
DESIRED: Final = "desired"
ETAG: Final = "etag"
FIT: Final = "fit/"
CHOSEN: Final = "chosen/"
SERVING: Final = "serving"
"""Stands where a lane's name would, of a model that is only served."""


class Machine(Struct, frozen=True):
    """What does not change while the supervisor runs."""

    device: str
    boot_id: str
    arch: str
    hardware: str
    formats: frozenset[str]
    """Model formats for which a runtime is installed."""
    accelerators: tuple[str, ...]
    runtimes: dict[str, str]
    agent_version: str
    circumstances: dict[str, str] = {}
    """What a choice by measurement depends on."""


class World:
    """Everything that ``next_step`` looks at. Used by the loop alone."""

    def __init__(
        self,
        layout: Layout,
        settings: AgentSettings,
        machine: Machine,
        *,
        slot_store: SlotStore,
        objects: ObjectStore,
        state: StateStore,
    ) -> None:
        self.layout = layout
        self.settings = settings
        self.machine = machine
        self.slots = slot_store
        self.objects = objects
        self.state = state
        self.desired: Desired | None = state.get(DESIRED, Desired)
        self.taken = 0
        """Documents that were verified and taken since the start."""
        self.lanes: dict[str, LaneState] = {}
        self.heard: dict[str, float] = {}
        """When each lane spoke last, by the monotonic clock."""
        self.serve: ServeState | None = None
        self.serve_heard = 0.0
        self.failures: dict[Sha256, plan.Failure] = {}
        self.not_before: dict[Sha256, float] = {}
        self.measured: dict[Sha256, dict[Name, ProbeReport]] = {}
        """Variants that passed, while others may be cheaper. Lost with the process, and measured anew."""
        self.troubles: dict[Sha256, tuple[ErrorCode, str]] = {}
        """Errors that will be tried again, by digest."""
        self._crashed: dict[Name, tuple[Serving, health.Verdict]] = {}
        """Trials that were in service when the engine died, and how."""
        self._works: set[str] = set()
        """Lanes whose source has given rows that were scored."""
        self._failing: dict[Name, tuple[Serving, float]] = {}
        """Confirmed versions of which a lane has failed, and since when."""
        self._watches: dict[Name, tuple[Serving, health.Watch]] = {}
        self._manifests: dict[Sha256, Manifest] = {}
        self._unusable: dict[Sha256, plan.Failure] = {}
        """Manifests that are here and mean nothing."""
        self._fits: dict[str, FitResult] = state.scan(FIT, FitResult)
        self._chosen: dict[Sha256, dict[str, str] | None] = {}
        """Circumstances of the choices, as far as they were looked up."""

    @property
    def reporting(self) -> Reporting:
        """How often to report, as desired."""
        return Reporting() if self.desired is None else self.desired.reporting

    def take(self, desired: Desired, etag: str | None) -> None:
        """Accept a verified document, durably."""
        self.state.put({DESIRED: desired, ETAG: etag})
        self.desired = desired
        self.taken += 1
        wanted = {a.manifest_sha256 for a in desired.models}
        for old in (self.failures, self.troubles, self.not_before, self.measured):
            for digest in old.keys() - wanted:
                old.pop(digest)

    def wants(self, wanted: ModelAssignment) -> bool:
        """Whether an order, in this attempt, still stands; what came of an older one is of no account."""
        mine = (wanted.manifest_sha256, wanted.attempt)
        models = self.desired.models if self.desired is not None else ()
        return mine in {(a.manifest_sha256, a.attempt) for a in models}

    def manifest(self, wanted: ModelAssignment) -> Manifest | None:
        """Return the manifest of an assignment if it is here; a wrong one becomes a failure."""
        digest = wanted.manifest_sha256
        known = self._manifests.get(digest)
        if digest in self._unusable:
            self.failures.setdefault(digest, self._unusable[digest])
            return None
        if known is not None or not self.objects.has(digest, wanted.manifest_length):
            return known
        try:
            manifest = parse_manifest(self.objects.read(digest))
            if (manifest.name, manifest.version) != (wanted.model_name, wanted.version):
                raise PitheadError(  # noqa: TRY301
                    "package.manifest_invalid", f"it is the manifest of {manifest.name} {manifest.version}"
                )
        except PitheadError as error:
            if error.code in {"message.malformed", "message.too_large", "package.manifest_invalid"}:
                failure = plan.Failure("fetch", "package.manifest_invalid", error.detail[:2000])
                self._unusable[digest] = self.failures[digest] = failure
            log.warning("manifest.unreadable", extra={"facts": {"digest": digest, "detail": error.detail}})
            return None
        self._manifests[digest] = manifest
        return manifest

    def candidates(self, manifest: Manifest) -> tuple[Variant, ...]:
        """Return the variants that are worth a probe here."""
        return variants.candidates(
            manifest,
            arch=self.machine.arch,
            formats=self.machine.formats,
            accelerators=self.machine.accelerators,
        )

    def observe(self, now: float) -> dict[Name, plan.Observed]:
        """Return every model that is wanted or here."""
        wanted = plan.goals(self.desired) if self.desired is not None else {}
        return {
            name: self._observe(self.slots.get(name), wanted.get(name, plan.Goal()), now)
            for name in {*wanted, *self.slots.all()}
        }

    def soaking(self, found: Slots) -> bool:
        """Whether all of a model's lanes serve its trial."""
        if found.trial is None:
            return False
        lanes = self._lanes_seen(found.model_name, found.trial)
        return all(lane.serves and lane.state in {"running", "calibrating"} for lane in lanes)

    def lanes_of(self, model_name: Name) -> list[Lane]:
        """Return the configured lanes of a model."""
        return [lane for lane in self.settings.lanes if lane.model == model_name]

    def lane_specs(self) -> tuple[LaneSpec, ...]:
        """Return what the engine shall run: whatever serves and has its files."""
        specs = []
        for lane in self.settings.lanes:
            serving = self.in_service(self.slots.get(lane.model))
            if serving is not None:
                specs.append(self._lane_spec(lane, serving))
        return tuple(specs)

    def serve_spec(self) -> ServeSpec | None:
        """Return what the engine shall serve to applications: whatever serves and has its files."""
        if not self.settings.serve.enabled:
            return None
        found = self.slots.all()
        serving = ((name, self.in_service(found[name])) for name in sorted(found))
        models = tuple(self._model_spec(name, s) for name, s in serving if s is not None)
        return ServeSpec(self.settings.serve, models)

    def served(self, model_name: Name) -> LaneState | None:
        """Return what serving says of a model."""
        models = () if self.serve is None else self.serve.models
        return next((state for state in models if state.model_name == model_name), None)

    def in_service(self, found: Slots) -> Serving | None:
        """Return what shall run of a model now: while files of it are lost, what it came after stands in."""
        last = None if found.last_good is None else Serving(found.last_good)
        return next((s for s in (found.serving, found.active, last) if s and self.intact(s.installed)), None)

    def engine_died(self, suspects: Collection[Suspect], how: health.Verdict, *, soon: bool) -> None:
        """Charge whoever is to blame, a confirmed version durably. Raises ``storage.*``."""
        verdict = blame.sentence(self.slots.all(), suspects)
        if verdict.crashed is not None:
            trial = self.slots.get(verdict.crashed).trial
            if trial is not None:
                self._crashed[verdict.crashed] = (trial, how)
        if verdict.charged is not None:
            of = f"{how.code}: {how.detail}"
            self.slots.save(slots.died(self.slots.get(verdict.charged), soon=soon, of=of))

    def fitted(self, lane: str, digest: Sha256, fit: FitResult) -> None:
        """Keep a calibration, durably."""
        key = self._fit_key(digest, lane, fit.binding)
        self._fits[key] = fit
        self.state.put({FIT + key: fit})

    def forget_lanes(self) -> None:
        """What the lanes said is of no account any more: the engine cannot be heard, or is another."""
        self.lanes.clear()
        self.heard.clear()
        self.serve = None

    def lane_said(self, state: LaneState, now: float) -> None:
        """Take a lane's state; files that it found damaged are deleted, so that they are fetched again."""
        before = self.lanes.get(state.lane)
        self.lanes[state.lane], self.heard[state.lane] = state, now
        if state.windows:
            self._works.add(state.lane)
        self._check_damage(state, before)

    def serve_said(self, state: ServeState, now: float) -> None:
        """Take the state of serving; damaged files are dealt with as a lane's."""
        before = {model.model_name: model for model in self.serve.models} if self.serve is not None else {}
        self.serve, self.serve_heard = state, now
        for model in state.models:
            self._check_damage(model, before.get(model.model_name))

    def _check_damage(self, state: LaneState, before: LaneState | None) -> None:
        if state.code not in health.DAMAGE or (before is not None and before.code == state.code):
            return
        for installed in self.slots.get(state.model_name).installed():
            for sha256 in (installed.digest, *installed.files.values()):
                self.objects.verify(sha256)

    def intact(self, installed: Installed) -> bool:
        """Whether all objects of an installed version are here."""
        return all(self.objects.has(sha256) for sha256 in (installed.digest, *installed.files.values()))

    def needed_objects(self) -> set[Sha256]:
        """Return the hashes that slots, lanes and orders still need."""
        needed: set[Sha256] = set()
        for found in self.slots.all().values():
            for installed in found.installed():
                needed |= {installed.digest, *installed.files.values()}
        for wanted in self.desired.models if self.desired is not None else ():
            needed.add(wanted.manifest_sha256)
            manifest = self._manifests.get(wanted.manifest_sha256)
            if manifest is not None:
                needed |= {r.sha256 for v in self.candidates(manifest) for r in manifest.files_of(v)}
        return needed

    def forget(self) -> None:
        """Drop manifests and fits of versions that no slot and no order names."""
        digests = {i.digest for s in self.slots.all().values() for i in s.installed()}
        digests |= {a.manifest_sha256 for a in (self.desired.models if self.desired is not None else ())}
        self._manifests = {d: m for d, m in self._manifests.items() if d in digests}
        self._unusable = {d: f for d, f in self._unusable.items() if d in digests}
        old = [key for key in self.state.scan(CHOSEN, dict[str, str]) if key not in digests]
        if old:
            self.state.put({CHOSEN + key: None for key in old})
            self._chosen = {d: c for d, c in self._chosen.items() if d in digests}
        gone = [key for key in self._fits if key.split("/")[1] not in digests]
        if gone:
            self.state.put({FIT + key: None for key in gone})
            self._fits = {key: fit for key, fit in self._fits.items() if key not in gone}

    def _observe(self, found: Slots, goal: plan.Goal, now: float) -> plan.Observed:
        packages: dict[Sha256, plan.Package] = {}
        for wanted in goal.assignments:
            manifest = self.manifest(wanted)
            if manifest is not None:
                packages[wanted.manifest_sha256] = self._package(wanted, manifest)
        return plan.Observed(
            slots=found,
            packages=packages,
            broken=frozenset(i.digest for i in found.installed() if not self.intact(i)),
            failures=self.failures,
            not_before=self.not_before,
            verdict=self._verdict(found, now),
            stale=frozenset(i.digest for i in found.installed() if self.changes(i.digest)),
        )

    def changes(self, digest: Sha256) -> dict[str, str]:
        """Return what is not as it was when a version's accelerator was chosen."""
        if digest not in self._chosen:
            self._chosen[digest] = self.state.get(CHOSEN + digest, dict[str, str])
        before = self._chosen[digest]
        return {} if before is None else differences(before, self.machine.circumstances)

    def chosen(self, digest: Sha256) -> None:
        """Note durably under which circumstances an accelerator was chosen. Raises ``storage.*``."""
        self.state.put({CHOSEN + digest: self.machine.circumstances})
        self._chosen[digest] = self.machine.circumstances

    def _package(self, wanted: ModelAssignment, manifest: Manifest) -> plan.Package:
        fitting = self.candidates(manifest)
        complete = frozenset(
            v.name for v in fitting if all(self.objects.has(r.sha256, r.length) for r in manifest.files_of(v))
        )
        measured = frozenset(self.measured.get(wanted.manifest_sha256, {}))
        return plan.Package(tuple(v.name for v in fitting), complete, measured)

    def _verdict(self, found: Slots, now: float) -> health.Verdict:
        name, trial = found.model_name, found.trial
        if trial is None:
            self._watches.pop(name, None)
            self._crashed.pop(name, None)
            return self._verdict_on_confirmed(found, now)
        self._failing.pop(name, None)
        crashed = self._crashed.get(name)
        if crashed is not None and crashed[0] == trial:
            return crashed[1]
        before = self._watches.get(name)
        lanes = self._lanes_seen(name, trial, now)
        seen = health.watch(before[1] if before is not None and before[0] == trial else None, lanes, now)
        self._watches[name] = (trial, seen)
        return health.judge(seen, lanes, now, trial_s=self.reporting.trial_s, starts=found.trial_starts)

    def _verdict_on_confirmed(self, found: Slots, now: float) -> health.Verdict:
        name, active = found.model_name, found.active
        if active is None:
            return health.Verdict()
        lanes = self._lanes_seen(name, active, now)
        before = self._failing.get(name)
        if any(health.ails(lane) for lane in lanes):
            if before is None or before[0] != active:
                before = self._failing[name] = (active, now)
        elif before is not None and (before[0] != active or any(lane.serves for lane in lanes)):
            self._failing.pop(name)
            before = None
        failed_s = 0.0 if before is None else now - before[1]
        return health.judge_confirmed(lanes, failed_s, found.deaths, found.died_of)

    def _lanes_seen(
        self, model_name: Name, serving: Serving, now: float | None = None
    ) -> list[health.LaneSeen]:
        """Return a model's lanes as they concern a version; without ``now`` whenever they spoke.

        Where a model has none and models are served, serving stands for one.
        """
        if self.settings.serve.enabled and not self.lanes_of(model_name):
            silent = now is not None and self.serve is not None and now - self.serve_heard > health.STALE_S
            seen = lane_seen(SERVING, self.served(model_name), serving, silent=silent)
            return [msgspec.structs.replace(seen, on_demand=True)]
        return [
            lane_seen(
                lane.name,
                self.lanes.get(lane.name),
                serving,
                silent=now is not None and now - self.heard.get(lane.name, now) > health.STALE_S,
                source_works=lane.name in self._works,
            )
            for lane in self.lanes_of(model_name)
        ]

    def _lane_spec(self, lane: Lane, serving: Serving) -> LaneSpec:
        model = self._model_spec(lane.model, serving)
        source = dict(lane.source)
        path = source.get("path")
        if isinstance(path, str):
            source["path"] = str(self.layout.config.parent / Path(path))
        binding = binding_of(source, self._asked(lane.name))
        return LaneSpec(
            lane=lane.name,
            source=source,
            fit=self._fits.get(self._fit_key(model.digest, lane.name, binding)),
            binding=binding,
            sinks=lane.sinks,
            bypass=str(self.layout.bypass) if lane.sinks else "",
            machine=lane.machine,
            **msgspec.structs.asdict(model),
        )

    def _model_spec(self, model_name: Name, serving: Serving) -> ModelSpec:
        return model_spec(model_name, serving, self.objects, self.settings)

    def _asked(self, lane: str) -> str:
        """Return when another calibration was last asked for; raises ``storage.*``."""
        path = self.layout.calibration(lane)
        try:
            return path.read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise from_os(error, f"reading {path}") from error

    def _fit_key(self, digest: Sha256, lane: str, binding: str) -> str:
        return f"{self.machine.device}/{digest}/{lane}/{binding}"


def installed_from(
    wanted: ModelAssignment, manifest: Manifest, variant: Variant, accelerator: str
) -> Installed:
    """Return what a passed probe puts into standby."""
    return slots.Installed(
        version=wanted.version,
        digest=wanted.manifest_sha256,
        variant=variant.name,
        accelerator=accelerator,
        files={ref.path: ref.sha256 for ref in manifest.files_of(variant)},
    )


def lookup(manifest: Manifest, name: Name) -> Variant:
    """Return a variant by its name; ``KeyError`` when there is none."""
    return {v.name: v for v in manifest.variants}[name]


Observation = Mapping[Name, plan.Observed]
