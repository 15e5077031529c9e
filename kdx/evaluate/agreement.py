"""Do maps of one image agree in two contexts, and how much does a map change with little noise in the image?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.data.batches import random_batches
from kdx.data.dataset import Indices
from kdx.data.splits import class_balanced_sample
from kdx.evaluate.ranking import NamedMaps, generator_of, rank_correlation
from kdx.explain.map_statistics import stability
from kdx.features import arrays


@dataclass(frozen=True, eq=False)
class Agreement:
    """How well two maps of the same image agree that were computed in two contexts.

    images [q]: the rows of the compared images. rank_correlation [q]: Spearman's correlation over positions. correlation [q]: Pearson's,
    as in a run's ``stability``. Both are in [-1, 1], and NaN where a map is constant.

    Agreement does not show that a map is right: a map that ignores its image, such as one with a bright centre, always agrees.
    """

    images: Tensor
    rank_correlation: Tensor
    correlation: Tensor

    @classmethod
    def of(cls, images: Tensor, maps: Tensor, others: Tensor) -> Agreement:
        """The agreement of two maps [q, H, W] of each of the images."""
        return cls(images, rank_correlation(maps, others), stability(maps, others))


def between_batches(
    maps_of: Callable[[Tensor], NamedMaps], labels: NDArray[np.integer], batch: int, *, seed: int = 0
) -> dict[str, Agreement]:
    """Compare the map of each image in two random divisions of the images into batches of at most ``batch`` (`kdx.data.random_batches`).

    maps_of: maps [m, H, W] by name of the images with these rows [m], compared with each other. labels [n]: the classes. The two batches
    of an image share batch / n of their other images on average, so the agreement of batches that are nearly as large as the set is near 1.

    Raises ValueError for a batch that contains all images, and KdxError for a batch without geometry, such as one of three images.
    """
    if batch >= len(labels):
        raise ValueError(f"a batch of {batch} contains all {len(labels)} images, so both divisions are the same")
    first, second = (_in_batches(maps_of, random_batches(labels, batch, seed + division)) for division in (0, 1))
    return {name: Agreement.of(torch.arange(len(labels)), maps, second[name]) for name, maps in first.items()}


def between_references(
    maps_of: Callable[[Tensor, Tensor], NamedMaps], labels: NDArray[np.integer], references: int, *, seed: int = 0
) -> dict[str, Agreement]:
    """Compare the map of each image among two reference sets that share no image.

    maps_of: maps [q, H, W] by name of the images with the rows [q], compared with the reference images with the rows [m]. labels [n]: the
    classes; each of the two sets is a class-balanced sample of ``references`` images. The compared images are those in neither set.

    Raises ValueError if the two sets leave no image, and KdxError for sets of fewer than four images.
    """
    arrays.check_batch_size(references)
    if 2 * references >= len(labels):
        raise ValueError(f"two sets of {references} reference images leave none of {len(labels)} images to compare")
    first = class_balanced_sample(labels, references, seed)
    rest = np.setdiff1d(np.arange(len(labels)), first)
    second = rest[class_balanced_sample(labels[rest], references, seed + 1)]
    rows, one, other = (torch.from_numpy(part) for part in (np.setdiff1d(rest, second), first, second))
    first_maps, second_maps = maps_of(rows, one), maps_of(rows, other)
    return {name: Agreement.of(rows, maps, second_maps[name]) for name, maps in first_maps.items()}


def max_sensitivity(
    maps_of: Callable[[Tensor], NamedMaps],
    images: Tensor,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """The largest relative change [n] of an image's map under uniform noise of the image, by the name of the map.

        max over samples of ||map(x + e) - map(x)|| / ||map(x)||,        e uniform in [-radius, radius] per value,

    with Euclidean norms over positions. Source: Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019; the
    division by the norm of the map makes maps of any scale comparable, as in Quantus. maps_of: maps [n, H, W] by name, of images. images:
    [n, 3, h, w] in [0, 1]; noisy pixels are clipped to this range. All images get noise at once, so a map that compares images changes
    with all of them. numbers: those of the images in their set, which determine the noise.

    0 or more; lower is more stable. NaN for a map that is zero everywhere. More samples give larger values: compare only results with
    the same radius and number of samples. A map that ignores the image has 0, so a low value does not show that the map is right.

    Raises ValueError for pixels outside [0, 1], a radius that is not positive, and fewer than one sample.
    """
    if not (radius > 0 and samples >= 1):
        raise ValueError(f"the radius {radius} must be positive, and there must be at least one sample, not {samples}")
    if float(images.amin()) < 0 or float(images.amax()) > 1:
        raise ValueError("pixels must be in [0, 1]")
    numbers = range(len(images)) if numbers is None else numbers
    maps = _flat(maps_of(images))
    largest = {name: torch.zeros_like(values[:, 0]) for name, values in maps.items()}
    for sample in range(samples):
        noise = torch.stack([torch.rand(images.shape[1:], generator=generator_of(number, seed, sample)) for number in numbers])
        changed = _flat(maps_of((images + radius * (2 * noise - 1).to(images)).clamp(0, 1)))
        largest = {name: torch.maximum(most, (changed[name] - maps[name]).norm(dim=1)) for name, most in largest.items()}
    norms = {name: values.norm(dim=1) for name, values in maps.items()}
    return {name: (most / norms[name]).where(norms[name] > 0, torch.nan) for name, most in largest.items()}


def _flat(maps: NamedMaps) -> dict[str, Tensor]:
    return {name: values.double().flatten(1) for name, values in maps.items()}


def _in_batches(maps_of: Callable[[Tensor], NamedMaps], batches: Sequence[Indices]) -> dict[str, Tensor]:
    """The maps of all images in the order of their rows, from maps of each batch."""
    rows = [torch.from_numpy(batch) for batch in batches]
    parts = [maps_of(batch) for batch in rows]
    order = torch.cat(rows).argsort()
    return {name: torch.cat([part[name] for part in parts]).cpu()[order] for name in parts[0]}
