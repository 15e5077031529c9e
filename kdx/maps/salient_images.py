"""Salient images: of an image, the pixels that matter most to a network are kept, and the others are imputed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array, ArrayT
from kdx.kernels import geometry, imputation
from kdx.maps.gradients import ClassChoice, Differentiable, chosen_classes, class_gradients, gradient_runner
from kdx.maps.scaling import scaled
from kdx.runtimes.runner import Runner

_CANCELLED = 3e-3
"""Where terms add up to less than this share of their sizes, at every position of every image, they add up to zero: what is left is
the epsilon of a normalisation, or rounding, which in bfloat16 may come to 1e-3. Maps that rank pixels come to 1e-2 and more."""


@dataclass(frozen=True)
class Salience:
    """What a salient image keeps: the share ``keep`` of its pixels, in (0, 1); and the standard deviation of the normal noise, of
    pixels in [0, 1], that is added to the others as they are imputed. KdxError for any other share or deviation."""

    keep: float = 0.5
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:  # so that NaN fails
            raise KdxError(f"The share {self.keep} of pixels to keep is not between 0 and 1.", "Give a part of them, such as 0.5.")
        if not 0 <= self.noise < math.inf:
            raise KdxError(f"The noise {self.noise} is no standard deviation.", "Give 0, or a little, such as 0.01.")

    def images(self, images: Tensor, maps: Tensor, seed: int = 0) -> Tensor:
        """Images [n, 3, h, w] of which the top share of their maps [n, H, W], resized to them, is kept and the rest imputed."""
        kept = top_mask(scaled(maps, (images.shape[2], images.shape[3])), self.keep)
        return imputation.impute(images, kept.to(images.device), noise=self.noise, seed=seed)


def salient_images(
    network: Differentiable,
    images: ArrayT,
    layer: str | None = None,
    keep: float = 0.5,
    classes: ClassChoice = None,
    noise: float = 0.0,
    seed: int = 0,
    *,
    device: str = "auto",
    chunk: int | None = None,
) -> ArrayT:
    """The images [n, 3, h, w] with the pixels that matter most to the network kept, and the others imputed from them.

    ``impute(images, top_mask(hires_cam(network, images, layer, classes).scaled((h, w)), keep), noise=noise, seed=seed)``: the
    share ``keep`` of an image's pixels that its HiResCAM, resized to the image, ranks highest stays. What a network makes of its
    salient images are its salient features, which FSS and RS were published on with half of the pixels kept (arXiv 2412.13943).

    network, images, layer, classes, device, chunk: as `hires_cam` takes them. noise, seed: as `impute` does. The images come
    back in the kind, type and place that they came in.

    Where a map is positive on less than the share, `top_mask` fills the share up with pixels in reading order; of an image
    whose map is zero everywhere it keeps the first rows. A salient image does not show what the network sees: what was imputed
    has colours and, at the edge of what was kept, traces of shape.

    Raises KdxError for what `hires_cam` refuses, for a share outside (0, 1), and for a layer at which the maps of all images
    are zero but for rounding, since they rank nothing: there, name the normalisation that reads the layer.

    >>> import numpy as np, kdx
    >>> images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    >>> salient = kdx.salient_images("kdx:resnet,width=4,depth=1,classes=5", images, "layer2", keep=0.25)
    >>> salient.shape, (salient == images).all(1).mean((1, 2)).round(2).tolist()
    ((3, 3, 32, 32), [0.25, 0.25, 0.25])
    """
    salience, batch = Salience(keep, noise), arrays.pixels(images)
    with torch.no_grad(), gradient_runner(network, layer, batch, device) as (runner, name):
        chosen, count = chosen_classes(runner, batch, classes, chunk)
        maps = ranking_maps(runner, [name], batch, chosen, count, chunk)[name]
    return arrays.like(salience.images(batch, maps, seed).to(batch.device), images)


def impute(images: ArrayT, kept: Array, *, noise: float = 0.0, seed: int = 0) -> ArrayT:
    """Images [n, c, h, w] of which the pixels kept stay as they are, and every other one is the mean of its neighbours.

    Of the eight neighbours the four beside a pixel weigh 1/6 each and the four diagonal ones 1/12, and at the border as much more
    as makes up for those that are missing; all imputed pixels of an image solve one linear system. Source: the noisy linear
    imputation of Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022.

    images: floating-point, NumPy or PyTorch. kept: boolean [n, h, w], or one mask [h, w] for all, such as `top_mask` gives.
    noise: the standard deviation of normal noise on imputed pixels, of a generator that ``seed`` starts. Same kind and type out.

    Imputation removes what neighbours do not tell; it does not remove the shape of the mask, which a network may read.

    Raises KdxError for shapes that do not match, for pixels that are not finite, and for an image of which nothing is kept.

    >>> import numpy as np, kdx
    >>> ramp = np.tile(np.arange(5.0), (1, 1, 5, 1))
    >>> kept = np.zeros((5, 5), bool)
    >>> kept[:, [0, 4]] = True
    >>> bool(np.abs(kdx.impute(ramp, kept) - ramp).max() < 1e-3)
    True
    """
    pixels = arrays.tensor(images, "images")
    return arrays.like(imputation.impute(pixels, arrays.tensor(kept, "mask").to(pixels.device), noise=noise, seed=seed), images)


def top_mask(maps: ArrayT, share: float = 0.5) -> ArrayT:
    """The most salient pixels: boolean [n, H, W], true at exactly round(share H W) pixels of each map [n, H, W].

    share: in [0, 1]. Of equal pixels the first in reading order (row by row, from the top left) is kept, on every device; so a
    constant map, which holds no order, gives its first rows. A mask says which pixels of a map are largest, not that they
    are large.

    Raises KdxError for a share outside [0, 1], for what is not [n, H, W], and for NaN.

    >>> import numpy as np, kdx
    >>> kdx.top_mask(np.array([[[0.1, 0.9], [0.9, 0.2]]]), share=0.25)
    array([[[False,  True],
            [False, False]]])
    """
    values = arrays.tensor(maps, "maps")
    if values.ndim != 3 or values.dtype == torch.bool:
        raise KdxError(f"The maps have shape {list(values.shape)} and type {values.dtype}.", "Give maps [n, H, W] of numbers.")
    if not 0 <= share <= 1:  # so that NaN fails
        raise KdxError(f"The share {share} is not between 0 and 1.", "Give the part of the pixels to keep, such as 0.3.")
    flat = values.flatten(1)
    if bool(flat.isnan().any()):
        raise KdxError(f"The maps contain NaN {arrays.rows_text(flat.isnan().any(1))}.", "Remove those maps: NaN has no order.")
    kept = flat.argsort(dim=1, descending=True, stable=True)[:, : round(share * flat.shape[1])]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(1, kept, True)
    return arrays.like(mask.reshape(values.shape), maps)


def ranking_maps(
    runner: Runner, layers: Sequence[str], images: Tensor, classes: Tensor, count: int, chunk: int | None = None
) -> dict[str, Tensor]:
    """HiResCAM [n, H, W] of each layer, by one pass of a graph of gradients: images [n, 3, h, w], classes [n], of ``count``.

    Raises KdxError for a layer at which the maps of all images are zero but for rounding.
    """
    pieces: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    largest_sum = dict.fromkeys(layers, 0.0)
    for _, gradients in class_gradients(runner, layers, images, classes, count, chunk):
        for layer, (feature, gradient) in gradients.items():
            pieces[layer].append(geometry.elementwise_cam(feature, gradient.flatten(1)))
            sums = geometry.elementwise_cam(feature.abs(), gradient.abs().flatten(1))
            largest_sum[layer] = max(largest_sum[layer], float(sums.max()))
    maps = {layer: torch.cat(parts) for layer, parts in pieces.items()}
    for layer, values in maps.items():
        if float(values.max()) <= _CANCELLED * largest_sum[layer]:
            raise KdxError(
                f"HiResCAM at layer {layer!r} is zero everywhere, so it does not say which pixels are salient.",
                "Name the normalisation that reads that layer, or an earlier layer; or choose raw features.",
            )
    return maps
