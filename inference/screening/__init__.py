"""Looks at a model file before any runtime does, and refuses what must never reach one."""

from collections.abc import Callable, Mapping
from typing import Final

from inference.screening import onnx, tflite

SCREENS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "onnx": onnx.screen,
    "tflite": tflite.screen,
}
"""By format: raises ``package.unsafe_model``, or ``inference.load_failed`` for what is no such file."""
