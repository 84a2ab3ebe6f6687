"""What ``serve.toml``, and ``[serve]`` of ``agent.toml``, may say of models, pipelines and who asks."""

from typing import Annotated, Final

from msgspec import Meta, Struct


class Limited(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Requests that are taken."""

    rate: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """A second, on average; None: as many as come."""
    burst: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """At once, after a pause; None: those of one second, at least one."""

    def __post_init__(self) -> None:
        """Refuse a burst of nothing."""
        if self.burst is not None and self.rate is None:
            raise ValueError("burst is given without rate")


class Client(Limited, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """``[clients.<name of a token>]``; ``[clients."*"]`` is for each client without a table."""


class ServedModel(Limited, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """``[models.<name>]``. What is None is as for all models."""

    cache_mb: Annotated[float, Meta(ge=0, le=65536)] = 0
    """For answers that are kept, with their questions, of each version that is served; 0: none are."""
    max_batch: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Rows; 1 does not batch."""
    preferred_batches: tuple[Annotated[int, Meta(ge=1, le=4096)], ...] | None = None
    max_delay_ms: Annotated[float, Meta(ge=0, le=10_000)] | None = None
    """How long a request may be kept for the sake of a larger batch."""
    objective_ms: Annotated[float, Meta(gt=0, le=3_600_000)] | None = None
    """Of a batch; None: what the package promises, else as for all models."""
    max_queue: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Requests that may wait."""
    max_wait_ms: Annotated[float, Meta(ge=0, le=3_600_000)] | None = None
    timeout_s: Annotated[float, Meta(gt=0, le=3600)] | None = None


MAX_STEPS: Final = 32
"""Steps that answer at once call each other: a limit to the stack."""

TensorName = Annotated[str, Meta(min_length=1, max_length=200)]


class Step(Struct, frozen=True, forbid_unknown_fields=True):
    """One model in a pipeline."""

    model: TensorName
    version: str = ""
    """Empty: the one that is served without a version."""
    inputs: dict[TensorName, TensorName] = {}
    """The model's input -> the pipeline's tensor. What is left out takes the tensor of its own name."""
    outputs: dict[TensorName, TensorName] | None = None
    """The model's output -> the pipeline's tensor. None: all, under their own names."""


class PipelineSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A pipeline as it is written down: ``[pipelines.<name>]``."""

    inputs: Annotated[tuple[TensorName, ...], Meta(min_length=1)]
    """Tensors that a request brings."""
    outputs: Annotated[tuple[TensorName, ...], Meta(min_length=1)]
    """Tensors that its answer has, in this order."""
    steps: Annotated[tuple[Step, ...], Meta(min_length=1, max_length=MAX_STEPS)]
    """In any order: each begins when its inputs are there, side by side where they are."""
