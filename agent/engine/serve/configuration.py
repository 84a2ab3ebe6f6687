"""``serve.toml`` in a model directory: what is to be said of its models, all of it optional.

Tables: ``[models.<name>...]`` for a model, ``[pipelines.<name>]`` for a graph of models.
"""

from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from agent.engine.serve.bandit import Bandit
from agent.engine.serve.pipeline_plan import Spec
from agent.engine.serve.shadow_settings import Shadow
from agent.engine.serve.split import Split
from contract.errors import PitheadError

NAME: Final = "serve.toml"


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """``[models.<name>]``."""

    split: Split | None = None
    shadow: Shadow | None = None
    bandit: Bandit | None = None


class Configuration(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    models: dict[str, Model] = {}
    pipelines: dict[str, Spec] = {}


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
        if name in said.pipelines:
            raise PitheadError("config.invalid", f"{where}: {name!r} is a model and a pipeline")
    return said
