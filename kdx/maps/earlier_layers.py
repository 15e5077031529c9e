"""UniCAM of a layer before the feature layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdx.choices import ObjectiveName, Weighting
from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array, ArrayT
from kdx.maps import unicam
from kdx.maps.gradients import Differentiable, LayerGradient, gradient_runner, layer_gradients
from kdx.maps.unicam import Maps, ReferenceSet
from kdx.runtimes.runner import parts


def unicam_before(
    network: Differentiable,
    images: ArrayT,
    layer: str,
    explained: Array,
    given: Array,
    target: Array,
    objective: ObjectiveName | Callable[[Tensor], Tensor] = "relevance",
    weighting: Weighting = "gap",
    *,
    at: str | None = None,
    pooled: bool = False,
    reference: ReferenceSet | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> Maps[ArrayT]:
    """`kdx.unicam` mapped to a layer that comes before the feature layer: its gradient, pulled back through the explained network.

    With X the explained features at the feature layer, dL/dX = Lap X is the cotangent; with F the feature of the earlier
    layer, dL/dF = (Lap X) . dX/dF, and then a_ic = mean over h, w of dL/dF_ic and map_i = ReLU(sum_c a_ic F_ic), or with
    ``elementwise`` weights ReLU(sum_c dL/dF_ic F_ic). Source: arXiv 2412.13943.

    network: the explained one, as `grad_cam` takes it; a file or runner is of a graph whose cotangent is at the feature layer,
    and with anything else ``at`` names that layer. images: [n, 3, h, w] in [0, 1]. explained, given: both networks' features
    of these images at the feature layer, in the arrangement [n, C, H, W] that kdx gives them, the former from the same network
    and preprocessing. target, objective, pooled, reference: as in `kdx.unicam`; they speak of the feature layer.

    The result has the maps [n, H, W] and weights [n, C] of the earlier layer, and the feature layer's score. A map says
    where features sit that raise L by way of the feature layer; it is not the UniCAM of the earlier layer's own geometry.

    Raises KdxError for what `kdx.unicam` and `grad_cam` refuse, and for features that are not of the cotangent's layer.

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
    batch = arrays.pixels(images)
    arrays.check_same(len(explained), len(batch), "explained features", "images")
    with torch.no_grad():
        pair = unicam.pair_geometry(explained, given, target, objective, pooled=pooled, reference=reference)
        cotangent = pair.feature_gradient()
        # Gradients of a score of many distances are small; a network in half precision would lose them.
        largest = cotangent.abs().max().clamp_min(torch.finfo(cotangent.dtype).tiny)
        weights, maps = [], []
        with gradient_runner(network, layer, batch, device, at) as (runner, name):
            if runner.cotangent_layer is None:
                raise KdxError(
                    "The gradients are those of the logits, not of a feature layer.",
                    "Name the feature layer: at, or --at where the file is exported.",
                )
            for part in parts(runner, chunk, len(batch)):
                _, gradients = layer_gradients(runner, [name], batch[part], cotangent[part] / largest, part.start)
                feature, gradient = gradients[name]
                unscaled = LayerGradient(feature, gradient.double() * largest.to(gradient.device))
                part_weights, part_maps = unscaled.maps(weighting)
                weights.append(part_weights)
                maps.append(part_maps)
    return Maps(arrays.like(torch.cat(maps), images), arrays.like(torch.cat(weights), images), pair.score)
