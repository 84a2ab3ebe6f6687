"""The policy of a rollout: how far, how fast, and what the gate must see.

An unknown key is an error that names it: a threshold that was misspelt must
not turn into a threshold that is not there.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from contract.errors import PitheadError

LATENCY: Final = "latency_p95_us"
ALARM_RATE: Final = "alarm_rate"
ERROR_RATE: Final = "error_rate"
RATE: Final = "_rate"
"""Ends the name of every share of something."""
LIVE_METRICS: Final = (LATENCY, ALARM_RATE, ERROR_RATE)
"""What can be compared in a live rollout; a trace may bring any other metric."""

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Percent = Annotated[float, Meta(ge=0, le=100)]
AtLeastOne = Annotated[int, Meta(ge=1)]


def _finite(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise ValueError(f"`{name}` must be a finite number")


class Stage(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How many devices run the new version in this stage, counted from the rollout's start."""

    devices: AtLeastOne | None = None
    percent: Annotated[float, Meta(gt=0, le=100)] | None = None

    def __post_init__(self) -> None:
        if (self.devices is None) == (self.percent is None):
            raise ValueError("a stage has either `devices` or `percent`")
        _finite(percent=self.percent)


class Metric(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One metric of the comparison.

    ``minimum_harm`` and ``margin`` are in the metric's unit. On the log scale
    they are relative: 0.2 is a fifth more (or less, where lower is worse).
    Harm above ``minimum_harm`` halts; harm of ``margin`` must be refuted
    before a stage may grow.
    """

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    minimum_harm: NotNegative
    margin: Positive
    higher_is_worse: bool = True
    scale: Literal["linear", "log"] | None = None
    """Default: log for ``latency_p95_us``, linear for everything else."""

    def __post_init__(self) -> None:
        _finite(minimum_harm=self.minimum_harm, margin=self.margin)
        if self.minimum_harm > self.margin:
            raise ValueError("`minimum_harm` is larger than `margin`: what may grow would have to be halted")
        if self.logarithmic and self.name.endswith(RATE):
            raise ValueError(f"`scale`: {self.name} is a rate, and can be 0; compare it on the linear scale")

    @property
    def logarithmic(self) -> bool:
        """Whether the metric is compared on the log scale."""
        return self.name == LATENCY if self.scale is None else self.scale == "log"

    def shift(self, size: float) -> float:
        """Return a harm of ``size`` on the scale of the comparison."""
        return math.log1p(size) if self.logarithmic else size


class Guardrails(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Absolute limits: reaching one halts at once.

    A count halts when it reaches both its number and its percentage of the
    devices that were reached (of silent canaries: of the canaries).
    """

    rolled_back: AtLeastOne = 2
    rolled_back_percent: Percent = 2.0
    refused: AtLeastOne = 2
    refused_percent: Percent = 2.0
    crashed: AtLeastOne = 2
    """Devices on which the new version killed its engine or its probe."""
    unable_to_roll_back: AtLeastOne = 1
    silent_canaries: AtLeastOne = 2
    silent_percent: Percent = 50.0
    """Of the canaries that spoke after their activation; and clearly more than of the controls."""
    engine_restarts: AtLeastOne = 3
    """Deaths of the engine on one canary while it soaks, and more than on any control."""
    error_rate: Annotated[float, Meta(gt=0, le=1)] = 0.2
    """Share of windows that failed on one device while it soaks."""
    error_windows: AtLeastOne = 20
    """Fewer windows say nothing about the error rate."""

    def __post_init__(self) -> None:
        _finite(
            rolled_back_percent=self.rolled_back_percent,
            refused_percent=self.refused_percent,
            silent_percent=self.silent_percent,
            error_rate=self.error_rate,
        )


def _default_metrics() -> tuple[Metric, ...]:
    return (
        Metric(name=LATENCY, minimum_harm=0.1, margin=0.3),
        Metric(name=ALARM_RATE, minimum_harm=0.01, margin=0.03),
        Metric(name=ERROR_RATE, minimum_harm=0.005, margin=0.02),
    )


class Policy(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole policy. Soak, looks and periods are counted in buckets of ``bucket_s`` seconds."""

    strategy: Literal["canary", "all_at_once"] = "canary"
    stages: Annotated[tuple[Stage, ...], Meta(min_length=1, max_length=32)] = (
        Stage(devices=1),
        Stage(percent=5),
        Stage(percent=25),
        Stage(percent=100),
    )
    metrics: Annotated[tuple[Metric, ...], Meta(min_length=1, max_length=16)] = msgspec.field(
        default_factory=_default_metrics
    )
    guardrails: Guardrails = msgspec.field(default_factory=Guardrails)
    alpha: Annotated[float, Meta(gt=0, lt=0.5)] = 0.05
    """Chance of halting a harmless release, over the whole rollout; and, for each
    metric, of letting a release pass that is as harmful as the margin."""
    bucket_s: Annotated[float, Meta(ge=0.2, le=3600)] = 60.0
    max_soak_buckets: Annotated[int, Meta(ge=5, le=100_000)] = 480
    """The longest soak of a stage; after it a hold pauses for a person."""
    min_soak_buckets: Annotated[int, Meta(ge=0)] | None = None
    """No stage grows before; a quarter of the longest soak unless given."""
    first_look: AtLeastOne = 5
    look_growth: Annotated[float, Meta(gt=1, le=4)] = 1.2
    last_third_after: AtLeastOne = 60
    """From so many buckets on the last third is compared on its own too."""
    silent_buckets: AtLeastOne = 15
    """A device that said nothing for so long is silent."""
    pre_buckets: AtLeastOne = 720
    """How far the period before the activation reaches back."""
    min_pre_buckets: Annotated[int, Meta(ge=0)] = 10
    """Activation waits for so much of it."""
    min_coverage: Annotated[float, Meta(gt=0, le=1)] = 0.9
    """Share of every stratum that must be ready before the first activation, and of the
    canaries and controls that must still report before a stage grows."""
    delivery_s: NotNegative = 2.0
    """How long a bucket may be under way before its absence counts."""
    activation_s: Positive = 600.0
    """How long canaries and controls have for their (re)activation."""
    deadline_s: Positive = 86400.0
    """A device that is not ready by then counts as unreached."""
    permutations: Annotated[int, Meta(ge=200, le=20_000)] = 4000
    on_halt: Literal["roll_back", "pause"] = "roll_back"
    hold_out_percent: Percent = 5.0
    approval: bool = False
    """Whether a person must approve before the rollout starts."""
    trial_s: Annotated[float, Meta(ge=0.5, le=86400)] = 30.0
    health_s: Annotated[float, Meta(ge=0.5, le=3600)] = 60.0

    def __post_init__(self) -> None:
        names = [metric.name for metric in self.metrics]
        if len(set(names)) != len(names):
            raise ValueError("two metrics have the same name")
        if self.first_look > self.max_soak_buckets:
            raise ValueError("`first_look` lies behind `max_soak_buckets`")
        if self.shortest_soak > self.max_soak_buckets:
            raise ValueError("`min_soak_buckets` is larger than `max_soak_buckets`")
        _rising(self.stages)
        _finite(
            alpha=self.alpha,
            bucket_s=self.bucket_s,
            look_growth=self.look_growth,
            min_coverage=self.min_coverage,
            delivery_s=self.delivery_s,
            activation_s=self.activation_s,
            deadline_s=self.deadline_s,
            hold_out_percent=self.hold_out_percent,
            trial_s=self.trial_s,
            health_s=self.health_s,
        )

    @property
    def shortest_soak(self) -> int:
        """Buckets before which no stage grows."""
        return self.max_soak_buckets // 4 if self.min_soak_buckets is None else self.min_soak_buckets

    def metric(self, name: str) -> Metric | None:
        """Return the metric ``name``, if the policy has it."""
        return next((metric for metric in self.metrics if metric.name == name), None)


def parse(document: Mapping[str, object]) -> Policy:
    """Return the policy that ``document`` (as read from TOML or JSON) describes.

    Raises ``rollout.policy_invalid`` with the key's name and path.
    """
    try:
        return msgspec.convert(dict(document), Policy)
    except msgspec.ValidationError as error:
        raise PitheadError("rollout.policy_invalid", str(error)) from error


def require_live(policy: Policy) -> None:
    """Raise ``rollout.policy_invalid`` when ``policy`` asks for something that no device reports."""
    for index, metric in enumerate(policy.metrics):
        if metric.name not in LIVE_METRICS:
            raise PitheadError(
                "rollout.policy_invalid",
                f"`{metric.name}` is not measured in a live rollout, choose of "
                f"{', '.join(LIVE_METRICS)} - at `$.metrics[{index}].name`",
            )


def _rising(stages: tuple[Stage, ...]) -> None:
    for unit in ("devices", "percent"):
        sizes = [size for stage in stages if (size := getattr(stage, unit)) is not None]
        if any(after <= before for before, after in itertools.pairwise(sizes)):
            raise ValueError("each stage must be larger than the one before")
