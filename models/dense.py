"""Small dense networks: training in numpy, and the integers of their int8 form.

Small enough that numpy trains them in a second, and written so that two
machines arrive at the same bytes: float64 throughout, a seeded generator, and
weights rounded far above the last bits in which two BLAS libraries differ.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_WEIGHT_DIGITS: Final = 4
_SCALE_DIGITS: Final = 5
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


class Layer(Struct, frozen=True):
    """``relu(x @ weights.T + bias)``, or without the relu; weights are (outputs, inputs)."""

    weights: Floats
    bias: Floats
    relu: bool


class Network(Struct, frozen=True):
    """Layers, the first one first."""

    layers: tuple[Layer, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Width of the input and of each layer."""
        return (self.layers[0].weights.shape[1], *(len(layer.bias) for layer in self.layers))

    def activations(self, x: Floats) -> list[Floats]:
        """Return the input and the output of each layer, one row per row of ``x``."""
        values = [x]
        for layer in self.layers:
            y = values[-1] @ layer.weights.T + layer.bias
            values.append(np.maximum(y, 0.0) if layer.relu else y)
        return values


class Training(Struct, frozen=True):
    """How an autoencoder is trained."""

    hidden: tuple[int, ...]
    """Widths between input and output."""
    epochs: int = 20
    batch: int = 256
    learning_rate: float = 5e-3
    """At the start; it falls to zero along half a cosine."""
    seed: int = 0


def train_autoencoder(x: Floats, training: Training, target: Floats | None = None) -> Network:
    """Return a network that maps each row of ``x`` to itself, or to its row of ``target``.

    Adam (Kingma and Ba, 2015) on the mean squared error; initial weights after He et al., 2015.
    """
    wanted = x if target is None else target
    random = np.random.default_rng(training.seed)
    sizes = (x.shape[1], *training.hidden, wanted.shape[1])
    parameters: list[Floats] = []
    for inputs, outputs in pairwise(sizes):
        parameters += [random.normal(0.0, np.sqrt(2 / inputs), (outputs, inputs)), np.zeros(outputs)]
    first = [np.zeros_like(p) for p in parameters]
    second = [np.zeros_like(p) for p in parameters]
    batches = len(x) // training.batch
    steps, step = training.epochs * batches, 0
    for _ in range(training.epochs):
        order = random.permutation(len(x))
        for batch in range(batches):
            rows = order[batch * training.batch : (batch + 1) * training.batch]
            gradients = _gradients(parameters, x[rows], wanted[rows])
            step += 1
            rate = training.learning_rate * 0.5 * (1 + np.cos(np.pi * step / steps))
            for i, g in enumerate(gradients):
                first[i] = _BETA_1 * first[i] + (1 - _BETA_1) * g
                second[i] = _BETA_2 * second[i] + (1 - _BETA_2) * g * g
                spread = np.sqrt(second[i] / (1 - _BETA_2**step)) + _EPSILON
                parameters[i] -= rate * first[i] / (1 - _BETA_1**step) / spread
    last = len(parameters) // 2 - 1
    return Network(
        tuple(
            Layer(
                np.round(parameters[2 * i], _WEIGHT_DIGITS) + 0.0,
                np.round(parameters[2 * i + 1], _WEIGHT_DIGITS) + 0.0,
                relu=i < last,
            )
            for i in range(last + 1)
        )
    )


def _gradients(parameters: Sequence[Floats], x: Floats, wanted: Floats) -> list[Floats]:
    """Return the gradient of the mean over rows of the summed squared error, in the parameters' order."""
    count = len(parameters) // 2
    values = [x]
    for i in range(count):
        y = values[-1] @ parameters[2 * i].T + parameters[2 * i + 1]
        values.append(np.maximum(y, 0.0) if i < count - 1 else y)
    error = 2 * (values[-1] - wanted) / len(x)
    gradients: list[Floats] = []
    for i in reversed(range(count)):
        gradients[:0] = [error.T @ values[i], error.sum(axis=0)]
        if i:
            error = (error @ parameters[2 * i]) * (values[i] > 0)
    return gradients


class QuantisedLayer(Struct, frozen=True):
    """A layer in integers; the bias' scale is input scale times weight scale."""

    weights: NDArray[np.int8]
    bias: NDArray[np.int32]
    weight_scale: float
    output_scale: float
    output_zero_point: int
    relu: bool


class QuantisedNetwork(Struct, frozen=True):
    """A network in integers: int8 activations (asymmetric) and weights (symmetric), int32 biases."""

    input_scale: float
    input_zero_point: int
    layers: tuple[QuantisedLayer, ...]


def quantise_network(network: Network, calibration: Floats) -> QuantisedNetwork:
    """Return the int8 form; activations cover what ``calibration`` causes, so let it hold anomalies too."""
    ranges = [_range(values) for values in network.activations(calibration)]
    layers = []
    scale = ranges[0][0]
    for layer, (output_scale, zero_point) in zip(network.layers, ranges[1:], strict=True):
        weight_scale = _rounded(max(float(np.abs(layer.weights).max()), 1e-6) / 127)
        layers.append(
            QuantisedLayer(
                np.clip(np.rint(layer.weights / weight_scale), -127, 127).astype(np.int8),
                np.rint(layer.bias / (scale * weight_scale)).astype(np.int32),
                weight_scale,
                output_scale,
                zero_point,
                layer.relu,
            )
        )
        scale = output_scale
    return QuantisedNetwork(ranges[0][0], ranges[0][1], tuple(layers))


def _range(values: Floats) -> tuple[float, int]:
    """Return (scale, zero point) of the int8 range that covers ``values`` and 0."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    # The floor keeps the scales of an always silent layer within what int32 biases and kernels hold.
    scale = _rounded(max(high - low, 1e-2) / 255)
    return scale, int(np.clip(round(-128 - low / scale), -128, 127))


def _rounded(value: float) -> float:
    """Round up to a few significant digits, so that the last bits of a sum cannot reach a file."""
    digits = _SCALE_DIGITS - 1 - int(np.floor(np.log10(value)))
    return float(np.float32(np.ceil(value * 10**digits) / 10**digits))
