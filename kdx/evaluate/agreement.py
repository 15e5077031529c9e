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
from kdx.evaluate.ranking import generator_of, rank_correlation
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


def between_batches(maps_of: Callable[[Tensor], Tensor], labels: NDArray[np.integer], batch: int, *, seed: int = 0) -> Agreement:
    """Compare the map of each image in two random divisions of the images into batches of at most ``batch`` (`kdx.data.random_batches`).

    maps_of: maps [m, H, W] of the images with these rows [m], compared with each other. labels [n]: the classes. The two batches of an
    image share batch / n of their other images on average, so the agreement of batches that are nearly as large as the set is near 1.

    Raises ValueError for a batch that contains all images, and KdxError for a batch without geometry, such as one of three images.
    """
    if batch >= len(labels):
        raise ValueError(f"a batch of {batch} contains all {len(labels)} images, so both divisions are the same")
    first, second = (_in_batches(maps_of, random_batches(labels, batch, seed + division)) for division in (0, 1))
    return Agreement.of(torch.arange(len(labels)), first, second)


def between_references(
    maps_of: Callable[[Tensor, Tensor], Tensor], labels: NDArray[np.integer], references: int, *, seed: int = 0
) -> Agreement:
    """Compare the map of each image among two reference sets that share no image.

    maps_of: maps [q, H, W] of the images with the rows [q], compared with the reference images with the rows [m]. labels [n]: the
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
    return Agreement.of(rows, maps_of(rows, one), maps_of(rows, other))


def max_sensitivity(
    maps_of: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """The largest relative change [n] of an image's map under uniform noise of the image.

        max over samples of ||map(x + e) - map(x)|| / ||map(x)||,        e uniform in [-radius, radius] per value,

    with Euclidean norms over positions. Source: Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019; the
    division by the norm of the map makes maps of any scale comparable, as in Quantus. maps_of: maps [n, H, W] of images. images: [n, 3, h,
    w] in [0, 1]; noisy pixels are clipped to this range. All images get noise at once, so a map that compares images changes with all of
    them. numbers: those of the images in their set, which determine the noise.

    0 or more; lower is more stable. NaN for a map that is zero everywhere. More samples give larger values: compare only results with
    the same radius and number of samples. A map that ignores the image has 0, so a low value does not show that the map is right.

    Raises ValueError for pixels outside [0, 1], a radius that is not positive, and fewer than one sample.
    """
    if not (radius > 0 and samples >= 1):
        raise ValueError(f"the radius {radius} must be positive, and there must be at least one sample, not {samples}")
    if float(images.amin()) < 0 or float(images.amax()) > 1:
        raise ValueError("pixels must be in [0, 1]")
    numbers = range(len(images)) if numbers is None else numbers
    maps = maps_of(images).double().flatten(1)
    norm = maps.norm(dim=1)
    largest = torch.zeros_like(norm)
    for sample in range(samples):
        noise = torch.stack([torch.rand(images.shape[1:], generator=generator_of(number, seed, sample)) for number in numbers])
        noisy = (images + radius * (2 * noise - 1).to(images)).clamp(0, 1)
        largest = torch.maximum(largest, (maps_of(noisy).double().flatten(1) - maps).norm(dim=1) / norm)
    return largest.where(norm > 0, torch.nan)


def _in_batches(maps_of: Callable[[Tensor], Tensor], batches: Sequence[Indices]) -> Tensor:
    """The maps of all images in the order of their rows, from maps of each batch."""
    rows = [torch.from_numpy(batch) for batch in batches]
    maps = torch.cat([maps_of(batch) for batch in rows])
    return maps[torch.cat(rows).argsort().to(maps.device)]
