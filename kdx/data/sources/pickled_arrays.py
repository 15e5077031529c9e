"""Reads pickled dictionaries of numbers, texts and arrays of bytes without executing anything that the file names.

A pickle is a program: it may import any function and call it. The published Python versions of CIFAR are pickles. Here a pickle can name
only the four functions by which NumPy's arrays are pickled, and none of them is NumPy's: each name stands for a small stand-in that
accepts an array of uint8 and checks its size. Everything else is refused before it is imported.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdx.errors import KdxError, first_line

_UNPACK = "Unpack the published archive again, and use no file of another origin."


class _RefusedError(Exception):
    """A part of a pickle that is not a part of an array of uint8."""


def read_pickled_dictionary(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle, with keys and texts as str and arrays as uint8 arrays of their shape.

    Texts of Python 2, whose type in the file is bytes, are decoded as UTF-8. Raises KdxError for a file that cannot be read, that is not
    such a dictionary, or that names anything but the parts of an array of uint8. Nothing that the file names is imported or called.
    """
    try:
        with path.open("rb") as file:
            content = _RestrictedUnpickler(file, encoding="bytes").load()
    except _RefusedError as error:
        raise KdxError(f"The pickle {path} is refused: {error}.", _UNPACK) from error
    except Exception as error:  # a damaged pickle raises many types
        raise KdxError(f"The pickle {path} cannot be read: {first_line(error)}.", _UNPACK) from error
    if not isinstance(content, dict) or not all(isinstance(key, str | bytes) for key in content):
        raise KdxError(f"The pickle {path} does not contain a dictionary with texts as keys.", _UNPACK)
    return {_text(key): _plain(value) for key, value in content.items()}


class _StandIn:
    """What a name in a pickle stands for: a function that can be called and not changed."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise _RefusedError("it changes a function")


class _Bytes:
    """The type uint8."""

    def __setstate__(self, _: Any) -> None:
        """The byte order and the fields of a type, which uint8 does not have."""


class _PickledArray:
    """An array, which a pickle first makes without values and then gives its state."""

    values: NDArray[np.uint8] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, data_type, is_fortran, content = state
        is_valid = (
            isinstance(data_type, _Bytes)
            and isinstance(content, bytes)
            and isinstance(shape, tuple)
            and all(isinstance(length, int) and length >= 0 for length in shape)
            and math.prod(shape) == len(content)
        )
        if not is_valid:
            raise _RefusedError("the size of an array is not that of its data")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_fortran else "C")


def _new_array(*_: Any) -> _PickledArray:
    return _PickledArray()


def _new_type(name: Any, *_: Any) -> _Bytes:
    if _text(name) not in ("u1", "|u1", "uint8", "B"):
        raise _RefusedError(f"its array has the type {_text(name)}, not uint8")
    return _Bytes()


def _encoded(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or _text(encoding) != "latin1":
        raise _RefusedError("it encodes something other than bytes")
    return text.encode("latin1")


def _refuse_call(*_: Any) -> None:
    raise _RefusedError("it calls numpy.ndarray")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _StandIn(_new_array),  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _StandIn(_new_array),  # NumPy 2
    ("numpy", "dtype"): _StandIn(_new_type),
    ("numpy", "ndarray"): _StandIn(_refuse_call),  # an argument of _reconstruct
    ("_codecs", "encode"): _StandIn(_encoded),  # how Python 3 writes bytes in protocol 2
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name; KdxError for a name that has none."""
        if (module, name) not in _STAND_INS:
            raise _RefusedError(f"it names {module}.{name}, which is not a part of an array")
        return _STAND_INS[module, name]


def _text(value: Any) -> str:
    """The text of Python 2 or 3, or the type of anything else."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value if isinstance(value, str) else type(value).__name__


def _plain(value: Any) -> Any:
    """A value without stand-ins, and with texts as str. A list inside a list stays as it is, because it may contain itself."""
    if isinstance(value, _PickledArray):
        return value.values
    if isinstance(value, list):
        return [_text(item) if isinstance(item, bytes) else item for item in value]
    return _text(value) if isinstance(value, bytes) else value
