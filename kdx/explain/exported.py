"""Files and engines that an Explainer writes and opens."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdx.export import engine
from kdx.export.description import Description, NetworkDescription
from kdx.export.engine import BatchRange
from kdx.models.network import Network
from kdx.runtimes.choice import Choice, open_file
from kdx.runtimes.runner import FileRunner

ENGINE_IMAGES = 64
"""Images through an engine at once, where no chunk says it."""


class ExportFolder:
    """Where an explainer writes files and engines: the user's folder, or a temporary one, which is made when it is asked for."""

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
        if self._temporary is not None:
            self._temporary.cleanup()


def open_exported(
    path: Path, choice: Choice, folder: ExportFolder, name: str, batch: BatchRange, image_size: tuple[int, int] | None
) -> FileRunner:
    """The runner of a file; TensorRT's by way of an engine ``name``, for images of ``image_size`` where the file takes any."""
    if choice.runtime == "tensorrt" and path.suffix != ".engine":
        built = folder.path / f"{name}.engine"
        engine.build(path, built, batch=batch, image_size=image_size)
        path = built
    return open_file(path, choice)


def about_network(
    network: Network | NetworkDescription, weights: str, trained: bool, image_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What is known of a network; image_size: the one that it takes where it does not resize."""
    return {
        "reference": network.reference,
        "sha256": weights,
        "parameters": network.parameters,
        "preprocessing": asdict(network.preprocessing),
        "image_size": network.preprocessing.size or image_size,
        "trained": trained,
    }


def about_file(network: NetworkDescription, file: Description) -> dict[str, Any]:
    return about_network(network, network.weights, True, file.image_size)
