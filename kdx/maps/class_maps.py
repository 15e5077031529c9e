"""Grad-CAM and HiResCAM."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Generic

import torch
from torch import Tensor

from kdx.choices import Weighting
from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import ArrayT
from kdx.maps.gradients import ClassChoice, Differentiable, chosen_classes, class_gradients, gradient_runner
from kdx.maps.scaling import scaled


@dataclass(frozen=True)
class ClassMaps(Generic[ArrayT]):
    """Grad-CAM or HiResCAM of one layer and one class an image.

    maps: [n, H, W] >= 0, at feature resolution, before scaling; comparable within one image, not between images.
    weights: [n, C], the mean over h, w of the class's gradient. classes: [n], whose logit each map explains.
    logits: [n, classes].
    """

    maps: ArrayT
    weights: ArrayT
    classes: ArrayT
    logits: ArrayT

    def scaled(self, size: tuple[int, int] | None = None) -> ArrayT:
        """The maps min-max scaled to [0, 1] image by image, resized (bilinear) to ``size`` (H, W) where given."""
        return scaled(self.maps, size)


def grad_cam(
    network: Differentiable,
    images: ArrayT,
    layer: str | None = None,
    classes: ClassChoice = None,
    *,
    device: str = "auto",
    chunk: int | None = None,
) -> ClassMaps[ArrayT]:
    """Where a layer's features, weighted by channel, raise a class's logit.

    With F the layer's feature [n, C, H, W] and y_k the logit of image i's class k,

        a_ic = mean over h, w of dy_k/dF_ichw,        map_i = ReLU(sum_c a_ic F_ic).

    Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017.

    network: a model reference, a path of a file exported with ``--kind gradients``, a `kdx.models.Network`, a PyTorch module
    (taken as it is, without preprocessing), or an open runner of a graph of gradients, which stays open. images: [n, 3, h, w]
    in [0, 1], NumPy or PyTorch. layer: by default the file's or runner's only one, or a network's last one that is worth
    explaining. classes: one for all images, or integers [n]; by default what the network predicts, which takes a pass more.
    device: where a network or file runs, as `kdx.Explainer` takes it. chunk: how many images go through at once (by default
    all, or as many as an engine takes); it changes no result. Tensors come back on the device of the pass.

    A map is no share of the logit: its sum means nothing, and two images' maps have no common scale. Since a gradient is
    averaged over positions before it meets the features, a place can light up that the class does not use; `hires_cam`
    does not average. What lowers the logit is cut off by the ReLU.

    Raises KdxError for no images, a layer or class that is not there, a file or runner without the gradients of the logits,
    features or gradients that are not finite, and a layer that has no gradient at any position of any image.

    >>> import numpy as np, kdx
    >>> images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    >>> found = kdx.grad_cam("kdx:resnet,width=4,depth=1,classes=5", images, "layer3", classes=2)
    >>> found.maps.shape, found.weights.shape, found.scaled((32, 32)).shape
    ((3, 8, 8), (3, 16), (3, 32, 32))
    """
    return _like(_class_maps(network, arrays.pixels(images), layer, classes, "gap", device, chunk), images)


def hires_cam(
    network: Differentiable,
    images: ArrayT,
    layer: str | None = None,
    classes: ClassChoice = None,
    *,
    device: str = "auto",
    chunk: int | None = None,
) -> ClassMaps[ArrayT]:
    """Where a layer's features raise a class's logit, each position by its own gradient.

    With F the layer's feature [n, C, H, W] and y_k the logit of image i's class k,

        map_ihw = ReLU(sum_c dy_k/dF_ichw F_ichw).

    Source: Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks",
    arXiv 2011.08891 (2020). They define the sum without the ReLU: where one linear layer follows F, it then adds up to the logit
    less its bias. Here the ReLU is taken as in Grad-CAM, so a map shows what raises the logit and not what lowers it.

    Arguments, results and errors are those of `grad_cam`, ``weights`` too, though the map is not made of them. Where a mean
    over positions and one linear layer follow F, both maps are equal. Behind further layers a map is a first-order
    statement: it does not say what the logit would be without a place. Where F is read through a normalisation alone, as the
    blocks of a transformer are, its scale has no influence, so the sum is zero but for rounding, and so is the map: name the
    normalisation that follows (``blocks.11.norm1``), or take `grad_cam`.

    >>> import numpy as np, kdx
    >>> images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    >>> found = kdx.hires_cam("kdx:resnet,width=4,depth=1,classes=5", images, "layer2")
    >>> found.maps.shape, bool((found.classes == found.logits.argmax(1)).all())
    ((3, 16, 16), True)
    """
    return _like(_class_maps(network, arrays.pixels(images), layer, classes, "elementwise", device, chunk), images)


def _class_maps(
    network: Differentiable, images: Tensor, layer: str | None, classes: ClassChoice, weighting: Weighting, device: str, chunk: int | None
) -> ClassMaps[Tensor]:
    weights, maps, logits = [], [], []
    influences = False
    with torch.no_grad(), gradient_runner(network, layer, images, device) as (runner, name):
        chosen, count = chosen_classes(runner, images, classes, chunk)
        for part_logits, gradients in class_gradients(runner, [name], images, chosen, count, chunk):
            part_weights, part_maps = gradients[name].maps(weighting)
            weights.append(part_weights)
            maps.append(part_maps)
            logits.append(part_logits)
            influences |= bool(gradients[name].gradient.any())
    if not influences:
        raise KdxError(
            f"No position of layer {name!r} has any influence on these classes.",
            "Choose an earlier layer: after the last block of a transformer, the head may read only the class token.",
        )
    return ClassMaps(torch.cat(maps), torch.cat(weights), chosen, torch.cat(logits))


def _like(maps: ClassMaps[Tensor], images: ArrayT) -> ClassMaps[ArrayT]:
    """Maps of the kind that the images have: NumPy or PyTorch."""
    return ClassMaps(*(arrays.like(getattr(maps, field.name), images) for field in fields(maps)))
