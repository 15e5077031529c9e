"""UniCAM at a layer before the feature layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdx.choices import ObjectiveName, Weighting
from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array, ArrayT, Labels
from kdx.kernels import ambient
from kdx.maps import unicam
from kdx.maps.gradients import Differentiable, LayerGradient, gradient_runner, layer_gradients
from kdx.maps.unicam import Maps, ReferenceSet
from kdx.runtimes.runner import parts


@ambient.neutral()
def unicam_before(
    network: Differentiable,
    images: ArrayT,
    layer: str,
    explained: Array,
    given: Array | None,
    target: Labels,
    objective: ObjectiveName | Callable[[Tensor], Tensor] = "relevance",
    weighting: Weighting = "gap",
    *,
    at: str | None = None,
    pooled: bool = False,
    reference: ReferenceSet | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> Maps[ArrayT]:
    """UniCAM at a layer before the feature layer: the gradient at the feature layer is pulled back through the explained network.

    Let X be the explained features at the feature layer. The gradient there, dL/dX = Lap X, is the cotangent. With F [n, C, H, W] the
    feature of the earlier layer,

        dL/dF = (Lap X) . dX/dF,        a_ic = mean over h, w of dL/dF_ichw,        map_i = ReLU(sum_c a_ic F_ic),

    or, with ``elementwise`` weighting, map_ihw = ReLU(sum_c dL/dF_ichw F_ichw). Source: arXiv 2412.13943.

    network: the explained network, in any form that `grad_cam` takes. The cotangent of a file or a runner must be at the feature layer;
    for any other form, ``at`` names the feature layer. images: [n, 3, h, w] in [0, 1]. layer: the earlier layer. explained, given: both
    networks' features of these images at the feature layer, [n, C, H, W] as kdx returns them. The explained features must come from the
    same network with the same preprocessing. target, objective, weighting, pooled, reference: as in `kdx.unicam`, at the feature layer.
    device, chunk: as in `grad_cam`.

    Returns the maps [n, H, W] and weights [n, C] of the earlier layer, with the score of the feature layer. A map shows where the
    earlier layer has features that raise L by way of the feature layer. It is not the UniCAM map of the earlier layer's own geometry.

    Raises KdxError for what `kdx.unicam` and `grad_cam` refuse, for gradients of the logits instead of a feature layer, and for features
    that do not have the shape of the cotangent.

    >>> import torch, kdx
    >>> from kdx.export.graphs import FeatureGraph
    >>> student = kdx.models.load("kdx:resnet,width=4,depth=1,classes=5")
    >>> images = torch.rand(8, 3, 32, 32)
    >>> _, explained = FeatureGraph(student.module, ["layer3"], student.preprocessing)(images)
    >>> given = torch.rand(8, 6, 4, 4)
    >>> earlier = kdx.unicam_before(student, images, "layer1", explained, given, torch.arange(8) % 2, at="layer3")
    >>> earlier.maps.shape, earlier.weights.shape
    (torch.Size([8, 32, 32]), torch.Size([8, 4]))
    """
    unicam.check_weighting(weighting)
    pair = unicam.pair_geometry(explained, given, target, objective, pooled=pooled, reference=reference)
    cotangent, exponent = pair.feature_gradient()
    # The gradient of a score of many distances is small. Without this scaling, a network in half precision would lose it.
    largest = cotangent.abs().max().clamp_min(torch.finfo(cotangent.dtype).tiny)
    scale = torch.ldexp(largest.double(), exponent)
    weights, maps = [], []
    with gradient_runner(network, layer, images, device, at) as (runner, name, batch):
        arrays.check_same(len(explained), len(batch), "explained features", "images")
        if runner.cotangent_layer is None:
            raise KdxError(
                "The gradients are those of the logits, not of a feature layer.",
                "Name the feature layer with `at`, or export the file with --at.",
            )
        for part in parts(runner, chunk, len(batch)):
            _, gradients = layer_gradients(runner, [name], batch[part], cotangent[part] / largest, part.start)
            feature, gradient, dtype = gradients[name]
            unscaled = LayerGradient(feature, gradient.double() * scale.to(gradient.device), dtype)
            part_weights, part_maps = unscaled.maps(weighting)
            weights.append(part_weights)
            maps.append(part_maps)
    return Maps(arrays.like(torch.cat(maps), images), arrays.like(torch.cat(weights), images), pair.score)
