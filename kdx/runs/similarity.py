"""Similarity of all layers of two networks over a data set: one pass of each network per image, then one sweep over all pairs of images."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.choices import Interpolation, Precision, ResizeMode, Resizing, RuntimeName, SimilarityGeometry, StoredPrecision
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import check_unreadable, decoded
from kdx.errors import KdxError, resumable
from kdx.explain.settings import Settings
from kdx.features import arrays
from kdx.features.rows import feature_distances
from kdx.kernels import ambient, dispatch, layer_sums
from kdx.kernels.layer_sums import LayerSums
from kdx.models.models_file import ModelsFile, read_models
from kdx.progress import progress
from kdx.runs.collected import prediction_columns
from kdx.runs.environment import environment, now
from kdx.runs.feature_files import FeatureFiles, Shapes
from kdx.runs.geometry import Geometry, products_per_second, size_text
from kdx.runs.plan import MAX_MINUTES
from kdx.runs.similarity_networks import ComparedNetworks
from kdx.runs.split import choose_split, with_recorded_data
from kdx.runs.whole import check_finite
from kdx.scores.layer_similarity import PooledSums
from kdx.scores.similarity import of_sums, parts_of, rounding_floor
from kdx.scores.similarity_result import Similarity

FEATURES = "features"
"""The folder of the features, inside that of the results. It is deleted when the sweep is complete."""

_Key = tuple[str, str]
"""A network that runs, and one of its layers."""


@dataclass(frozen=True, kw_only=True)
class SimilarityOptions:
    """How networks are compared over a data set; the command `kdx similarity` describes each option.

    max_layers: the most layers of a network, where none are named. batch: the images of a pass, and with the geometry ``batch`` the images
    of a set of distances. stored_precision, max_disk, max_minutes: for the geometry ``whole``, as in `kdx.runs.plan.RunOptions`.
    """

    layers: Mapping[str, Sequence[str]]
    max_layers: int = 20
    geometry: SimilarityGeometry = "auto"
    batch: int = 64
    runtime: RuntimeName = "auto"
    device: str = "auto"
    precision: Precision = "float32"
    image_size: int | None = None
    resize: ResizeMode | None = None
    interpolation: Interpolation | None = None
    split: str | None = None
    max_images: int | None = None
    max_unreadable: float = 0.01
    workers: int | None = None
    stored_precision: StoredPrecision = "float32"
    max_disk: float | None = None
    max_minutes: float | None = None
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True, eq=False)
class NetworkSimilarity:
    """The similarity of two networks over a data set, and what it was computed from.

    result: the numbers. networks: what is known about A, B and C. left_out: (network, layer, reason) of each layer without geometry.
    about: the data, the split, the geometry and its reason, the size of the images, the options and the environment, for the record.
    """

    result: Similarity
    networks: dict[str, dict[str, Any]]
    left_out: tuple[tuple[str, str, str], ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "networks": self.networks,
            "left_out": [list(one) for one in self.left_out],
            **self.about,
            "similarity": self.result.to_dict(),
        }


@ambient.neutral()
def compare_networks(
    references: Mapping[str, str], data: str, out: Path, options: SimilarityOptions, announce: Callable[[str], None] = print
) -> NetworkSimilarity:
    """Compare the networks ``A`` and ``B``, given an optional network ``C``, over a data set.

    out: the folder for exported networks, and meanwhile for features. A stopped comparison of all images resumes there.

    Raises KdxError for anything that the user can fix.
    """
    arrays.check_batch_size(options.batch)
    dataset, indices, split = _images(references, data, options)
    announce(f"Comparing over {len(indices):,} images of {dataset.reference}" + (f", split {split}." if split != "all" else "."))
    settings = Settings(runtime=options.runtime, device=options.device, precision=options.precision)
    with ComparedNetworks.of(
        references,
        options.layers,
        settings,
        out / "networks",
        most=options.max_layers,
        image_size=options.image_size,
        announce=announce,
    ) as networks:
        networks.open(len(indices), announce)
        work = _Work(networks, dataset, indices, options, announce)
        shapes = work.shapes()
        geometry = _choose(shapes, len(indices), options, out)
        announce(f"Geometry {geometry.kind}: {geometry.reason}.")
        sums, keys = work.whole(shapes, out) if geometry.kind == "whole" else work.batches()
        numbered, left_out = _layers(networks, sums, keys)
        result = of_sums(sums, numbered["A"], numbered["B"], numbered.get("C", {}), options.confidence)
        for name, layer, reason in left_out:
            announce(f"{name}: the layer {layer} is left out: {reason}")
        known = {name: asdict(networks.records[networks.runs_as(name)]) for name in references}
        about = {
            "kdx_format": 1,
            "created": now(),
            "data": data,
            "split": split,
            "image_size": list(networks.size),
            "geometry_reason": geometry.reason,
            "options": asdict(options),
            "runtime": {name: network.runners.choice.why for name, network in networks.opened.items()},
            "environment": environment(),
        }
    return NetworkSimilarity(result, known, left_out, about)


def _images(references: Mapping[str, str], data: str, options: SimilarityOptions) -> tuple[Dataset, NDArray[np.int64], str]:
    """The data set, the images to compare over, and the name of their split."""
    path, _, _ = references["A"].rpartition(":")
    models = with_recorded_data(read_models(path)) if path.endswith(".toml") else ModelsFile(Path(), None, references["A"])
    dataset = open_data(data, models.classes or None)
    resizing = Resizing(options.resize or models.resizing.mode, options.interpolation or models.resizing.interpolation)
    dataset = replace(dataset, resizing=resizing)
    split = choose_split(dataset, models, options.split, options.seed)
    indices = split.indices
    if options.max_images is not None and options.max_images < len(indices):
        indices = np.sort(np.random.default_rng(options.seed).permutation(indices)[: options.max_images])
    arrays.check_images(len(indices))
    return dataset, indices, split.name


def _choose(shapes: Shapes, n: int, options: SimilarityOptions, out: Path) -> Geometry:
    """``whole`` if it was requested and the features fit on the disk; for ``auto``, ``whole`` within the limits and else ``batch``."""
    if options.geometry == "batch":
        return Geometry("batch", "as requested")
    needed = FeatureFiles.bytes(n, shapes, options.stored_precision)
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in out.rglob("*.npy"))
    limit = min(free, options.max_disk * 1e9) if options.max_disk is not None else free if options.geometry == "whole" else free / 2
    text = f"the features of {n:,} images take {size_text(needed)}"
    if options.geometry == "whole":
        if needed > limit:
            raise KdxError(
                f"The features of {n:,} images take {size_text(needed)}, and {size_text(limit)} are available in {place}.",
                "Free some space, choose --store float16 or fewer layers, or use --geometry batch.",
            )
        return Geometry("whole", f"as requested; {text}")
    if needed > limit:
        return Geometry("batch", f"{text}, and the limit is {size_text(limit)} (--max-disk)")
    widths = sum(int(np.prod(shape)) for by_layer in shapes.values() for shape in by_layer.values())
    minutes = n**2 * widths / products_per_second() / 60
    most = MAX_MINUTES if options.max_minutes is None else options.max_minutes
    if minutes > most:
        return Geometry("batch", f"the distances of all pairs would take about {minutes:,.0f} minutes, and the limit is {most:,.0f}")
    return Geometry("whole", f"every image is compared with all others; {text}")


def _layers(
    networks: ComparedNetworks, sums: PooledSums, keys: Sequence[_Key]
) -> tuple[dict[str, dict[str, int]], tuple[tuple[str, str, str], ...]]:
    """The numbers of each network's layers by name, and the layers that are left out. KdxError if none of a network's is left."""
    constant = {keys[number] for number in sums.constant}
    numbered: dict[str, dict[str, int]] = {}
    left_out = []
    for name, one in networks.compared.items():
        runs_as = networks.runs_as(name)
        numbered[name] = {layer: keys.index((runs_as, layer)) for layer in one.layers if (runs_as, layer) not in constant}
        left_out += [
            (name, layer, "it is constant: all images are equally far from each other.")
            for layer in one.layers
            if (runs_as, layer) in constant
        ]
        if not numbered[name]:
            raise KdxError(
                f"{name}: all layers are constant over these images.", "Check the weights and the preprocessing, or give other images."
            )
    return numbered, tuple(left_out)


@dataclass(frozen=True, eq=False)
class _Work:
    """The passes over the images, and the sums of their geometry."""

    networks: ComparedNetworks
    dataset: Dataset
    indices: NDArray[np.int64]
    options: SimilarityOptions
    announce: Callable[[str], None]

    @property
    def keys(self) -> list[_Key]:
        """The layers that run, in the order of the sums."""
        return [(name, layer) for name, network in self.networks.opened.items() for layer in network.layers]

    def shapes(self) -> Shapes:
        """The shape of each network's features at each layer, from a pass over blank images."""
        _, features = self.networks.features(torch.zeros(2, 3, *self.networks.size))
        shapes: dict[str, dict[str, tuple[int, int, int]]] = {}
        for name, by_layer in features.items():
            for layer, values in by_layer.items():
                channels, height, width = values.shape[1:]
                shapes.setdefault(name, {})[layer] = channels, height, width
        return shapes

    def whole(self, shapes: Shapes, out: Path) -> tuple[PooledSums, list[_Key]]:
        """The sums over all pairs of images. Features are in files meanwhile, which a stopped comparison continues."""
        folder = out / FEATURES / self._digest(shapes)
        for other in (out / FEATURES).glob("*"):
            if other != folder:  # of an earlier comparison with other arguments
                shutil.rmtree(other, ignore_errors=True)
        layers = list(dict.fromkeys(layer for _, layer in self.keys))
        files = FeatureFiles(folder, len(self.indices), shapes, self.options.stored_precision, layers)
        with resumable(lambda: bool((files.state != 0).any())):
            self._store(files)
            check_unreadable(files.unreadable, len(self.indices), self.options.max_unreadable)
            arrays.check_images(len(files.kept))
            device = self.networks.device
            matrices = [
                feature_distances(files.role_rows(name, layer, device).rows, f"features of {name} at {layer}") for name, layer in self.keys
            ]
            ops = dispatch.chosen(torch.empty(0, dtype=matrices[0].rows.dtype, device=device))
            with progress() as show:
                sums = layer_sums.of_set(
                    matrices, seed=self.options.seed, ops=ops, progress=lambda done, total: show("Geometry", done, total, "tiles")
                )
        pooled = PooledSums.of([sums], rounding_floor(matrices))
        shutil.rmtree(out / FEATURES, ignore_errors=True)
        return pooled, self.keys

    def _store(self, files: FeatureFiles) -> None:
        """Run the networks on every image whose features are not stored yet."""
        total, pending = len(self.indices), files.pending(self.options.batch)
        done = total - sum(part.stop - part.start for part in pending)
        if done:
            self.announce(f"Resuming: the features of {done} of {total} images are stored.")
        for part, (pixels, readable, unreadable) in zip(pending, self._pixels([self.indices[part] for part in pending], done), strict=True):
            logits, features = self.networks.features(pixels)
            by_layer: dict[str, dict[str, Tensor]] = {}
            for name, layers in features.items():
                for layer, values in layers.items():
                    by_layer.setdefault(layer, {})[name] = values
            check_finite(by_layer, readable, [self.dataset.ids[image] for image in self.indices[part]])
            files.write(part, readable, by_layer, prediction_columns(logits), unreadable)
            check_unreadable(files.unreadable, total, self.options.max_unreadable)

    def _pixels(
        self, parts: Sequence[NDArray[np.int64]], done: int
    ) -> Iterator[tuple[Tensor, NDArray[np.bool_], tuple[tuple[str, str], ...]]]:
        """The pixels of each part of the images, with blank images in place of unreadable ones, and which are readable."""
        total = len(self.indices)
        with decoded(self.dataset, parts, self.networks.size, self.options.workers) as results, progress() as show:
            for part, images in zip(parts, results, strict=True):
                show("Networks", done, total, "images")
                readable = np.isin(part, images.kept)
                pixels = torch.zeros(len(part), *images.pixels.shape[1:])
                pixels[torch.from_numpy(readable)] = images.pixels
                yield pixels, readable, images.unreadable
                done += len(part)
            show("Networks", done, total, "images")

    def batches(self) -> tuple[PooledSums, list[_Key]]:
        """The sums over random batches. No features are stored."""
        order = np.random.default_rng(self.options.seed).permutation(len(self.indices))
        batches = [self.indices[np.sort(part)] for part in arrays.batches_of(order, self.options.batch)]
        blocks: list[LayerSums] = []
        unreadable: list[tuple[str, str]] = []
        scales = []
        for part, (pixels, readable, failed) in zip(batches, self._pixels(batches, 0), strict=True):
            unreadable += failed
            check_unreadable(unreadable, len(self.indices), self.options.max_unreadable)
            if readable.sum() < arrays.MIN_IMAGES:
                continue
            _, features = self.networks.features(pixels)
            names = [self.dataset.ids[image] for image in part]
            check_finite({layer: {name: features[name][layer]} for name, layer in self.keys}, readable, names)
            rows = [features[name][layer][torch.from_numpy(readable)].flatten(1) for name, layer in self.keys]
            ops = dispatch.chosen(rows[0])
            distances = torch.stack([ops.distances(x) for x in rows])
            blocks.append(layer_sums.of_batch(distances, parts_of(len(batches))))
            n = distances.shape[1]
            share = torch.tensor([max(arrays.rounding(x), 1e-8) ** 2 for x in rows], dtype=torch.float64, device=distances.device)
            scales.append(share * distances.square().sum((1, 2)) / (n * (n - 3)))
        return PooledSums.of(blocks, torch.stack(scales).sum(0)), self.keys

    def _digest(self, shapes: Shapes) -> str:
        """A digest of everything that the stored features depend on."""
        options = self.options
        key = {
            "networks": {name: asdict(record) for name, record in self.networks.records.items()},
            "runtimes": [network.runners.choice.runtime for network in self.networks.opened.values()],
            "shapes": {name: list(by_layer.items()) for name, by_layer in shapes.items()},
            "data": self.dataset.fingerprint,
            "resizing": asdict(self.dataset.resizing),
            "images": hashlib.sha256(self.indices.tobytes()).hexdigest(),
            "size": self.networks.size,
            "options": [options.stored_precision, options.precision],
        }
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]
