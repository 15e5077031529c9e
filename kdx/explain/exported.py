"""Exported files and engines that an Explainer writes and opens."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kdx.export import engine
from kdx.export.engine import BatchRange
from kdx.runtimes.choice import Choice, open_file
from kdx.runtimes.runner import FileRunner

ENGINE_IMAGES = 64
"""Images per pass of an engine, unless a chunk is set."""


class ExportFolder:
    """The folder of exported files and engines: the user's, or a temporary one that is made when its path is first needed."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def path(self) -> Path:
        if self._path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="kdx-", ignore_cleanup_errors=True)
            self._path = Path(self._temporary.name)
        return self._path

    def close(self) -> None:
        """Delete the folder if it is temporary."""
        if self._temporary is not None:
            self._temporary.cleanup()


def open_exported(
    path: Path, choice: Choice, folder: ExportFolder, name: str, batch: BatchRange, image_size: tuple[int, int] | None
) -> FileRunner:
    """The runner of an exported file. For TensorRT it first builds the engine ``name`` for ``batch`` images of ``image_size``.

    image_size: None for a file that takes one size, which the engine then takes as well.
    """
    if choice.runtime == "tensorrt" and path.suffix != ".engine":
        built = folder.path / f"{name}.engine"
        engine.build(path, built, batch=batch, image_size=image_size)
        path = built
    return open_file(path, choice)
