"""External TFLite delegates: a shared library with two functions, and options as texts.

The runtime's own loader is not used: where a library is missing or a driver
does not start, it leaves half an object behind, whose end calls the driver
once more with nothing, which not every driver survives.
"""

import ctypes
from typing import Final

from contract.errors import PitheadError
from inference.accelerators import Accelerator
from inference.session import first_line, missing

_Texts = ctypes.POINTER(ctypes.c_char_p)
_Report: Final = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class Delegate:
    """A delegate that its driver has made; it must outlive the interpreters that use it."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Load the library and start its driver; raises ``inference.accelerator_missing``."""
        self._pointer: int | None = None
        words: list[str] = []
        try:
            library = ctypes.CDLL(accelerator.library)
            create, self._destroy = (
                library.tflite_plugin_create_delegate,
                library.tflite_plugin_destroy_delegate,
            )
        except (OSError, AttributeError) as error:
            raise _failed(accelerator, first_line(error)) from error
        create.argtypes = (_Texts, _Texts, ctypes.c_size_t, _Report)
        create.restype = ctypes.c_void_p
        self._destroy.argtypes = (ctypes.c_void_p,)
        self._destroy.restype = None
        count = len(accelerator.options)
        keys = (ctypes.c_char_p * count)(*(key.encode() for key in accelerator.options))
        values = (ctypes.c_char_p * count)(*(value.encode() for value in accelerator.options.values()))
        report = _Report(lambda text: words.append(text.decode("utf-8", errors="replace")))
        self._pointer = create(keys, values, count, report)
        if self._pointer is None:
            raise _failed(accelerator, " ".join(words) or "its driver did not start")

    def _get_native_delegate_pointer(self) -> int | None:
        """Return what the interpreter asks for, by this name."""
        return self._pointer

    def __del__(self) -> None:
        if self._pointer is not None:
            self._destroy(self._pointer)
            self._pointer = None


def _failed(accelerator: Accelerator, why: str) -> PitheadError:
    return missing(accelerator, f"needs {accelerator.library}: {why[:500]}")
