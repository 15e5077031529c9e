"""The features of all images on disk, in random order, written part by part, so that a killed run continues where it stopped.

Random order makes neighbours a random sample, which the sweeps need, and lets them read whole tiles at once.

features/state.npy                 one byte per image: PENDING, READ or UNREADABLE, written after everything else of that image
features/ROLE-NUMBER.npy           features [N, C, h, w] of a role at a layer; NUMBER is the layer's place
features/prediction-ROLE.npy, features/confidence-ROLE.npy
features/unreadable.json           the name and the reason for each unreadable image
features/scratch/                  the distances and maps of the layer that is computed
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from kdx.choices import StoredPrecision
from kdx.disk import parse_json, write_atomic
from kdx.errors import KdxError
from kdx.explain.whole_set import SetRows
from kdx.features.array_files import new_array
from kdx.features.rows import Selected, resident, rows_of
from kdx.kernels.tiles import Rows
from kdx.roles import possessive
from kdx.runs import schema

PENDING, READ, UNREADABLE = range(3)

Shapes = Mapping[str, Mapping[str, tuple[int, int, int]]]
"""The shape (C, h, w) of each role's features at each layer."""


class FeatureFiles:
    """The files under ``folder`` for n images. Files of an earlier call with the same arguments are continued."""

    def __init__(self, folder: Path, n: int, shapes: Shapes, precision: StoredPrecision, layers: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._shapes, self._layers = shapes, list(layers)
        self._names: dict[str, str] = {}
        exists = (folder / "state.npy").exists()

        def array(name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
            path = folder / f"{name}.npy"
            return open_memmap(path, "r+") if exists else new_array(path, shape, dtype)

        self._features = {
            (role, layer): array(f"{role}-{self._layers.index(layer)}", (n, height, width, channels), precision)
            for role, by_layer in shapes.items()
            for layer, (channels, height, width) in by_layer.items()
        }
        self._predictions = {role: array(f"prediction-{role}", (n,), "int64") for role in shapes}
        self._confidences = {role: array(f"confidence-{role}", (n,), "float32") for role in shapes}
        if not exists:  # the state comes last: where it exists, all other files do
            _ = new_array(folder / "new-state.npy", (n,), "uint8")
            (folder / "new-state.npy").replace(folder / "state.npy")
        self.state = open_memmap(folder / "state.npy", "r+")

    @staticmethod
    def bytes(n: int, shapes: Shapes, precision: StoredPrecision) -> int:
        """The size of the features of n images."""
        elements = sum(int(np.prod(shape)) for by_layer in shapes.values() for shape in by_layer.values())
        return n * elements * np.dtype(precision).itemsize

    def pending(self, unit: int) -> list[slice]:
        """The parts of ``unit`` images that contain an image that is not stored yet."""
        parts = [slice(start, min(start + unit, len(self.state))) for start in range(0, len(self.state), unit)]
        return [part for part in parts if (self.state[part] == PENDING).any()]

    def write(
        self,
        part: slice,
        readable: NDArray[np.bool_],
        features: Mapping[str, Mapping[str, Tensor]],
        columns: Mapping[str, NDArray[Any]],
        unreadable: Sequence[tuple[str, str]],
    ) -> None:
        """Store the images of a part: per layer and role their features [k, C, h, w], and their predictions and confidences.

        readable [k]: the other images have no features, and their rows are ignored.
        """
        for layer, by_role in features.items():
            for role, values in by_role.items():
                self._write_features(role, layer, part, values[torch.from_numpy(readable)], readable)
        for role in self._predictions:
            self._predictions[role][part] = columns[schema.prediction_column(role)]
            self._confidences[role][part] = columns[schema.confidence_column(role)]
        if unreadable:
            content = json.dumps([*self.unreadable, *unreadable], ensure_ascii=False)
            write_atomic(self.folder / "unreadable.json", content.encode("utf-8", "replace"))
        self.state[part] = np.where(readable, READ, UNREADABLE)

    def _write_features(self, role: str, layer: str, part: slice, values: Tensor, readable: NDArray[np.bool_]) -> None:
        array = self._features[role, layer]
        if array.dtype == np.float16 and bool((values.abs() > float(np.finfo(np.float16).max)).any()):
            raise KdxError(f"{possessive(role)} features at {layer} are too large for float16.", "Store them with --store float32.")
        array[part][readable] = values.permute(0, 2, 3, 1).numpy(force=True).astype(array.dtype, copy=False)

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """The name and the reason for each image that could not be read, without repetitions."""
        path = self.folder / "unreadable.json"
        stored = parse_json(path.read_text(encoding="utf-8")) if path.exists() else []
        return sorted({(str(name), str(reason)) for name, reason in stored})

    @property
    def kept(self) -> NDArray[np.int64]:
        """The rows of the images that could be read."""
        return np.flatnonzero(self.state == READ)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The predictions and confidences of the images that could be read."""
        kept = self.kept
        return {schema.prediction_column(role): values[kept] for role, values in self._predictions.items()} | {
            schema.confidence_column(role): values[kept] for role, values in self._confidences.items()
        }

    def rows(self, layer: str, device: torch.device) -> dict[str, SetRows]:
        """Each role's features at a layer, of the images that could be read, on the device when they are read."""
        return {role: self.role_rows(role, layer, device) for role in self._shapes}

    def role_rows(self, role: str, layer: str, device: torch.device) -> SetRows:
        """A role's features at one of its layers, of the images that could be read, on the device when they are read."""
        array = self._features[role, layer]
        source = rows_of(array.reshape(len(array), -1), f"{role}'s features")
        rows: Rows = Selected(source, torch.from_numpy(self.kept), device)
        if device.type == "cuda":
            rows = resident(rows, device, torch.cuda.mem_get_info(device)[0])
        return SetRows(rows, self._shapes[role][layer])

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what the computation of a layer needs meanwhile: the distances, and the maps until they are stored."""
        folder = self.folder / "scratch"
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
