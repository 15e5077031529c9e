"""The methods as objects that are called with images and targets."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdx.cam.graph import CamGraph, Layers, OutputTarget, Reshape, layer_names
from kdx.choices import ObjectiveName
from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array
from kdx.kernels import ambient
from kdx.maps.gradients import LayerGradient
from kdx.maps.scaling import scaled
from kdx.maps.unicam import unicam

LayerMaps = Callable[[Tensor], list[Tensor]]
"""From images to the maps [n, H, W] of each target layer."""

_FACTORS = (0.9, 1.0, 1.1)
"""What the images of ``aug_smooth`` are multiplied by."""


class ClassifierOutputTarget:
    """The logit of one class. A target of `GradCAM`, `HiResCAM` and `LayerCAM`; for `UniCAM`, the label of the image."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, output: Tensor) -> Tensor:
        """output: [classes] or [n, classes]."""
        return output[..., self.category]


class CamMethod(ABC):
    """What all methods have in common: the call, the size and scale of the maps, and ``aug_smooth``."""

    outputs: Tensor | None = None
    """The model's output in the last call, [n, ...]."""

    @abstractmethod
    def _layer_maps(self, targets: Any, eigen_smooth: bool) -> LayerMaps:
        """The passes of one call, over the images or over an augmented copy of them."""

    @ambient.neutral()
    def __call__(
        self, input_tensor: Array, targets: Any = None, aug_smooth: bool = False, eigen_smooth: bool = False
    ) -> NDArray[np.float32]:
        """The maps [n, h, w] of images [n, channels, h, w], as float32 in [0, 1].

        The maps of each target layer are min-max scaled and resized to the images; their mean over the layers is scaled again. A map that
        is zero everywhere, or that contains only the rounding error of its computation, stays zero.

        input_tensor: floating-point images, preprocessed as the model needs them. targets: see the class. aug_smooth: the mean of the maps
        of six copies: the image and its mirror image, each multiplied by 0.9, 1 and 1.1. eigen_smooth: instead of the sum over channels,
        the projection of the weighted channels on their first principal component, which removes noise and what the method guarantees.
        The sign of a component is arbitrary; kdx takes the one that agrees with the sum.

        Each map is scaled by itself, so two maps compare positions and not amounts.

        Raises KdxError for an input tensor of another shape or type, and for what the class and its maps refuse.
        """
        images = arrays.tensor(input_tensor, "input tensor")
        if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
            raise KdxError(
                f"The input tensor has shape {list(images.shape)} and type {images.dtype}.",
                "Give at least one floating-point image: [n, channels, height, width].",
            )
        layer_maps = self._layer_maps(targets, eigen_smooth)
        if not aug_smooth:
            return _image_maps(images, layer_maps)
        maps = []
        for flipped in (False, True):
            for factor in _FACTORS:
                augmented = _image_maps((images.flip(3) if flipped else images) * factor, layer_maps)
                maps.append(augmented[:, :, ::-1] if flipped else augmented)
        mean: NDArray[np.float32] = np.mean(maps, axis=0, dtype=np.float32)
        return mean

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """Close nothing: hooks are registered for one pass, on a copy of the model."""
        return None


class GradientMethod(CamMethod):
    """Maps of features and the gradients of one target per image."""

    def __init__(self, model: nn.Module, target_layers: Layers, reshape_transform: Reshape | None = None) -> None:
        self.model = model
        self._names = layer_names(model, target_layers)
        self.target_layers = list(target_layers)
        self.reshape_transform = reshape_transform

    @abstractmethod
    def _weighted(self, layer: LayerGradient) -> Tensor:
        """The weighted features [n, C, H, W]. Their sum over channels, without its negative values, is the map."""

    def _map(self, layer: LayerGradient) -> Tensor:
        return self._weighted(layer).sum(1).relu()

    def _layer_maps(self, targets: Sequence[OutputTarget] | None, eigen_smooth: bool) -> LayerMaps:
        graph = CamGraph(self.model, self._names, self.reshape_transform)

        def layer_maps(images: Tensor) -> list[Tensor]:
            self.outputs, gradients = graph.differentiated(images, targets)
            for name, layer in gradients.items():
                if not bool(layer.gradient.any()):
                    warnings.warn(f"No position of layer {name!r} influences these targets, so its maps are zero.", stacklevel=5)
            layers = [gradients[name] for name in self._names]
            return [_projection(self._weighted(layer)) if eigen_smooth else self._map(layer) for layer in layers]

        return layer_maps


