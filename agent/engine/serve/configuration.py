"""``serve.toml`` in a model directory: what is to be said of its models, all of it optional.

Tables: ``[models.<name>...]`` for a model, ``[clients.<name>]`` for who asks, ``[pipelines.<name>]`` for a
graph of models.
"""

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from agent.core.serve_models import Client, PipelineSpec, ServedModel
from agent.core.settings import Serve
from agent.engine.serve.bandit import Bandit
from agent.engine.serve.shadow_settings import Shadow
from agent.engine.serve.split import Split
from contract.errors import PitheadError

NAME: Final = "serve.toml"
LEARNED: Final = ".bandits.json"
"""Beside it: what bandits have learned."""


class Model(ServedModel, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """``[models.<name>]``."""

    versions: Annotated[int, Meta(ge=1)] | Literal["all"] | tuple[str | int, ...] | None = None
    """The newest so many, all, or these; None: as for all models."""
    split: Split | None = None
    shadow: Shadow | None = None
    bandit: Bandit | None = None

    @property
    def steers(self) -> bool:
        """Whether anything but the version policy decides who answers."""
        return not (self.split is None and self.shadow is None and self.bandit is None)

    @property
    def hidden(self) -> str:
        """The version that never answers a request which names none; empty where there is no such."""
        return "" if self.shadow is None else self.shadow.version

    @property
    def answers_hidden(self) -> str:
        """The key by which the shadow would answer; empty where there is none."""
        if self.shadow is None:
            return ""
        if self.split is not None and self.hidden in self.split.weights:
            return "split.weights"
        if self.bandit is not None and self.hidden in self.bandit.versions:
            return "bandit.versions"
        only = self.versions if isinstance(self.versions, tuple) else ()
        return "versions" if only and {self.hidden} == set(map(str, only)) else ""

    @property
    def named(self) -> frozenset[str]:
        """Versions that are served because they are named here."""
        split = () if self.split is None else tuple(self.split.weights)
        bandit = () if self.bandit is None else self.bandit.versions
        return frozenset((*split, *bandit, self.hidden)) - {""}


class Configuration(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    models: dict[str, Model] = {}
    clients: dict[str, Client] = {}
    pipelines: dict[str, PipelineSpec] = {}


def read(directory: Path) -> Configuration:
    """Return what ``serve.toml`` in ``directory`` says, the defaults where there is none.

    Raises ``config.invalid``, which names the file and the key.
    """
    path = directory / NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return Configuration()
    except OSError as error:
        raise PitheadError("config.invalid", f"{path}: {error.strerror}") from error
    return parse(content, str(path))


def parse(content: bytes, where: str = NAME) -> Configuration:
    """Return what a file says; raises ``config.invalid``."""
    try:
        said = msgspec.toml.decode(content, type=Configuration)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PitheadError("config.invalid", f"{where}: {error}") from error
    for name, model in said.models.items():
        if model.split is not None and model.bandit is not None:
            raise PitheadError(
                "config.invalid", f"{where}: models.{name}: split and bandit cannot both choose"
            )
        if model.split is not None and not any(model.split.weights.values()):
            raise PitheadError("config.invalid", f"{where}: models.{name}.split.weights: all are 0")
        if why := model.answers_hidden:
            raise PitheadError(
                "config.invalid", f"{where}: models.{name}.{why}: a shadow never answers, so it is no choice"
            )
        if name in said.pipelines:
            raise PitheadError("config.invalid", f"{where}: {name!r} is a model and a pipeline")
    return said


def of_device(said: Serve) -> Configuration:
    """Return what ``[serve]`` of ``agent.toml`` says; versions are the fleet's to choose."""
    models = {name: Model(**msgspec.structs.asdict(model)) for name, model in said.models.items()}
    return Configuration(models, dict(said.clients), dict(said.pipelines))
