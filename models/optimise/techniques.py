"""What can be done to a model, and how it is written: ``int8``, ``prune=0.7``, ``prune+int8``."""

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from contract.errors import PitheadError
from inference.accelerators import Format

FUSE_LEVELS: Final = ("basic", "extended")
SPARSITY: Final = 0.5
DEFAULT: Final[Mapping[Format, tuple[str, ...]]] = {
    "onnx": ("int8", "fp16", "prune", "fuse"),
    "tflite": ("int8", "fp16", "prune"),
}
"""What is tried where nobody says what; a TFLite converter has fused its operators already."""
_EXPLANATIONS: Final[Mapping[str, str]] = {
    "int8": "8-bit weights and activations, scales from the calibration data",
    "fp16": "weights kept as float16 and widened at load, arithmetic in float32: only the file halves",
    "prune": "the smallest weights become 0: the file compresses better, dense kernels are no faster",
    "fuse": "constants folded and operators merged once, instead of at every load",
}


class Step(Struct, frozen=True):
    """One change of a model."""

    name: str
    value: float | str | None = None
    """Of ``prune`` the share of weights that become 0; of ``fuse`` the level."""


class Technique(Struct, frozen=True):
    """Steps that make one variant, in their order."""

    text: str
    """As it was asked for."""
    steps: tuple[Step, ...]

    @property
    def slug(self) -> str:
        """Name for a variant: ``int8``, ``prune50-int8``, ``fuse``."""
        return "-".join(_slug(step) for step in self.steps)

    @property
    def calibrates(self) -> bool:
        """Whether it needs data to be made."""
        return any(step.name == "int8" for step in self.steps)

    @property
    def explanation(self) -> str:
        """What it does, for people."""
        return "; then ".join(_EXPLANATIONS[step.name] for step in self.steps)


def parse(text: str, model_format: Format) -> tuple[Technique, ...]:
    """Return the techniques of a list with commas; raises ``config.invalid`` naming what is wrong."""
    found = [_technique(part.strip(), model_format) for part in text.split(",") if part.strip()]
    if not found:
        raise PitheadError("config.invalid", f"--techniques names none of {', '.join(DEFAULT[model_format])}")
    return tuple({technique.slug: technique for technique in found}.values())


def _technique(text: str, model_format: Format) -> Technique:
    steps = tuple(_step(part.strip(), model_format) for part in text.split("+"))
    names = [step.name for step in steps]
    # What works on float weights must come before they are gone.
    if len(set(names)) != len(names) or any(name in {"int8", "fp16"} for name in names[:-1]):
        raise PitheadError("config.invalid", f"--techniques {text!r}: int8 or fp16 must be the last step")
    return Technique(text, steps)


def _step(text: str, model_format: Format) -> Step:
    name, equals, value = text.partition("=")
    if name not in DEFAULT[model_format]:
        known = ", ".join(DEFAULT[model_format])
        raise PitheadError("config.invalid", f"--techniques {text!r}: for {model_format} there are {known}")
    if name == "prune":
        return Step(name, _share(text, value) if equals else SPARSITY)
    if name == "fuse":
        level = value if equals else FUSE_LEVELS[0]
        if level not in FUSE_LEVELS:
            raise PitheadError("config.invalid", f"--techniques {text!r}: the level is basic or extended")
        return Step(name, level)
    if equals:
        raise PitheadError("config.invalid", f"--techniques {text!r}: {name} takes no value")
    return Step(name)


def _share(text: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise PitheadError("config.invalid", f"--techniques {text!r}: a share between 0 and 1 is needed")
    return share


def _slug(step: Step) -> str:
    if step.name == "prune":
        return f"prune{float(step.value or SPARSITY) * 100:g}".replace(".", "-")
    return "fuse-extended" if step.value == "extended" else step.name