class GradCAM(GradientMethod):
    """Grad-CAM (`kdx.grad_cam`): ReLU(sum_c a_ic F_ic), where a_ic is the mean over positions of the gradient of image i's target.

    model: a module, which keeps its mode, device and weights; kdx computes with a copy in eval mode. target_layers: modules of the model,
    or their dotted names. reshape_transform: from a layer's output to a feature map [n, C, H, W]; without it, kdx arranges tokens and
    channels itself. In a call, targets: one callable per image, from the model's output for that image to one number, such as
    `ClassifierOutputTarget`; None for the classes that the model predicts.

    Raises KdxError for target layers that are not in the model or that its output does not depend on, for a number of targets that
    differs from that of the images, for targets that do not return one number, and for features or gradients that are not finite. A
    layer without influence on the targets causes a warning.

    >>> import torch
    >>> from kdx.cam import ClassifierOutputTarget, GradCAM
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 6 * 6, 5))
    >>> with GradCAM(model, target_layers=[model[1]]) as cam:
    ...     maps = cam(input_tensor=torch.rand(2, 3, 8, 8), targets=[ClassifierOutputTarget(1), ClassifierOutputTarget(3)])
    >>> maps.shape, maps.dtype.name
    ((2, 8, 8), 'float32')
    """

    def _weighted(self, layer: LayerGradient) -> Tensor:
        weights, _ = layer.maps("gap")
        return weights[:, :, None, None] * layer.feature

    def _map(self, layer: LayerGradient) -> Tensor:
        return layer.maps("gap")[1]


class HiResCAM(GradientMethod):
    """HiResCAM (`kdx.hires_cam`): ReLU(sum_c dy/dF_ic F_ic), with each position's own gradient. Arguments and errors: `GradCAM`."""

    def _weighted(self, layer: LayerGradient) -> Tensor:
        return layer.gradient * layer.feature

    def _map(self, layer: LayerGradient) -> Tensor:
        return layer.maps("elementwise")[1]


class LayerCAM(GradientMethod):
    """LayerCAM: ReLU(sum_c ReLU(dy/dF_ic) F_ic). Arguments and errors: `GradCAM`.

    Source: Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE TIP 2021.
    """

    def _weighted(self, layer: LayerGradient) -> Tensor:
        return layer.gradient.relu() * layer.feature


class GradCAMPlusPlus(GradientMethod):
    """Grad-CAM++: ReLU(sum_c a_ic F_ic), a_ic = sum over positions of ReLU(g)/(2 + s_ic g). Arguments and errors: `GradCAM`.

    g is the gradient at a position, and s_ic the sum of F_ic over positions; positions where 2 + s_ic g is zero do not count. Source:
    Chattopadhay et al., "Grad-CAM++", WACV 2018, equation 19. It assumes features that are not negative, and depends on the unit of the
    target.
    """

    def _weighted(self, layer: LayerGradient) -> Tensor:
        feature, gradient = layer.feature.double(), layer.gradient.double()
        divisor = 2 + feature.sum((2, 3), keepdim=True) * gradient
        weights = torch.where(divisor != 0, gradient.relu() / divisor, 0.0).sum((2, 3), keepdim=True)
        return (weights * feature).to(layer.feature.dtype)


