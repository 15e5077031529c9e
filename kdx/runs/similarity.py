"""Similarity of all layers of two networks over a data set: one pass of each network per image, then one sweep over all pairs of images."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdx.choices import Resizing
from kdx.data.dataset import Dataset, open_data
from kdx.errors import KdxError
from kdx.explain.settings import Settings
from kdx.features import arrays
from kdx.kernels import ambient
from kdx.models.models_file import ModelsFile, read_models
from kdx.runs.environment import environment, now
from kdx.runs.feature_files import FeatureFiles, Shapes
from kdx.runs.geometry import Geometry, products_per_second, size_text
from kdx.runs.plan import MAX_MINUTES
from kdx.runs.similarity_networks import ComparedNetworks
from kdx.runs.similarity_options import SimilarityOptions
from kdx.runs.similarity_sums import Key, Passes, batch_sums, whole_sums
from kdx.runs.split import choose_split, with_recorded_data
from kdx.scores.layer_similarity import PooledSums
from kdx.scores.similarity import of_sums
from kdx.scores.similarity_result import Similarity

_LOW = 0.02
"""The largest share by which projections may lower similarities without a message."""


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

    out: the folder for exported networks and, during the comparison, for features or sums from which a stopped comparison resumes;
    `kdx.runs.similarity_sums.remove_stored` deletes them when the results are written.

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
        passes = Passes(networks, dataset, indices, options, announce)
        geometry = _choose(passes.shapes, len(indices), options, out)
        announce(f"Geometry {geometry.kind}: {geometry.reason}.")
        projected, lowered = [list(key) for key in passes.sketches], 0.0
        if geometry.kind == "whole":
            if projected:
                announce(_projection_note(len(projected), len(passes.keys), options.project))
            sums, lowered = whole_sums(passes, out)
            if lowered > _LOW:
                announce(f"The projection lowers similarities by up to about {lowered:.0%}. Choose a larger --project, or leave it out.")
        else:
            if projected:
                announce("The geometry batch stores no features, so --project has no effect.")
            projected, sums = [], batch_sums(passes, out)
        numbered, left_out = _layers(networks, sums, passes.keys)
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
            "projected": projected,
            "lowered": lowered,
            "options": asdict(options),
            "runtime": {name: network.runners.choice.why for name, network in networks.opened.items()},
            "environment": environment(),
        }
    return NetworkSimilarity(result, known, left_out, about)


def _images(references: Mapping[str, str], data: str, options: SimilarityOptions) -> tuple[Dataset, NDArray[np.int64], str]:
    """The data set, the images to compare over, and the name of their split."""
    path, _, _ = references["A"].rpartition(":")
    models = with_recorded_data(read_models(path)) if path.endswith(".toml") else ModelsFile(Path(), None, references["A"])
    dataset = open_data(data, models.classes or None, labelled=False)
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
                "Free some space, choose --project 2048, --store float16 or fewer layers, or use --geometry batch.",
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


def _projection_note(projected: int, layers: int, size: int) -> str:
    return (
        f"The features at {projected} of {layers} layers are projected to {size} numbers per image. The expected values of squared "
        f"distances do not change; their relative standard deviation is at most {(2 / size) ** 0.5:.1%}."
    )


def _layers(
    networks: ComparedNetworks, sums: PooledSums, keys: Sequence[Key]
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
