"""Arrays in files that NumPy maps into memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from kdx.disk import unwritable


def new_array(path: Path, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """A new array of zeros in the .npy file ``path``, for which the disk has reserved the space. Raises KdxError if it cannot.

    A mapped file would otherwise take space when it is written, and a write to a full disk ends the process without a message.
    """
    try:
        array = open_memmap(path, "w+", np.dtype(dtype), shape)
        _reserve(path)
        return array
    except OSError as error:
        raise unwritable(path, error) from error


def _reserve(path: Path) -> None:
    """Reserve the space of a file that has its size, where the system can."""
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot reserve space
                raise
