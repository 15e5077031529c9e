"""The target of a run in place of one-hot labels: a table of classes or of images in a file, or rows computed from a network."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.data.class_embeddings import ClassEmbeddings, read_image_rows
from kdx.data.dataset import Dataset
from kdx.data.images import decoded
from kdx.errors import KdxError
from kdx.explain.class_targets import class_table, stated_target
from kdx.export.graphs import FeatureGraph
from kdx.features.target_rows import class_means, soft_labels, spatial_means
from kdx.models.models_file import ModelsFile
from kdx.models.network import Network, load
from kdx.roles import READING_ORDER
from kdx.runs.schema import StoredTarget
from kdx.runtimes.choice import choose, is_file
from kdx.runtimes.eager import EagerRunner

_PASS = 64
"""Images per pass of a target's network. Results depend on it in the last bits, so it is fixed."""

_SYNTAX = (
    "Give a file of class embeddings, labels, prototypes:NETWORK[,layer=LAYER], soft:NETWORK[,temperature=T] or images:FILE, where NETWORK "
    "is teacher, student, base or a model reference."
)


class RunTarget(Protocol):
    """The target of a run. name: as it was given, without folders. identity: what the results depend on."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> StoredTarget: ...

    def rows(self, indices: NDArray[np.int64]) -> Tensor:
        """The rows [n, e] of images, which are rows of the data set."""


@dataclass(frozen=True, eq=False)
class ClassTable:
    """A row per class, from a file."""

    embeddings: ClassEmbeddings
    labels: NDArray[np.int64]

    @property
    def name(self) -> str:
        return self.embeddings.file

    @property
    def identity(self) -> StoredTarget:
        return {"sha256": self.embeddings.sha256, "width": self.embeddings.rows.shape[1]}

    def rows(self, indices: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self.embeddings.of(self.labels[indices]))


@dataclass(frozen=True, eq=False)
class ImageTable:
    """A row per image, from a file with the images' ids. explained: the images that the file must have."""

    path: Path
    ids: Sequence[str]
    explained: NDArray[np.int64]

    @property
    def name(self) -> str:
        return f"images:{self.path.name}"

    @property
    def identity(self) -> StoredTarget:
        rows = self.rows(self.explained).numpy()
        digest = hashlib.sha256(f"{rows.shape}".encode() + rows.astype("<f8").tobytes()).hexdigest()
        return {"kind": "images", "sha256": digest, "width": rows.shape[1]}

    @cached_property
    def _table(self) -> dict[str, NDArray[np.float64]]:
        return read_image_rows(self.path, self.ids)

    def rows(self, indices: NDArray[np.int64]) -> Tensor:
        missing = [self.ids[index] for index in indices if self.ids[index] not in self._table]
        if missing:
            raise KdxError(
                f"{self.path} has no row for {len(missing)} images, the first being {missing[0]}.", "Give a row for every image."
            )
        return torch.from_numpy(np.stack([self._table[self.ids[index]] for index in indices]))


