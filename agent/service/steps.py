"""Execute one step of the plan. Everything durable happens before anything acts on it."""

import logging
from collections.abc import Callable
from typing import Final

import msgspec

from agent.core import backoff, plan, slots
from agent.core.standing import Standing
from agent.service.children import Children, Download
from agent.service.events import Fetched, Probed
from agent.service.reporting import Facts, Reporter
from agent.service.world import World, installed_from, lookup
from contract.errors import PitheadError
from contract.manifest import Manifest, target_path
from contract.messages import Aftermath, AssignmentState, ModelAssignment, Name, Sha256
from inference.probing import Choice, choose, settled

log = logging.getLogger(__name__)
PROBES: Final = "probes/"
MAX_PROBES: Final = 3
"""A probe that was begun so often and never ended takes the device down with it."""
RETRY_PROBE: Final = frozenset({"probe.timeout", "probe.over_budget", "internal.error"})
"""May have been the fault of a busy device: tried once more."""
PROBE_TRIES: Final = 2
RETRY_FETCH: Final = frozenset({"internal.error", "storage.failed"})
"""Tried again, although the table of codes does not promise success."""
METADATA: Final = frozenset({"update.not_released", "storage.corrupt"})
"""May mean that the verified metadata were lost, or others verified meanwhile: decided only when they are
verified once more."""
RETRY_CAP_S: Final = 120.0
EVENTS: Final[dict[type, str]] = {
    plan.Activate: "slot.trial_started",
    plan.Confirm: "slot.confirmed",
    plan.Rollback: "slot.rolled_back",
    plan.Fallback: "slot.fell_back",
    plan.Reject: "slot.rejected",
    plan.Discard: "slot.discarded",
}


