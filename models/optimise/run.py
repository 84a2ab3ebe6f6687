"""From what was typed to the result: which original, which data, which limits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from contract.errors import PitheadError
from contract.manifest import Score
from contract.package import parse_manifest
from models import package
from models.optimise import data, judge, techniques
from models.optimise.produce import Result, Settings, optimise
from models.optimise.source import Source, of_file, of_package

MOST_CALIBRATION: Final = 512
MOST_EVALUATION: Final = 4096
"""Windows; of more, evenly spaced ones are taken."""


@dataclass(frozen=True)
class Order:
    """The options of the command, by their names."""

    model: Path
    data: Path
    out: Path
    label: str | None = None
    columns: str | None = None
    techniques: str | None = None
    tolerance: tuple[str, ...] = ()
    calibrate: float = 0.5
    variant: str | None = None
    score: str | None = None
    threshold: float | None = None
    name: str | None = None
    version: str | None = None
    licence: str | None = None
    source: str = "not stated"
    release_counter: int | None = None
    rounds: int = 3
    require_sandbox: bool = False


def run(order: Order, progress: Callable[[str], None] = lambda _: None) -> Result:
    """Return the result; raises ``config.invalid``, ``source.failed``, and what the original itself meets."""
    source = _source(order)
    parse_manifest(msgspec.json.encode(source.manifest))  # a wrong version or name is told before the work
    package.vacant(order.out / source.manifest.name / source.manifest.version)
    text = order.techniques or ",".join(techniques.DEFAULT[source.model.format])
    wanted = techniques.parse(text, source.model.format)
    allowed = judge.tolerances(order.tolerance, source.manifest.provenance.parameters)
    names = None if order.columns is None else [name.strip() for name in order.columns.split(",")]
    found = data.load(order.data, source.variant.inputs, source.pipeline, columns=names, label=order.label)
    division = data.divide(found, order.calibrate, MOST_CALIBRATION, MOST_EVALUATION)
    settings = Settings(allowed, _score(order), order.rounds, order.require_sandbox)
    return optimise(source, wanted, division, settings, order.out, progress)


def _source(order: Order) -> Source:
    if order.model.is_dir():
        for option, value in (("--name", order.name), ("--licence", order.licence), ("--score", order.score)):
            if value is not None:
                raise PitheadError("config.invalid", f"{option} is the manifest's for a package")
        return of_package(
            order.model, wanted=order.variant, version=order.version, release_counter=order.release_counter
        )
    if order.name is None or order.version is None or order.licence is None:
        raise PitheadError("config.invalid", "a file needs --name, --version and --licence for its package")
    return of_file(
        order.model,
        name=order.name,
        version=order.version,
        release_counter=order.release_counter or 1,
        licence=order.licence,
        source=order.source,
        require_sandbox=order.require_sandbox,
    )


def _score(order: Order) -> Score | None:
    """Return what a file is judged by; a package's own where there is none."""
    if order.score is None and order.threshold is None:
        return None
    threshold = order.threshold
    match order.score:
        case "reconstruction_mse" | "output" as method if threshold is not None:
            return Score(method=method, threshold=threshold)
        case _:
            raise PitheadError(
                "config.invalid",
                "--score is reconstruction_mse or output, and needs --threshold (and the reverse)",
            )