@dataclass(frozen=True, eq=False)
class NetworkTarget:
    """Rows computed from a network in one more pass: class means of its logits or of a layer's features, or softened logits.

    pool: the images of which class means are taken. An image of the pool does not contribute to its own row.
    """

    name: str
    kind: str
    network: Network
    layer: str | None
    temperature: float
    dataset: Dataset
    pool: NDArray[np.int64]
    device: str

    @property
    def identity(self) -> StoredTarget:
        identity: StoredTarget = {"kind": self.kind, "sha256": self.network.weights_hash}
        if self.kind == "soft":
            identity["temperature"] = self.temperature
        elif self.layer is not None:
            identity["layer"] = self.layer
        return identity

    def rows(self, indices: NDArray[np.int64]) -> Tensor:
        if self.kind == "soft":
            return soft_labels(self._outputs(indices)[0], self.temperature)
        rows, kept = self._pool_rows
        places = {int(index): place for place, index in enumerate(kept)}
        labels = torch.from_numpy(self.dataset.labels)
        own = torch.tensor([places.get(int(index), -1) for index in indices])
        return class_means(labels[indices], rows, labels[kept], own)

    @property
    def size(self) -> tuple[int, int]:
        """The height and width of the network's images. Raises KdxError if it does not state them."""
        if self.network.preprocessing.size is None:
            raise KdxError(
                f"The network of the target {self.name} does not state the size of its images.",
                "Write size in the table [preprocessing] of the models file.",
            )
        return self.network.preprocessing.size

    @property
    def graph(self) -> FeatureGraph:
        """The network with its layer. Raises KdxError for a layer that it does not have."""
        return FeatureGraph(self.network.module, [] if self.layer is None else [self.layer], self.network.preprocessing)

    @cached_property
    def _pool_rows(self) -> tuple[Tensor, NDArray[np.int64]]:
        return self._outputs(self.pool)

    def _outputs(self, indices: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """The logits, or the spatial means of the layer's features, of the readable images, and which images these are."""
        parts = [indices[start : start + _PASS] for start in range(0, len(indices), _PASS)]
        rows, kept = [], []
        device = choose("eager", self.device).device
        with EagerRunner(self.graph, device) as runner, decoded(self.dataset, parts, self.size) as batches:
            for images in batches:
                if len(images.kept):
                    outputs = runner.infer(images.pixels)
                    values = outputs.logits if self.layer is None else outputs.features[self.layer]
                    rows.append(spatial_means(values).cpu())
                    kept.append(images.kept)
        if not rows:
            raise KdxError(f"The target {self.name} has no readable image.", "Give images that can be read.")
        return torch.cat(rows), np.concatenate(kept)


def run_target(
    option: str | Path | None, models: ModelsFile, dataset: Dataset, explained: NDArray[np.int64], pool: NDArray[np.int64], device: str
) -> RunTarget | None:
    """The target that an option or the models file states; None for labels.

    option: the value of ``--target``, relative to the current folder; None for the models file's ``targets``, relative to it. Raises
    KdxError for a target of no known form, for files that do not fit, and for networks that do not exist.
    """
    stated, folder = stated_target(option, models)
    if stated is None:
        return None
    kind, _, rest = stated.partition(":")
    if kind == "images" and rest:
        table = ImageTable(folder / Path(rest).expanduser(), dataset.ids, explained)
        table.rows(explained)  # raises KdxError for images without a row before anything is computed
        return table
    if kind != "prototypes" and kind != "soft":
        embeddings = class_table(option, models, dataset.classes)
        return None if embeddings is None else ClassTable(embeddings, dataset.labels)
    name, value = _parts(stated, rest, "layer" if kind == "prototypes" else "temperature")
    layer, temperature = (value, 4.0) if kind == "prototypes" else (None, _temperature(stated, value))
    target = NetworkTarget(stated, kind, _network(stated, name, models, folder), layer, temperature, dataset, pool, device)
    _ = target.size, target.graph  # raise KdxError before anything is computed
    return target


def _parts(stated: str, rest: str, option: str) -> tuple[str, str | None]:
    """The network of ``NETWORK[,option=value][@weights]``, and the value."""
    head, at, weights = rest.partition("@")
    head, comma, value = head.partition(f",{option}=")
    if comma and not value:
        raise KdxError(f"The target {stated!r} states no {option}.", _SYNTAX)
    return f"{head}{at}{weights}", value or None


def _temperature(stated: str, value: str | None) -> float:
    with contextlib.suppress(ValueError):
        temperature = 4.0 if value is None else float(value)
        if 0 < temperature < math.inf:
            return temperature
    raise KdxError(f"The temperature of the target {stated!r} is not a positive number.", _SYNTAX)


def _network(stated: str, name: str, models: ModelsFile, folder: Path) -> Network:
    """The network of a role, or of a model reference."""
    if name in READING_ORDER:
        if name not in models.references or is_file(models.references[name]):
            raise KdxError(f"The target {stated!r} needs the {name} as a PyTorch network.", "Name it in the models file.")
        return models.load(name)
    if ":" in name or name.endswith(".pt2"):
        return load(name, classes=len(models.classes) or None, folder=folder)
    raise KdxError(f"The target {stated!r} names no network.", _SYNTAX)