class Steps:
    """Used by the loop alone."""

    def __init__(
        self,
        world: World,
        children: Children,
        reporter: Reporter,
        *,
        now: Callable[[], float],
        wall: Callable[[], int],
        renew: Callable[[], None],
        fraction: Callable[[], float],
    ) -> None:
        """``renew`` asks for the metadata to be verified anew."""
        self._world = world
        self._children = children
        self._reporter = reporter
        self._now = now
        self._wall = wall
        self._renew = renew
        self._unsure: dict[Sha256, int] = {}
        """Documents taken when a fetch failed for want of metadata, by digest."""
        self._fraction = fraction
        self._tries: dict[tuple[Sha256, str], int] = {}

    def execute(self, model_name: Name, step: plan.Step) -> bool:
        """Carry out a step; return whether the slots have changed. Raises ``storage.*``: tried again."""
        if isinstance(step, plan.Fetch):
            self._fetch(step)
            return False
        if isinstance(step, plan.Probe):
            self._probe(step)
            return False
        before = self._world.slots.get(model_name)
        if isinstance(step, plan.Remove):
            self.cancel(model_name)
            self._world.slots.remove(model_name)
            log.info("model.removed", extra={"facts": {"model": model_name}})
            return True
        if isinstance(step, plan.Stage):
            self._stage(step.wanted)
            return True
        after = self._change(before, step)
        self._world.slots.save(after)
        self._log(step, after)
        self._after(before, step, after)
        return True

    def fetched(self, event: Fetched) -> None:
        """Note how a fetch ended."""
        digest, error = event.step.wanted.manifest_sha256, event.error
        if not self._world.wants(event.step.wanted):
            return
        if error is None:
            self._world.troubles.pop(digest, None)
            self._tries.pop((digest, "fetch"), None)
            self._unsure.pop(digest, None)
            return
        log.warning(
            "fetch.failed", extra={"facts": {"digest": digest, "code": error.code, "detail": error.detail}}
        )
        if self._may_pass(event.step, error):
            self._later(digest, "fetch", error)
        else:
            self._unsure.pop(digest, None)
            self._world.failures[digest] = plan.Failure("fetch", error.code, error.detail[:2000])

    def _may_pass(self, step: plan.Fetch, error: PitheadError) -> bool:
        """Whether a fetch that failed is to be tried again after a while."""
        digest = step.wanted.manifest_sha256
        unsure = error.code in METADATA
        if unsure:
            since = self._unsure.setdefault(digest, self._world.taken)
            self._renew()
            unsure = self._world.taken == since
        serving = self._world.slots.get(step.wanted.model_name).serving
        # What serves and is damaged is not given up for want of a download.
        in_service = serving is not None and serving.digest == digest
        return in_service or unsure or error.retryable or error.code in RETRY_FETCH

    def cancel(self, model_name: Name) -> None:
        """Stop what runs for a model; a probe that is not waited for has taken nothing down."""
        task = self._children.running(model_name)
        self._children.cancel(model_name)
        if isinstance(task, plan.Probe):
            begun = self._world.state.get(_probe_key(task), int) or 0
            self._world.state.put({_probe_key(task): begun - 1 if begun > 1 else None})

    def probed(self, event: Probed) -> None:
        """Note how a probe ended; what none can be cheaper than becomes the standby. Raises ``storage.*``."""
        step, result = event.step, event.result
        wanted, digest = step.wanted, step.wanted.manifest_sha256
        self._world.state.put({_probe_key(step): None})
        if not self._world.wants(wanted):
            return
        if step.again:
            self._chosen_again(step, result)
        elif isinstance(result, PitheadError):
            self._probe_failed(step, result)
        else:
            self._world.measured.setdefault(digest, {})[step.variant] = result.report
            if settled(result.report) or self._world.settings.probe.compare == "first":
                self._stage(wanted)

    def _stage(self, wanted: ModelAssignment) -> None:
        """Put the cheapest of the variants that passed into standby."""
        digest, manifest = wanted.manifest_sha256, self._world.manifest(wanted)
        measured = self._world.measured.get(digest)
        if manifest is None or not measured:
            return
        choice = choose(list(measured.values()), manifest)
        variant = lookup(manifest, choice.variant)
        self._world.chosen(digest)
        self._world.slots.save(
            slots.stage(
                self._world.slots.get(wanted.model_name),
                installed_from(wanted, manifest, variant, choice.accelerator),
            )
        )
        self._world.measured.pop(digest)
        self._world.troubles.pop(digest, None)
        self._world.failures.pop(digest, None)
        self._reporter.receipt(wanted, Standing(AssignmentState.PROBED), _probe_facts(choice))
        facts = {"variant": choice.variant, "accelerator": choice.accelerator, "why": choice.why}
        log.info("slot.staged", extra={"facts": _about(wanted) | facts})

    def _chosen_again(self, step: plan.Probe, result: Choice | PitheadError) -> None:
        """Run what serves on what is best now; where nothing passed, leave it to its health."""
        wanted, digest = step.wanted, step.wanted.manifest_sha256
        manifest, found = self._world.manifest(wanted), self._world.slots.get(wanted.model_name)
        facts = _about(wanted) | {"variant": step.variant, "changed": self._world.changes(digest)}
        if isinstance(result, PitheadError):
            log.warning(
                "choice.failed", extra={"facts": facts | {"code": result.code, "detail": result.detail}}
            )
            tried = self._tries.get((digest, step.variant), 0) + 1
            if result.code in RETRY_PROBE and tried < PROBE_TRIES:
                self._later(digest, step.variant, result)
                return
        elif manifest is not None:
            variant = lookup(manifest, result.variant)
            installed = installed_from(wanted, manifest, variant, result.accelerator)
            self._world.slots.save(slots.choose_again(found, installed))
            facts |= {"accelerator": result.accelerator, "why": result.why}
            log.info("choice.repeated", extra={"facts": facts})
        self._tries.pop((digest, step.variant), None)
        self._world.troubles.pop(digest, None)
        self._world.chosen(digest)

    def _probe_failed(self, step: plan.Probe, error: PitheadError) -> None:
        digest = step.wanted.manifest_sha256
        facts = _about(step.wanted) | {"variant": step.variant, "code": error.code, "detail": error.detail}
        log.warning("probe.failed", extra={"facts": facts})
        tried = self._tries.get((digest, step.variant), 0) + 1
        if error.code in RETRY_PROBE and tried < PROBE_TRIES:
            self._later(digest, step.variant, error)
        else:
            self._tries.pop((digest, step.variant), None)
            self._world.failures[digest] = plan.Failure(
                "probe", error.code, error.detail[:2000], step.variant
            )

    def _later(self, digest: Sha256, what: str, error: PitheadError) -> None:
        tried = self._tries[digest, what] = self._tries.get((digest, what), 0) + 1
        pause = backoff.delay(tried, self._fraction(), cap_s=RETRY_CAP_S)
        self._world.troubles[digest] = (error.code, error.detail)
        self._world.not_before[digest] = self._now() + pause

    def _fetch(self, step: plan.Fetch) -> None:
        wanted = step.wanted
        manifest = self._world.manifest(wanted)
        downloads = [Download(wanted.manifest_path, wanted.manifest_sha256, wanted.manifest_length)]
        if step.variant is not None and manifest is not None:
            downloads += _downloads(manifest, step.variant)
        self._children.fetch(step, downloads)

    def _probe(self, step: plan.Probe) -> None:
        manifest = self._world.manifest(step.wanted)
        if manifest is None or self._children.probing:
            return
        begun = self._world.state.get(_probe_key(step), int) or 0
        if begun >= MAX_PROBES and step.again:
            self._world.chosen(step.wanted.manifest_sha256)
            return
        if begun >= MAX_PROBES:
            self._world.failures[step.wanted.manifest_sha256] = plan.Failure(
                "probe", "probe.crashed", f"the device went down in {begun} probes", step.variant
            )
            return
        self._world.state.put({_probe_key(step): begun + 1})
        refs = manifest.files_of(lookup(manifest, step.variant))
        files = {ref.path: self._world.objects.path(ref.sha256) for ref in refs}
        self._children.probe(step, manifest, files)

    def _change(self, before: slots.Slots, step: plan.Step) -> slots.Slots:
        if isinstance(step, plan.Activate):
            return slots.activate(before, step.wanted)
        if isinstance(step, plan.Confirm):
            return slots.confirm(before, self._wall())
        if isinstance(step, plan.Rollback):
            return slots.roll_back(before, None if step.superseded else _trial_failed(before, step))
        if isinstance(step, plan.Fallback):
            return (
                before if before.active is None else slots.fall_back(before, _given_up(before.active, step))
            )
        if isinstance(step, plan.Reject):
            return slots.reject(before, _rejected(step))
        return slots.discard_standby(before)

    def _after(self, before: slots.Slots, step: plan.Step, after: slots.Slots) -> None:
        if isinstance(step, plan.Reject):
            self._world.failures.pop(step.wanted.manifest_sha256, None)
            self._world.troubles.pop(step.wanted.manifest_sha256, None)
        if isinstance(step, plan.Rollback) and step.superseded and before.trial is not None:
            self._reporter.superseded(after.model_name, before.trial, step, after)

    def _log(self, step: plan.Step, after: slots.Slots) -> None:
        serving = after.serving
        facts: dict[str, object] = {
            "model": after.model_name,
            "serves": None if serving is None else serving.installed.version,
            "activation": None if serving is None else serving.activation,
        }
        if isinstance(step, plan.Rollback | plan.Fallback):
            facts |= {"code": step.code, "detail": step.detail}
        if isinstance(step, plan.Reject):
            facts |= {"code": step.failure.code, "version": step.wanted.version, "final": step.final}
        log.info(EVENTS[type(step)], extra={"facts": facts})