class UniCAM(CamMethod):
    """UniCAM (`kdx.unicam`): where a model has features that matter to the labels and that the given model does not explain.

    model, target_layers, reshape_transform: as in `GradCAM`, of the explained network, such as the student. given: the other network, such
    as the base; it and the arguments after it are named. given_layers: its layers, one per target layer; None for the layers of the same
    names. given_reshape_transform: as ``reshape_transform``. objective, pooled: as in `kdx.unicam`. In a call, targets: the labels [n] of
    all images, or their class embeddings [n, e].

    The images of a call are compared with each other, so a map changes with the other images: give at least four, better 32 or more.

    Raises KdxError for what `kdx.unicam` refuses, and for layers that are not in their network.

    >>> import torch
    >>> from kdx.cam import UniCAM
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <...>
    >>> student, base = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5)) for _ in range(2))
    >>> cam = UniCAM(student, [student[0]], given=base, given_layers=[base[0]])
    >>> cam(torch.rand(8, 3, 8, 8), targets=torch.arange(8) % 2).shape
    (8, 8, 8)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers,
        reshape_transform: Reshape | None = None,
        *,
        given: nn.Module,
        given_layers: Layers | None = None,
        given_reshape_transform: Reshape | None = None,
        objective: ObjectiveName | Callable[[Tensor], Tensor] = "relevance",
        pooled: bool = False,
    ) -> None:
        self.model, self.given = model, given
        self._names = layer_names(model, target_layers)
        self.target_layers = list(target_layers)
        self.reshape_transform, self.given_reshape_transform = reshape_transform, given_reshape_transform
        self.objective, self.pooled = objective, pooled
        self._given_names = layer_names(given, self._names if given_layers is None else given_layers)
        if len(self._names) != len(self._given_names):
            raise KdxError(
                f"There are {len(self._names)} target layers and {len(self._given_names)} given layers.",
                "Give one given layer per target layer.",
            )

    def _layer_maps(self, targets: Array | Sequence[Any] | None, eigen_smooth: bool) -> LayerMaps:
        labels = _labels(targets)
        explained = CamGraph(self.model, self._names, self.reshape_transform)
        given = CamGraph(self.given, self._given_names, self.given_reshape_transform)

        def layer_maps(images: Tensor) -> list[Tensor]:
            self.outputs, features = explained.features(images)
            _, others = given.features(images)
            maps = []
            for name, other in zip(self._names, self._given_names, strict=True):
                feature, goal = features[name], labels.to(features[name].device)
                result = unicam(feature, others[other].to(feature.device), goal, self.objective, pooled=self.pooled)
                maps.append(_projection(result.weights[:, :, None, None] * feature) if eigen_smooth else result.maps)
            return maps

        return layer_maps


def _labels(targets: Array | Sequence[Any] | None) -> Tensor:
    """Labels [n] or class embeddings [n, e], as an array, as a sequence of integers or as one of `ClassifierOutputTarget`."""
    if targets is None:
        raise KdxError("UniCAM compares the images' features with their labels, and there are none.", "Give targets: one label per image.")
    if isinstance(targets, np.ndarray | Tensor):
        return arrays.tensor(targets, "targets")
    return torch.tensor([getattr(target, "category", target) for target in targets])


def _image_maps(images: Tensor, layer_maps: LayerMaps) -> NDArray[np.float32]:
    """The maps of all target layers at the images' size, averaged, in [0, 1]."""
    height, width = images.shape[2:]
    layers = [scaled(maps, (height, width)) for maps in layer_maps(images)]
    maps: NDArray[np.float32] = scaled(torch.stack(layers).mean(0)).float().numpy(force=True)
    return maps


def _projection(weighted: Tensor) -> Tensor:
    """The projection [n, H, W] of weighted features [n, C, H, W] on their first principal component, without its negative values.

    Its sign is the one with which it agrees with the sum over channels.
    """
    rows = weighted.flatten(2).mT.double()
    rows = rows - rows.mean(1, keepdim=True)
    _, _, components = torch.linalg.svd(rows, full_matrices=False)
    projection = (rows @ components[:, 0, :, None])[:, :, 0]
    agreement = (projection * rows.sum(2)).sum(1, keepdim=True)
    maps: Tensor = torch.where(agreement < 0, -projection, projection).unflatten(1, weighted.shape[2:])
    return maps.relu()
