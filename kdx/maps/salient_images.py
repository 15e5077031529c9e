"""Salient images: the pixels of an image that matter most to a network are kept, and the others are imputed from them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.choices import SalientClass, SalientImage, SalientScore
from kdx.data.inputs import Batches, Pictures
from kdx.errors import KdxError
from kdx.export.graphs import Preprocessing
from kdx.features import arrays
from kdx.features.arrays import Array, ArrayT
from kdx.kernels import ambient, geometry, imputation
from kdx.maps.gradients import (
    ClassChoice,
    Differentiable,
    LogitTarget,
    checked_classes,
    class_gradients,
    class_probability,
    derivatives,
    explained_classes,
    gradient_runner,
)
from kdx.maps.published_images import published_images
from kdx.maps.scaling import scaled
from kdx.runtimes.runner import Runner

_CANCELLED = 3e-3
"""If terms add up to less than this share of the sum of their absolute values, at every position of every image, they cancel. What
remains comes from the epsilon of a normalisation, or from rounding, which in bfloat16 can reach 1e-3. Maps that do rank pixels have at
least 1e-2."""


@dataclass(frozen=True)
class Salience:
    """How a salient image is made.

    keep: the share of its pixels that are kept, in (0, 1). noise: the standard deviation of the normal noise that is added to the
    imputed pixels, in units of pixels in [0, 1]. of_class, score: what ranks the pixels. image: ``exact``, or ``published`` for
    `published_images`, whose noise is in units of normalised pixels. Raises KdxError for values out of range.
    """

    keep: float = 0.5
    noise: float = 0.0
    of_class: SalientClass = "predicted"
    score: SalientScore = "logit"
    image: SalientImage = "exact"

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:  # in this form NaN fails too
            raise KdxError(f"The share {self.keep} of pixels to keep is not between 0 and 1.", "Give a share such as 0.5.")
        if not 0 <= self.noise < math.inf:
            raise KdxError(f"The noise {self.noise} is not a standard deviation.", "Give 0, or a small number such as 0.01.")

    def cotangents(self, logits: Tensor, classes: Tensor | None) -> Tensor:
        """The derivatives [n, classes] of the score that ranks pixels by the logits. classes [n]: the true classes, if they are known."""
        if self.of_class == "true" and classes is None:
            raise KdxError(
                "Salient features of the true class need the class of every image, and the target is an embedding.",
                "Give integer labels, or classes=, or the predicted class (--salient-class predicted).",
            )
        known = logits.argmax(1) if self.of_class == "predicted" or classes is None else classes
        chosen = checked_classes(known, *logits.shape).to(logits.device)
        if self.score == "probability":
            return derivatives(class_probability(chosen), logits)
        return torch.nn.functional.one_hot(chosen, logits.shape[1])

    def images(self, images: Tensor, maps: Tensor, seed: int = 0, preprocessing: Preprocessing = Preprocessing()) -> Tensor:
        """Images [n, 3, h, w]: the pixels that the maps [n, H, W], resized to the images, rank highest are kept, and the rest imputed.

        preprocessing: of the network that will read them.
        """
        if self.image == "published":
            return published_images(images, maps, preprocessing, self.keep, self.noise, seed)
        kept = top_mask(scaled(maps, (images.shape[2], images.shape[3])), self.keep)
        return imputation.impute(images, kept.to(images.device), noise=self.noise, seed=seed)


@overload
def salient_images(
    network: Differentiable,
    images: ArrayT,
    layer: str | None = None,
    keep: float = 0.5,
    classes: ClassChoice = None,
    noise: float = 0.0,
    seed: int = 0,
    *,
    target: LogitTarget | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> ArrayT: ...
@overload
def salient_images(
    network: Differentiable,
    images: Pictures | Batches,
    layer: str | None = None,
    keep: float = 0.5,
    classes: ClassChoice = None,
    noise: float = 0.0,
    seed: int = 0,
    *,
    target: LogitTarget | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> NDArray[Any]: ...
@ambient.neutral()
def salient_images(
    network: Differentiable,
    images: Any,
    layer: str | None = None,
    keep: float = 0.5,
    classes: ClassChoice = None,
    noise: float = 0.0,
    seed: int = 0,
    *,
    target: LogitTarget | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> Any:
    """Images in which the pixels that matter most to the network are kept, and the others are imputed from them.

    Equal to ``impute(images, top_mask(hires_cam(network, images, layer, classes).scaled((h, w)), keep), noise=noise, seed=seed)``: of
    each image, the share ``keep`` of the pixels that its HiResCAM map, resized to the image, ranks highest is kept. A network's features
    of its salient images are its salient features. The paper computes FSS and RS of salient features, with half of the pixels kept
    (arXiv 2412.13943); docs/published.md lists how its code differs from kdx's defaults.

    network, images, layer, classes, target, device, chunk: as in `hires_cam`. Give ``classes=labels`` for the true classes. keep: in
    (0, 1). noise, seed: as in `impute`. Returns images [n, 3, h, w] of the same kind and type, on the same device; float32 for uint8, and
    float32 in NumPy for files and Pillow images.

    If the map is positive on fewer pixels than the share, `top_mask` adds pixels in reading order; if a map is zero everywhere, it keeps
    the first rows of the image, and a warning names the image (`kdx.hires_cam` returns the maps and, as ``empty``, the share of such maps).
    A salient image does not show what the network sees: imputed pixels still have colours, and the border
    of the kept pixels still shows traces of shape.

    Raises KdxError for what `hires_cam` refuses, for a share outside (0, 1), and for a layer at which the maps of all images are zero up
    to rounding, because they rank no pixels; then name the normalisation that reads the layer.

    >>> import numpy as np, kdx
    >>> images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    >>> salient = kdx.salient_images("kdx:resnet,width=4,depth=1,classes=5", images, "layer2", keep=0.25)
    >>> salient.shape, (salient == images).all(1).mean((1, 2)).round(2).tolist()
    ((3, 3, 32, 32), [0.25, 0.25, 0.25])
    """
    salience = Salience(keep, noise)
    with gradient_runner(network, layer, images, device) as (runner, name, batch):
        _, cotangents = explained_classes(runner, batch, classes, target, chunk)
        maps = ranking_maps(runner, [name], batch, cotangents, chunk)[name]
    empty = (maps == 0).flatten(1).all(1)
    if bool(empty.any()):
        rows = arrays.rows_text(empty)
        warnings.warn(f"HiResCAM is zero everywhere {rows}, so the first rows of these images are kept.", stacklevel=3)
    return arrays.like(salience.images(batch, maps, seed).to(batch.device), images)


@ambient.neutral()
def impute(images: ArrayT, kept: Array, *, noise: float = 0.0, seed: int = 0) -> ArrayT:
    """Images in which every pixel that is not kept becomes the weighted mean of its neighbours.

    The four neighbours beside a pixel have the weight 1/6 each, the four diagonal ones 1/12. At the border of the image, the weights of
    the existing neighbours are scaled to the sum 1. All imputed pixels of an image are the solution of one linear system. Source: the
    noisy linear imputation of Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022.

    images: [n, c, h, w], floating-point, NumPy or PyTorch. kept: boolean [n, h, w], or one mask [h, w] for all images, as `top_mask`
    returns it. noise: the standard deviation of the normal noise that is added to imputed pixels, from a generator with this ``seed``.
    Returns images of the same kind and type; kept pixels do not change.

    Imputation removes what a pixel's neighbours do not predict. It does not remove the shape of the mask, which a network may recognise.

    Raises KdxError for shapes that do not match, for pixels that are not finite, and for an image without a kept pixel.

    >>> import numpy as np, kdx
    >>> ramp = np.tile(np.arange(5.0), (1, 1, 5, 1))
    >>> kept = np.zeros((5, 5), bool)
    >>> kept[:, [0, 4]] = True
    >>> bool(np.abs(kdx.impute(ramp, kept) - ramp).max() < 1e-3)
    True
    """
    pixels = arrays.tensor(images, "images")
    return arrays.like(imputation.impute(pixels, arrays.tensor(kept, "mask").to(pixels.device), noise=noise, seed=seed), images)


@ambient.neutral()
def top_mask(maps: ArrayT, share: float = 0.5) -> ArrayT:
    """A mask of the largest values of each map: boolean [n, H, W], true at exactly round(share H W) positions of each map.

    maps: [n, H, W], NumPy or PyTorch. share: in [0, 1]. Among equal values, the first in reading order (row by row, from the top left)
    are taken, on every device; so the mask of a constant map selects its first rows. A mask shows which values of a map are largest, not
    that they are large.

    Raises KdxError for a share outside [0, 1], for maps that are not [n, H, W] numbers, and for NaN.

    >>> import numpy as np, kdx
    >>> kdx.top_mask(np.array([[[0.1, 0.9], [0.9, 0.2]]]), share=0.25)
    array([[[False,  True],
            [False, False]]])
    """
    values = arrays.tensor(maps, "maps")
    if values.ndim != 3 or values.dtype == torch.bool:
        raise KdxError(f"The maps have shape {list(values.shape)} and type {values.dtype}.", "Give maps [n, H, W] of numbers.")
    if not 0 <= share <= 1:  # in this form NaN fails too
        raise KdxError(f"The share {share} is not between 0 and 1.", "Give the share of the pixels to keep, such as 0.3.")
    flat = values.flatten(1)
    if bool(flat.isnan().any()):
        raise KdxError(f"The maps contain NaN {arrays.rows_text(flat.isnan().any(1))}.", "Remove those maps: NaN has no order.")
    kept = flat.argsort(dim=1, descending=True, stable=True)[:, : round(share * flat.shape[1])]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(1, kept, True)
    return arrays.like(mask.reshape(values.shape), maps)


def ranking_maps(runner: Runner, layers: Sequence[str], images: Tensor, cotangents: Tensor, chunk: int | None = None) -> dict[str, Tensor]:
    """HiResCAM [n, H, W] at each layer, from one pass of a graph of gradients over images [n, 3, h, w] with cotangents [n, classes].

    Raises KdxError for a layer at which the maps of all images are zero up to rounding.
    """
    pieces: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    largest_sum = dict.fromkeys(layers, 0.0)
    for _, gradients in class_gradients(runner, layers, images, cotangents, chunk):
        for layer, differentiated in gradients.items():
            feature, gradient, _ = differentiated
            pieces[layer].append(differentiated.maps("elementwise")[1])
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