def _downloads(manifest: Manifest, variant: Name) -> list[Download]:
    return [
        Download(target_path(manifest.name, manifest.version, ref.path), ref.sha256, ref.length)
        for ref in manifest.files_of(lookup(manifest, variant))
    ]


def _trial_failed(before: slots.Slots, step: plan.Rollback) -> slots.Rejected | None:
    trial = before.trial
    return None if trial is None else _failed_in_service(trial, step, slots.aftermath(before))


def _given_up(active: slots.Serving, step: plan.Fallback) -> slots.Rejected:
    counted = msgspec.structs.replace(active, attempt=step.attempt, activation=step.activation)
    return _failed_in_service(counted, step, Aftermath.ROLLED_BACK)


def _failed_in_service(
    serving: slots.Serving, step: plan.Rollback | plan.Fallback, aftermath: Aftermath
) -> slots.Rejected:
    return slots.Rejected(
        version=serving.installed.version,
        digest=serving.digest,
        attempt=serving.attempt,
        activation=serving.activation,
        code=step.code,
        detail=step.detail,
        stage="trial",
        variant=serving.installed.variant,
        accelerator=serving.installed.accelerator,
        aftermath=aftermath,
    )


def _rejected(step: plan.Reject) -> slots.Rejected:
    wanted, failure = step.wanted, step.failure
    return slots.Rejected(
        version=wanted.version,
        digest=wanted.manifest_sha256,
        attempt=wanted.attempt,
        activation=wanted.activation,
        code=failure.code,
        detail=failure.detail,
        stage=failure.stage,
        final=step.final,
        variant=failure.variant,
    )


def _probe_key(step: plan.Probe) -> str:
    again = "/again" if step.again else ""
    return f"{PROBES}{step.wanted.manifest_sha256}/{step.variant}/{step.wanted.attempt}{again}"


def _probe_facts(choice: Choice) -> Facts:
    report = choice.report
    return {
        "variant": choice.variant,
        "accelerator": choice.accelerator,
        "accelerator_used": report.accelerator_used,
        "runtime": report.runtime,
        "vectors": report.vectors,
        "latency_p50_us": report.latency_p50_us,
        "latency_p99_us": report.latency_p99_us,
        "memory_mb": report.memory_mb,
        "energy_uj": report.energy_uj,
        "nodes": f"{report.placement.nodes_on(report.accelerator)} of {report.placement.total}",
        "why": choice.why,
        "load_ms": report.load_ms,
        "sandbox": None if report.sandbox is None else report.sandbox.level,
    }


def _about(wanted: ModelAssignment) -> dict[str, object]:
    return {"model": wanted.model_name, "version": wanted.version, "attempt": wanted.attempt}
