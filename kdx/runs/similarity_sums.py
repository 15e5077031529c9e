"""The sums of `kdx similarity`: the passes over the images, and the geometry of their features. A stopped comparison resumes from the
stored files.

features/DIGEST/            DIGEST is a hash of everything that the files depend on
features/DIGEST/*.npy       the geometry whole: `kdx.runs.feature_files`
features/DIGEST/NUMBER.npz  the geometry batch: the sums of a batch
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.data.dataset import Dataset
from kdx.data.images import check_unreadable, decoded
from kdx.data.pixels import pixels_of
from kdx.disk import write_atomic
from kdx.errors import resumable
from kdx.features import arrays
from kdx.features.projection import Sketch
from kdx.features.rows import feature_distances
from kdx.kernels import dispatch, layer_sums
from kdx.kernels.layer_sums import LayerSums
from kdx.progress import progress
from kdx.runs.collected import prediction_columns
from kdx.runs.feature_files import PENDING, FeatureFiles, Shapes
from kdx.runs.similarity_networks import ComparedNetworks
from kdx.runs.similarity_options import SimilarityOptions
from kdx.runs.whole import check_finite
from kdx.scores.layer_similarity import PooledSums
from kdx.scores.similarity import parts_of, rounding_floor

FEATURES = "features"
"""The folder of the stored features and sums, inside that of the results. `remove_stored` deletes it."""

Key = tuple[str, str]
"""A network and one of its layers."""


@dataclass(frozen=True, eq=False)
class Passes:
    """The passes of all networks over the images, and the results of their outputs."""

    networks: ComparedNetworks
    dataset: Dataset
    indices: NDArray[np.int64]
    options: SimilarityOptions
    announce: Callable[[str], None]

    @property
    def keys(self) -> list[Key]:
        """The layers that are compared, in the order of the sums."""
        return [(name, layer) for name, network in self.networks.opened.items() for layer in network.layers]

    @cached_property
    def widths(self) -> dict[Key, int]:
        """The number of values of an image at each layer, from a pass over blank images."""
        _, features = self.networks.features(torch.zeros(2, 3, *self.networks.size))
        return {(name, layer): features[name][layer][0].numel() for name, layer in self.keys}

    @cached_property
    def sketches(self) -> dict[Key, Sketch]:
        """The projections of the layers that have more values than ``project``."""
        size, seed = self.options.project, self.options.seed
        return {key: Sketch.of(width, size, seed, *key) for key, width in self.widths.items() if size and width > size}

    @cached_property
    def shapes(self) -> Shapes:
        """The shape of each network's rows in files. Distances need no positions, so the values of an image at a layer are one row."""
        shapes: dict[str, dict[str, tuple[int, int, int]]] = {}
        for (name, layer), width in self.widths.items():
            shapes.setdefault(name, {})[layer] = self.options.project if (name, layer) in self.sketches else width, 1, 1
        return shapes

    def rows(
        self, part: NDArray[np.int64], pixels: Tensor, readable: NDArray[np.bool_], sketches: Mapping[Key, Sketch]
    ) -> tuple[Mapping[str, Tensor], dict[Key, Tensor]]:
        """The logits of each network for a part of the images, and its rows [n, d] at each layer, of which ``sketches`` projects some.

        Raises KdxError for features that are not finite.
        """
        logits, features = self.networks.features(pixels)
        rows = {}
        names = [self.dataset.ids[image] for image in part]
        for name, layer in self.keys:
            values = features[name].pop(layer).flatten(1)
            check_finite({layer: {name: values}}, readable, names)
            sketch = sketches.get((name, layer))
            rows[name, layer] = values if sketch is None else sketch(values)
        return logits, rows

    def pixels(
        self, parts: Sequence[NDArray[np.int64]], done: int
    ) -> Iterator[tuple[Tensor, NDArray[np.bool_], tuple[tuple[str, str], ...]]]:
        """Yields for each part of the images: the pixels (blank for unreadable images), which images are readable, and
        `Images.unreadable`."""
        total = len(self.indices)
        with decoded(self.dataset, parts, self.networks.size, self.options.workers) as results, progress() as show:
            for part, images in zip(parts, results, strict=True):
                show("Networks", done, total, "images")
                yield pixels_of(images.rows), images.readable, images.unreadable
                done += len(part)
            show("Networks", done, total, "images")

    def folder(self, out: Path, geometry: str) -> Path:
        """The folder from which a stopped comparison resumes. The folders of comparisons with other arguments are deleted."""
        folder = out / FEATURES / self._digest(geometry)
        for other in (out / FEATURES).glob("*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        return folder

    def _digest(self, geometry: str) -> str:
        """A digest of everything that the stored features or sums depend on."""
        options = self.options
        key = {
            "networks": {name: asdict(record) for name, record in self.networks.records.items()},
            "runtimes": [network.runners.choice.runtime for network in self.networks.opened.values()],
            "widths": [[*layer, width] for layer, width in self.widths.items()],
            "data": self.dataset.fingerprint,
            "resizing": asdict(self.dataset.resizing),
            "images": hashlib.sha256(self.indices.tobytes()).hexdigest(),
            "size": self.networks.size,
            "precision": options.precision,
            "geometry": ["batch", options.batch, options.seed] if geometry == "batch" else ["whole", options.stored_precision],
            "projection": [options.project, options.seed] if geometry == "whole" and self.sketches else [],
        }
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def remove_stored(out: Path) -> None:
    """Delete the stored features and sums of a comparison whose results are written."""
    shutil.rmtree(out / FEATURES, ignore_errors=True)


def whole_sums(passes: Passes, out: Path) -> tuple[PooledSums, float]:
    """The sums over all pairs of images, with the features in files, and the largest share by which projections lower similarities."""
    layers = list(dict.fromkeys(layer for _, layer in passes.keys))
    files = FeatureFiles(passes.folder(out, "whole"), len(passes.indices), passes.shapes, passes.options.stored_precision, layers)
    with resumable(lambda: bool((files.state != PENDING).any())):
        _store(passes, files)
        check_unreadable(files.unreadable, len(passes.indices), passes.options.max_unreadable)
        arrays.check_images(len(files.kept))
        sums, squares = sums_of_files(files, passes.keys, passes.networks.device, passes.options.seed)
    names = [name for name, _ in passes.keys]
    kept = [
        kept_similarity(float(square), float(norm), passes.sketches.get(key))
        for key, square, norm in zip(passes.keys, squares, sums.kernels[0].diagonal(), strict=True)
    ]
    # In each network, the layer that loses most counts; a network that is compared with itself loses twice.
    least = [min(share for share, other in zip(kept, names, strict=True) if other == name) for name in dict.fromkeys(names)]
    first, second, *_ = sorted(least * 2)
    return sums, 1 - first * second


def kept_similarity(square: float, norm: float, sketch: Sketch | None) -> float:
    """The factor by which a layer's projection changes its similarities, as estimated from the projected features.

    square: the mean squared distance t. norm: the squared norm s = <A,A> of the U-centred squared distances. With the covariance S of the
    features, t = 2 tr S and s = 4 tr S^2. A projection to K numbers adds (tr S)^2/K to tr S^2, and changes no expected inner product of
    two layers, so their similarity is multiplied by sqrt(1 - t^2/(K s)), with t and s after the projection. For features with
    r = (tr S)^2/tr S^2 effective dimensions this is 1/sqrt(1 + r/K). It holds for CKA, and to first order for distances. The estimate
    ignores that values of one block of a sketch are never added to one number: with few blocks the projection changes less than this.
    """
    if sketch is None or norm <= 0:
        return 1.0
    return float(max(0.0, 1 - square**2 / (sketch.size * norm)) ** 0.5)


def sums_of_files(files: FeatureFiles, keys: Sequence[Key], device: torch.device, seed: int) -> tuple[PooledSums, Tensor]:
    """The sums over all pairs of the images whose features are stored, and the mean squared distance [k] at each layer."""
    matrices = [feature_distances(files.role_rows(name, layer, device).rows, f"features of {name} at {layer}") for name, layer in keys]
    ops = dispatch.chosen(torch.empty(0, dtype=matrices[0].rows.dtype, device=device))
    with progress() as show:
        sums = layer_sums.of_set(matrices, seed=seed, ops=ops, progress=lambda done, total: show("Geometry", done, total, "tiles"))
    return PooledSums.of([sums], rounding_floor(matrices)), torch.stack([matrix.scale for matrix in matrices])


def _store(passes: Passes, files: FeatureFiles) -> None:
    """Run the networks on every image whose features are not stored yet."""
    total, pending = len(passes.indices), files.pending(passes.options.batch)
    done = total - sum(part.stop - part.start for part in pending)
    if done:
        passes.announce(f"Resuming: the features of {done} of {total} images are stored.")
    parts = [passes.indices[part] for part in pending]
    for place, part, (pixels, readable, unreadable) in zip(pending, parts, passes.pixels(parts, done), strict=True):
        logits, rows = passes.rows(part, pixels, readable, passes.sketches)
        files.write(place, readable, as_maps(rows), prediction_columns(logits), unreadable)
        check_unreadable(files.unreadable, total, passes.options.max_unreadable)


def as_maps(rows: Mapping[Key, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Rows [n, d] as maps [n, d, 1, 1] by layer and network, as files store them."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for (name, layer), values in rows.items():
        by_layer.setdefault(layer, {})[name] = values[:, :, None, None]
    return by_layer


@dataclass(frozen=True, eq=False)
class _Batch:
    """The sums of a batch; None if it has fewer than four readable images.

    floor [k]: the squared norms up to which the layers' centred matrices are only rounding. unreadable: names and reasons.
    """

    sums: LayerSums | None
    floor: Tensor
    unreadable: tuple[tuple[str, str], ...]


def batch_sums(passes: Passes, out: Path) -> PooledSums:
    """The sums over random batches. The sums of each batch are stored; features are not."""
    options, total = passes.options, len(passes.indices)
    order = np.random.default_rng(options.seed).permutation(total)
    parts = [passes.indices[np.sort(part)] for part in arrays.batches_of(order, options.batch)]
    files = _BatchFiles(passes.folder(out, "batch"), passes.networks.device)
    with resumable(lambda: any(files.folder.glob("*.npz"))):
        batches = {number: batch for number in range(len(parts)) if (batch := files.read(number)) is not None}
        pending = [number for number in range(len(parts)) if number not in batches]
        done = sum(len(parts[number]) for number in batches)
        if done:
            passes.announce(f"Resuming: the sums of {done} of {total} images are stored.")
        unreadable = [failure for batch in batches.values() for failure in batch.unreadable]
        for number, (pixels, readable, failed) in zip(pending, passes.pixels([parts[n] for n in pending], done), strict=True):
            unreadable += failed
            check_unreadable(unreadable, total, options.max_unreadable)
            batches[number] = _measured(passes, parts[number], pixels, readable, failed, parts_of(len(parts)))
            files.write(number, batches[number])
    ordered = [batches[number] for number in range(len(parts))]
    blocks = [batch.sums for batch in ordered if batch.sums is not None]
    arrays.check_images(sum(len(part) for part in parts) - len(unreadable) if blocks else 0)
    return PooledSums.of(blocks, torch.stack([batch.floor for batch in ordered]).sum(0))


def _measured(
    passes: Passes,
    part: NDArray[np.int64],
    pixels: Tensor,
    readable: NDArray[np.bool_],
    unreadable: tuple[tuple[str, str], ...],
    parts: int | None,
) -> _Batch:
    """Run the networks on a batch and sum its geometry, by ``parts`` of its images."""
    n = int(readable.sum())
    if n < arrays.MIN_IMAGES:
        return _Batch(None, torch.zeros(len(passes.keys), dtype=torch.float64, device=passes.networks.device), unreadable)
    _, by_key = passes.rows(part, pixels, readable, {})
    sums, floor = sums_of_batch([by_key[key][torch.from_numpy(readable)] for key in passes.keys], parts)
    return _Batch(sums, floor, unreadable)


def sums_of_batch(rows: Sequence[Tensor], parts: int | None) -> tuple[LayerSums, Tensor]:
    """The sums of the rows [n, d] of k layers, and the squared norms [k] up to which the layers' centred matrices are only rounding."""
    n, ops = len(rows[0]), dispatch.chosen(rows[0])
    distances = torch.stack([ops.distances(x) for x in rows])
    share = torch.tensor([max(arrays.rounding(x), 1e-8) ** 2 for x in rows], dtype=torch.float64, device=distances.device)
    return layer_sums.of_batch(distances, parts), share * distances.square().sum((1, 2)) / (n * (n - 3))


@dataclass(frozen=True)
class _BatchFiles:
    """The sums of each batch, in a file of ``folder`` that is written atomically."""

    folder: Path
    device: torch.device

    def write(self, number: int, batch: _Batch) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {"floor": batch.floor, **({} if batch.sums is None else batch.sums.tensors())}
        columns: dict[str, Any] = {name: values.numpy(force=True) for name, values in tensors.items()}
        content = io.BytesIO()
        np.savez(content, unreadable=np.array(batch.unreadable, dtype=np.str_).reshape(-1, 2), **columns)
        write_atomic(self.folder / f"{number}.npz", content.getvalue())

    def read(self, number: int) -> _Batch | None:
        """A batch, or None if it is not stored."""
        path = self.folder / f"{number}.npz"
        if not path.exists():
            return None
        with np.load(path) as content:
            unreadable = tuple((str(name), str(reason)) for name, reason in content["unreadable"])
            tensors = {name: torch.from_numpy(content[name]).to(self.device) for name in content.files if name != "unreadable"}
        floor = tensors.pop("floor")
        return _Batch(LayerSums.of_tensors(tensors) if tensors else None, floor, unreadable)
