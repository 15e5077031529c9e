"""The passes of a user's model, whose layers are modules and whose targets are functions of its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdx.errors import KdxError
from kdx.export.copies import original
from kdx.export.dependence import check_dependence
from kdx.export.graphs import GradientGraph
from kdx.export.outputs import logits_of
from kdx.features import arrays
from kdx.kernels import ambient, geometry
from kdx.maps.gradients import LayerGradient, check_gradients, derivatives
from kdx.models.prepared import prepared, unwrapped

Layers = Sequence[nn.Module | str]
"""Modules of a model, or their dotted names."""

Reshape = Callable[[Any], Tensor]
"""From a layer's output to a feature map [n, C, H, W]."""

OutputTarget = Callable[[Tensor], Tensor]
"""From a model's output for one image to the number that its map explains."""


class CamGraph(GradientGraph):
    """A copy of a user's model, with hooks during a pass, for any output that is, or contains, one tensor [n, ...]."""

    def __init__(self, model: nn.Module, names: Sequence[str], reshape_transform: Reshape | None) -> None:
        super().__init__(prepared(model), list(dict.fromkeys(names)))
        self._reshape = reshape_transform
        self._output_shape: tuple[int, ...] = ()

    def decide(self, raw: Mapping[str, object], images: Tensor) -> None:
        if self._reshape is None:  # otherwise the user's function states the layout
            super().decide(raw, images)

    def as_map(self, raw: object, layer: str, images: Tensor) -> Tensor:
        if self._reshape is None:
            return super().as_map(raw, layer, images)
        feature = self._reshape(raw)
        if not isinstance(feature, Tensor) or feature.ndim != 4 or len(feature) != len(images):
            shape = list(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
            raise KdxError(f"reshape_transform makes {shape} of layer {layer!r}.", f"Return a feature map [{len(images)}, C, H, W].")
        return feature

    def _predict(self, images: Tensor) -> object:
        output = logits_of(super()._predict(images), self.network, any_rank=True)
        if output.ndim == 0:
            return output
        self._output_shape = tuple(output.shape[1:])
        return output.reshape(len(output), -1)

    def differentiated(self, images: Tensor, targets: Sequence[OutputTarget] | None) -> tuple[Tensor, dict[str, LayerGradient]]:
        """(the model's output [n, ...], each layer's feature and the gradient of the sum of the targets). targets: one per image."""
        images = self._checked(images)
        logits, *results = self(images, lambda logits: self._cotangent(logits, targets))
        count = len(self.layers)
        gradients = {layer: LayerGradient(results[place], results[count + place], self.dtype) for place, layer in enumerate(self.layers)}
        check_gradients(gradients)
        return logits.reshape(len(logits), *self._output_shape), gradients

    def features(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(the model's output [n, ...], each layer's feature [n, C, H, W])."""
        images = self._checked(images)
        logits, raw = self.watch(images)
        features = {layer: geometry.wide(self.as_map(raw[layer], layer, images)).detach() for layer in self.layers}
        return geometry.wide(logits).reshape(len(logits), *self._output_shape).detach(), features

    def _checked(self, images: Tensor) -> Tensor:
        """The images on the model's device, after a check that its output for an image depends on that image alone."""
        check_dependence(self, (images.shape[2], images.shape[3]))
        return ambient.recordable(images.to(self.mean.device))

    def _cotangent(self, logits: Tensor, targets: Sequence[OutputTarget] | None) -> Tensor:
        """The gradient of the sum of the targets by the logits, [n, k]."""
        if targets is None:
            if len(self._output_shape) != 1:
                raise KdxError(
                    f"The model returns {list(self._output_shape)} per image, so it does not predict one class.",
                    "Give targets: one callable per image.",
                )
            return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)
        arrays.check_same(len(targets), len(logits), "targets", "images")

        def values(rows: Tensor) -> Tensor:
            outputs = rows.reshape(len(rows), *self._output_shape)
            return torch.stack([_number(target(output)) for target, output in zip(targets, outputs, strict=True)])

        return derivatives(values, logits)


def _number(value: Tensor) -> Tensor:
    """The one number [] that a target returns."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise KdxError(
            "A target does not return one number that depends on the output.",
            "Return a tensor with one entry, computed from the output for one image, such as output[3].",
        )
    return value.reshape(())


def layer_names(model: nn.Module, layers: Layers) -> list[str]:
    """The dotted names of modules in a model, or in the module inside its wrappers."""
    if isinstance(layers, str | nn.Module):
        raise TypeError("target_layers must be a list of modules")
    if not layers:
        raise KdxError("There are no target layers.", "Give a list of modules, such as [model.layer4[-1]].")
    names = {id(original(module)): name for name, module in unwrapped(model).named_modules()}
    chosen = [layer if isinstance(layer, str) else names.get(id(original(layer))) for layer in layers]
    for layer, name in zip(layers, chosen, strict=True):
        if not name:
            raise KdxError(
                f"A target layer ({type(layer).__name__}) is not a module inside the model.", "Give modules of the same model object."
            )
    return [str(name) for name in chosen]
