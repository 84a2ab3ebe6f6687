"""What the engine is told of a version, and what its judge sees of what the engine says."""

import hashlib
from collections.abc import Mapping

import msgspec

from agent.core import health
from agent.core.settings import AgentSettings
from agent.core.slots import Serving
from agent.ports import LaneState, ModelSpec
from agent.store.objects import ObjectStore
from contract.messages import Name


def model_spec(
    model_name: Name, serving: Serving, objects: ObjectStore, settings: AgentSettings
) -> ModelSpec:
    """Return how the engine shall open a version that is in service."""
    installed = serving.installed
    return ModelSpec(
        model_name=model_name,
        version=installed.version,
        digest=installed.digest,
        manifest=str(objects.path(installed.digest)),
        files={path: str(objects.path(sha256)) for path, sha256 in installed.files.items()},
        variant=installed.variant,
        accelerator=installed.accelerator,
        activation=serving.activation,
        custom={name: c for name, c in settings.accelerators.items() if name == installed.accelerator},
        resources=settings.engine,
    )


def binding_of(source: Mapping[str, object], asked: str) -> str:
    """Return what a fit holds for: one source, until another calibration is asked for."""
    text = msgspec.json.encode([source, asked], order="sorted")
    return hashlib.sha256(text).hexdigest()[:16]


def lane_seen(
    name: str, state: LaneState | None, serving: Serving, *, silent: bool = False, source_works: bool = False
) -> health.LaneSeen:
    """Return a lane as a version's judge sees it; what concerns another session counts as loading."""
    if state is None:
        return health.LaneSeen(name)
    mine = (serving.digest, serving.activation)
    serves = (state.digest, state.activation) == mine
    concerns = serves or (state.wanted_digest, state.wanted_activation) == mine
    if not concerns:
        return health.LaneSeen(name, "loading")
    failed = state.state == "failed" or not serves
    return health.LaneSeen(
        lane=name,
        state="silent" if silent and state.state != "failed" else state.state,
        serves=serves,
        code=state.code if failed else None,
        detail=state.detail if failed or state.code is None else f"{state.code}: {state.detail}"[:1500],
        windows=state.windows,
        errors=state.errors,
        source_works=source_works,
    )
