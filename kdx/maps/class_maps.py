"""Grad-CAM and HiResCAM."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, overload

import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.choices import Weighting
from kdx.data.inputs import Batches, Pictures
from kdx.export.graphs import no_influence
from kdx.features import arrays
from kdx.features.arrays import ArrayT
from kdx.kernels import ambient
from kdx.maps.gradients import ClassChoice, Differentiable, LogitTarget, class_gradients, explained_classes, gradient_runner
from kdx.maps.scalable_maps import ScalableMaps


@dataclass(frozen=True)
class ClassMaps(ScalableMaps[ArrayT]):
    """Grad-CAM or HiResCAM maps of one layer, for one class per image. All arrays are of the same kind as the images.

    maps: [n, H, W] >= 0, at the resolution of the features, not scaled. Values are comparable within one map, not between images.
    weights: [n, C], the mean over h, w of the gradient of the class's logit, or of the target. classes: [n], the classes that the maps
    explain; with a target, the predicted classes.
    logits: [n, number of classes]. ``empty`` is the share of maps that are zero everywhere.

    A map that is only the rounding error of its own computation is zero, and so are such weights: for example Grad-CAM before an
    instance normalisation, which removes the influence of every channel's mean.
    """

    _comparable: ClassVar[bool] = False

    maps: ArrayT
    weights: ArrayT
    classes: ArrayT
    logits: ArrayT


@overload
def grad_cam(
    network: Differentiable,
    images: ArrayT,
    layer: str | None = None,
    classes: ClassChoice = None,
    *,
    target: LogitTarget | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> ClassMaps[ArrayT]: ...
@overload
def grad_cam(
    network: Differentiable,
    images: Pictures | Batches,
    layer: str | None = None,
    classes: ClassChoice = None,
    *,
    target: LogitTarget | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> ClassMaps[NDArray[Any]]: ...
@ambient.neutral()
def grad_cam(
    network: Differentiable,
    images: Any,
    layer: str | None = None,
    classes: ClassChoice = None,
    *,
    target: LogitTarget | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> ClassMaps[Any]:
    """Grad-CAM: where the features of a layer, weighted by channel, raise the logit of a class.

    With F [n, C, H, W] the feature of the layer and y_k the logit of image i's class k,

        a_ic = mean over h, w of dy_k/dF_ichw,        map_i = ReLU(sum_c a_ic F_ic).

    Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017.

    network: a model reference, ``MODELS.toml:ROLE``, the path of a file that was exported with ``--kind gradients``, a
    `kdx.models.Network`, a PyTorch module (used as it is, without preprocessing), or an open runner of a graph of gradients, which stays
    open. images: an array or tensor [n, 3, h, w] or [n, h, w, 3], in [0, 1] or as uint8; or Pillow images, paths of files, a list of them,
    or a ``DataLoader``, whose labels are not used (`kdx.data.as_pixels`). For a network that kdx does not normalise for, such as a PyTorch
    module, pixels may have any range. layer: by default the only layer of a file or runner, or the last layer of a network whose feature
    map has a gradient. classes: one integer for all images, or integers [n], also as a list; by default the predicted classes, which costs
    one more forward pass. target: what is differentiated in place of a logit: any differentiable function from the logits [n, classes] to
    one value per image [n], such as ``lambda logits: logits[:, 3] - logits[:, 5]``, or a probability. It also works with exported files,
    and costs one more forward pass; y_k above is then its value, and ``classes`` of the result are the predicted ones. device: where a
    network or a file runs, as in `kdx.Explainer`. chunk: how many images are computed at once, by default all of them, or as many as an
    engine accepts; it does not change the result. Results are tensors for a tensor of images, on the device that computed them, and NumPy
    arrays otherwise.

    A map is not a share of the logit: its sum has no meaning, and the maps of two images have no common scale. Because the gradient is
    averaged over positions before it is multiplied with the features, a map can be high at a position that the class does not use;
    `hires_cam` does not average. The ReLU removes what lowers the logit.

    Raises KdxError for no images, for pixels outside [0, 1] if kdx normalises them, for a layer or class that does not exist, for a file or
    runner without gradients of the logits, for features or gradients that are not finite, for a layer without a gradient at any position
    of any image, and for a target that does not give one differentiable value per image. Raises ValueError for both classes and a target.

    >>> import numpy as np, kdx
    >>> images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    >>> result = kdx.grad_cam("kdx:resnet,width=4,depth=1,classes=5", images, "layer3", classes=2)
    >>> result.maps.shape, result.weights.shape, result.scaled((32, 32)).shape
    ((3, 8, 8), (3, 16), (3, 32, 32))
    """
    return _like(_class_maps(network, images, layer, classes, target, "gap", device, chunk), images)


@overload
def hires_cam(
    network: Differentiable,
    images: ArrayT,
    layer: str | None = None,
    classes: ClassChoice = None,
    *,
    target: LogitTarget | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> ClassMaps[ArrayT]: ...
@overload
def hires_cam(
    network: Differentiable,
    images: Pictures | Batches,
    layer: str | None = None,
    classes: ClassChoice = None,
    *,
    target: LogitTarget | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> ClassMaps[NDArray[Any]]: ...
@ambient.neutral()
def hires_cam(
    network: Differentiable,
    images: Any,
    layer: str | None = None,
    classes: ClassChoice = None,
    *,
    target: LogitTarget | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> ClassMaps[Any]:
    """HiResCAM: where the features of a layer raise the logit of a class, with each position's own gradient.

    With F [n, C, H, W] the feature of the layer and y_k the logit of image i's class k,

        map_ihw = ReLU(sum_c dy_k/dF_ichw F_ichw).

    Source: Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks",
    arXiv 2011.08891 (2020). They define the sum without the ReLU: if one linear layer follows F, the sum over positions is then the logit
    minus its bias. kdx applies the ReLU as in Grad-CAM, so a map shows what raises the logit and not what lowers it.

    Arguments, results and errors are those of `grad_cam`. ``weights`` are the same too, although these maps do not use them.

    If a mean over positions and one linear layer follow F, both maps are equal. If further layers follow, a map is a first-order
    statement: it does not predict the logit after a position is removed. If F is read only through a normalisation, as in the blocks of a
    transformer, the scale of F has no influence, so the sum and the map are zero up to rounding. In that case name the normalisation
    that follows (``blocks.11.norm1``), or use `grad_cam`.

    >>> import numpy as np, kdx
    >>> images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    >>> result = kdx.hires_cam("kdx:resnet,width=4,depth=1,classes=5", images, "layer2")
    >>> result.maps.shape, bool((result.classes == result.logits.argmax(1)).all())
    ((3, 16, 16), True)
    """
    return _like(_class_maps(network, images, layer, classes, target, "elementwise", device, chunk), images)


def _class_maps(
    network: Differentiable,
    images: Any,
    layer: str | None,
    classes: ClassChoice,
    target: LogitTarget | None,
    weighting: Weighting,
    device: str,
    chunk: int | None,
) -> ClassMaps[Tensor]:
    weights, maps, logits = [], [], []
    influences = False
    with gradient_runner(network, layer, images, device) as (runner, name, batch):
        chosen, cotangents = explained_classes(runner, batch, classes, target, chunk)
        for part_logits, gradients in class_gradients(runner, [name], batch, cotangents, chunk):
            part_weights, part_maps = gradients[name].maps(weighting)
            weights.append(part_weights)
            maps.append(part_maps)
            logits.append(part_logits)
            influences |= bool(gradients[name].gradient.any())
    if not influences:
        raise no_influence(name)
    return ClassMaps(torch.cat(maps), torch.cat(weights), chosen, torch.cat(logits))


def _like(maps: ClassMaps[Tensor], images: ArrayT) -> ClassMaps[ArrayT]:
    """Maps of the same kind as the images: NumPy or PyTorch."""
    return ClassMaps(*(arrays.like(getattr(maps, field.name), images) for field in fields(maps)))
