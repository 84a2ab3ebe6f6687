"""From a trained network to the variants of a package: files, golden vectors, tolerances, tensors."""

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np
from msgspec import Struct

from contract.manifest import Golden, Score, Variant
from inference.arithmetic import Floats, dequantise, quantise, scores
from inference.registry import RUNTIMES, open_session
from inference.session import Session
from models import golden, onnx_builder, tflite_builder
from models.dense import Network, QuantisedNetwork
from models.package import reference_to

GOLDEN_VECTORS: Final = 8
SPREAD_ROWS: Final = 500
"""Rows on which kernels are compared for the tolerances."""


class Plan(Struct, frozen=True):
    """One variant to make: where it may run, best first, and how much it is preferred."""

    name: str
    format: Literal["onnx", "tflite"]
    quantisation: Literal["int8", "float32"]
    accelerators: tuple[str, ...]
    preference: int

    @property
    def file(self) -> str:
        """Path of the model in the package."""
        return f"{self.quantisation}.{self.format}"


PLANS: Final = (
    Plan("int8-tflite", "tflite", "int8", ("xnnpack", "cpu"), 30),
    Plan("int8-onnx", "onnx", "int8", ("cpu",), 20),
    Plan("float32-tflite", "tflite", "float32", ("xnnpack", "cpu"), 10),
)


class Assembled(Struct, frozen=True):
    """The variants and every file that they name."""

    variants: tuple[Variant, ...]
    contents: dict[str, bytes]

    def session(self, name: str, accelerator: str | None = None) -> Session:
        """Open one of the variants."""
        variant = next(v for v in self.variants if v.name == name)
        content = self.contents[variant.file.path]
        return open_session(content, variant.format, accelerator or variant.accelerators[0])


def assemble(network: Network, integers: QuantisedNetwork, rows: Floats, description: str) -> Assembled:
    """Return the variants of one network.

    ``rows`` are normalised inputs, at least ``GOLDEN_VECTORS``: the first
    ones become golden vectors, the others serve to compare kernels.
    """
    contents: dict[str, bytes] = {}
    variants = []
    for plan in PLANS:
        content = _build(plan, network, integers, description)
        sessions = [open_session(content, plan.format, a) for a in plan.accelerators]
        first = sessions[0]
        feeds = [_feed(first, row) for row in rows[:GOLDEN_VECTORS]]
        others = [_feed(first, row) for row in rows[:SPREAD_ROWS]]
        worst = golden.spread(sessions, others)
        if plan.format == "onnx" and plan.quantisation == "int8":
            # Its output is float, but it moves by whole steps of the last layer.
            worst = {spec.name: integers.layers[-1].output_scale / 2 for spec in first.outputs}
        vectors = golden.record(first, feeds)
        path = f"{plan.name}.golden.npz"
        contents |= {plan.file: content, path: vectors}
        variants.append(
            Variant(
                name=plan.name,
                file=reference_to(plan.file, content),
                format=plan.format,
                quantisation=plan.quantisation,
                inputs=first.inputs,
                outputs=first.outputs,
                golden=Golden(reference_to(path, vectors), len(feeds), golden.tolerances(first, worst)),
                platform=RUNTIMES[plan.format].platform,
                accelerators=plan.accelerators,
                preference=plan.preference,
            )
        )
    return Assembled(tuple(variants), contents)


def score_rows(
    session: Session, score: Score, x: Floats
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the score of each normalised row, in one call."""
    spec, result = session.inputs[0], session.outputs[0]
    output = session.run({spec.name: quantise(x, spec)})[result.name]
    return scores(score, x, dequantise(output, result))


def _build(plan: Plan, network: Network, integers: QuantisedNetwork, description: str) -> bytes:
    if plan.format == "onnx":
        return onnx_builder.build_int8(integers, description)
    if plan.quantisation == "int8":
        return tflite_builder.build_int8(integers, description)
    return tflite_builder.build_float(network, description)


def _feed(session: Session, row: Floats) -> Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    spec = session.inputs[0]
    return {spec.name: quantise(row.reshape(1, -1), spec)}


def spaced(rows: Sequence[int], count: int) -> list[int]:
    """Return ``count`` of ``rows``, evenly spaced."""
    return [rows[i * len(rows) // count] for i in range(count)]
