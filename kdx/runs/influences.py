"""The contributions of the parts of a run's images to its scores: the file influences.npz of a run with the geometry ``whole``.

parts          [rows], the part of each image of samples.parquet
names/LAYER    [s], the scores
first/LAYER    [s, u], and second/LAYER [s, u, u]: the contributions of the parts and of every two parts (`kdx.kernels.moments`)

From the files of two runs follows an interval for the difference of their scores, if the parts have the same images.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdx.disk import write_atomic
from kdx.kernels.moments import Influences, part_sizes
from kdx.runs import schema


@dataclass(frozen=True, eq=False)
class RunInfluences:
    """parts [N]: the part of each image, in the order of samples.parquet. layers: by layer and score, first [1, u] and second [1, u, u]."""

    parts: NDArray[np.uint8]
    layers: Mapping[str, Mapping[str, Influences]]

    def write(self, folder: Path) -> None:
        """Write the file, in float32."""
        arrays: dict[str, NDArray[np.generic]] = {"parts": self.parts}
        for layer, scores in self.layers.items():
            arrays[f"names/{layer}"] = np.array([*scores], dtype=np.str_)
            arrays[f"first/{layer}"] = _stacked([known.first for known in scores.values()])
            seconds = [known.second for known in scores.values() if known.second is not None]
            if len(seconds) == len(scores):
                arrays[f"second/{layer}"] = _stacked(seconds)
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        write_atomic(folder / schema.INFLUENCES, content.getvalue())


def _stacked(values: list[torch.Tensor]) -> NDArray[np.float32]:
    return torch.cat(values).to(torch.float32).numpy(force=True)


def parts_of(order: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The part of each image, from its place in the random order in which the parts are consecutive."""
    return np.repeat(np.arange(len(sizes := part_sizes(len(order)))), sizes).astype(np.uint8)[order]


def read_influences(folder: Path) -> RunInfluences | None:
    """The influences of a run; None if it has none, as with other geometries and in older runs, or if the file is damaged."""
    try:
        with np.load(io.BytesIO((folder / schema.INFLUENCES).read_bytes()), allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        names = {name.removeprefix("names/"): values.tolist() for name, values in arrays.items() if name.startswith("names/")}
        return RunInfluences(arrays["parts"], {layer: _scores(arrays, layer, scores) for layer, scores in names.items()})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _scores(arrays: Mapping[str, NDArray[np.float32]], layer: str, names: list[str]) -> dict[str, Influences]:
    first = torch.from_numpy(arrays[f"first/{layer}"]).double()[:, None]
    second = torch.from_numpy(arrays[f"second/{layer}"]).double()[:, None] if f"second/{layer}" in arrays else [None] * len(names)
    return {name: Influences(one, two) for name, one, two in zip(names, first, second, strict=True)}
