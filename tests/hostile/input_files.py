"""What the fuzzer's inputs have in common: folders, files, and an object with code."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = Callable[[], object]
Target = Callable[[Path, random.Random], Call]
"""Writes an input below a path, and returns the function that reads it."""


class Canary:
    """An object whose pickle writes the file ``canary`` into the current folder if it is executed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("canary",)


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def written(path: Path, name: str, content: bytes) -> Path:
    file = fresh(path) / name
    file.write_bytes(content)
    return file
