"""Which pipeline a lane's source has to feed, found without a running agent."""

from pathlib import Path

from agent.core.layout import Layout
from agent.core.settings import Lane
from agent.store.objects import ObjectStore
from agent.store.slots import read_all
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from contract.package import MAX_MANIFEST, parse_manifest


def lane_pipeline(layout: Layout, lane: Lane, manifest: Path | None) -> Pipeline:
    """Return the pipeline of ``manifest``, else of the version that serves, else what the source's tags say.

    Raises ``config.invalid`` where none of them says anything, and what the manifest is wrong with.
    """
    if manifest is not None:
        return _of(_file(manifest), str(manifest))
    slots = read_all(layout.slots).get(lane.model)
    serving = None if slots is None else slots.serving
    if serving is not None:
        return _of(ObjectStore(layout.objects).read(serving.installed.digest), lane.model)
    channels = _tagged(lane)
    if not channels:
        raise PitheadError(
            "config.invalid",
            f"no version of {lane.model} is here yet to say which channels it wants; give --manifest FILE",
        )
    width = len(channels)
    rate = None if lane.source.get("rate_hz") is not None else 1.0
    return Pipeline(channels, 1, 1, (0.0,) * width, (1.0,) * width, sample_rate_hz=rate)


def _tagged(lane: Lane) -> tuple[Channel, ...]:
    """Return the channels that the source itself names; they have no range."""
    tags = lane.source.get("tags")
    if not isinstance(tags, list):
        return ()
    named = [tag for tag in tags if isinstance(tag, dict)]
    return tuple(Channel(str(tag.get("channel")), str(tag.get("unit") or "")) for tag in named)


def _file(path: Path) -> bytes:
    try:
        with (path / "manifest.json" if path.is_dir() else path).open("rb") as file:
            return file.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise PitheadError("package.file_missing", f"{path}: {error.strerror}") from error


def _of(data: bytes, name: str) -> Pipeline:
    pipeline = parse_manifest(data).pipeline
    if pipeline is None:
        raise PitheadError(
            "config.invalid", f"{name} has no pipeline: its model is only served, without a lane"
        )
    return pipeline
