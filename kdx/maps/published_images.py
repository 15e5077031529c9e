"""Salient images as in the authors' code of December 2024, to repeat its numbers. kdx's own are better: see docs/published.md."""

from __future__ import annotations

from torch import Tensor

from kdx.export.graphs import Preprocessing
from kdx.kernels import imputation
from kdx.maps.scaling import at_size

_DEVIATION, _MEAN = 0.1, 0.5
"""The deviation and the mean of an image for display."""


def published_images(images: Tensor, maps: Tensor, preprocessing: Preprocessing, keep: float, noise: float, seed: int) -> Tensor:
    """Salient images [n, 3, h, w] for a network with this preprocessing, from images in [0, 1] and maps [n, H, W] that rank their pixels.

    1. The maps at the size of the images, in [0, 1], become 1 - map. Pixels below the percentile 100 ``keep`` of it are kept; equal
       values are all removed, so fewer pixels than the share are kept where the map is zero on more than the rest.
    2. The other pixels of the normalised image (minus mean, over std) are imputed, with noise in its units.
    3. The result is shifted and scaled to mean 0.5 and standard deviation 0.1 over its pixels and channels, clipped to [0, 1], and rounded
       down to 256 levels. The network reads it in this form, without normalisation.

    The images that are returned have the preprocessing undone, so that a network that applies it reads what step 3 gives. An image whose
    map is zero everywhere would keep no pixel, which leaves nothing to impute from; here it keeps all of them.
    """
    removed = 1 - at_size(maps, (images.shape[2], images.shape[3])).to(images.device)
    kept = removed < removed.flatten(1).quantile(keep, dim=1)[:, None, None]
    kept |= ~kept.flatten(1).any(1)[:, None, None]
    mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    imputed = imputation.impute((images - mean) / std, kept, noise=noise, seed=seed)
    flat = imputed.flatten(1)
    centred = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, correction=0, keepdim=True) + 1e-5)
    levels = ((_DEVIATION * centred + _MEAN).clamp(0, 1) * 255).floor() / 255
    return levels.reshape(images.shape) * std + mean
