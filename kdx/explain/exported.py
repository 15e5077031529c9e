"""Exported files and engines that an Explainer writes and opens."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from kdx.explain import export_cache
from kdx.export import engine, onnx_file
from kdx.export.description import Origin, is_export_of
from kdx.export.engine import BatchRange
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.models.network import Network
from kdx.runtimes.choice import Choice, open_file
from kdx.runtimes.runner import FileRunner

ENGINE_IMAGES = 64
"""Images per pass of an engine, unless a batch or a chunk is known."""


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

    @property
    def exists(self) -> bool:
        """Whether the folder was made; a temporary one is made when its path is first needed."""
        return self._path is not None and self._path.exists()

    def close(self) -> None:
        """Delete the folder if it is temporary."""
        if self._temporary is not None:
            self._temporary.cleanup()


@dataclass(frozen=True, eq=False)
class Export:
    """The exported file of one network's graph in an Explainer's folder, which may come from the cache.

    reusable: whether an existing file may be used, which a bare module's may not.
    """

    network: Network
    graph: FeatureGraph | GradientGraph
    role: str
    folder: ExportFolder
    image_size: tuple[int, int]
    reusable: bool

    @cached_property
    def weights(self) -> str:
        return self.network.weights_hash

    @property
    def path(self) -> Path:
        suffix = ".onnx" if self.graph.kind == "features" else f".{self.graph.kind}.onnx"
        return self.folder.path / f"{self.role}-{self.weights[:12]}{suffix}"

    @cached_property
    def cached(self) -> Path | None:
        """The path of the file in the cache, or None if it must not come from there."""
        return export_cache.cached_path(self.network, self.graph, self._size) if self.reusable else None

    @property
    def _size(self) -> tuple[int, int]:
        return self.network.preprocessing.size or self.image_size

    def is_available(self) -> bool:
        """Whether the file is in the folder or in the cache."""
        if not self.reusable:
            return False
        in_cache = self.cached is not None and self.cached.is_file()
        return in_cache or (self.folder.exists and is_export_of(self.path, self.graph, self.weights))

    def is_there(self) -> bool:
        """Whether the file is in the folder, after it was copied from the cache if possible."""
        if not self.reusable:
            return False
        if is_export_of(self.path, self.graph, self.weights):
            return True
        return self.cached is not None and export_cache.take(self.cached, self.path) and is_export_of(self.path, self.graph, self.weights)

    def write(self) -> None:
        """Export the graph to the file, and keep a copy in the cache."""
        onnx_file.write(self.graph, self.path, origin=Origin(self.network.reference, self.weights), image_size=self._size)
        if self.cached is not None:
            export_cache.keep(self.path, self.cached)


def open_exported(
    path: Path, choice: Choice, folder: ExportFolder, name: str, batch: BatchRange, image_size: tuple[int, int] | None
) -> FileRunner:
    """The runner of an exported file. For TensorRT it first builds the engine ``name`` for ``batch`` images of ``image_size``.

    image_size: None for a file that takes one size, which the engine then takes as well.
    """
    if choice.runtime == "tensorrt" and path.suffix != ".engine":
        built = folder.path / f"{name}.engine"
        with torch.cuda.device(choice.device):  # an engine is built for one kind of GPU, and a machine may have several kinds
            engine.build(path, built, batch=batch, image_size=image_size, tf32=choice.precision == "tf32")
        path = built
    return open_file(path, choice)
