"""What is exported: a network with its preprocessing inside and its layers' features outside."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdx.errors import KdxError

_MAX_PREFIX_TOKENS = 8
"""Class, distillation and register tokens that may stand before a grid of patch tokens."""


@dataclass(frozen=True)
class Preprocessing:
    """What a network does to images in [0, 1] before its first layer.

    ``(resize(images, size) - mean) / std``, bilinear. ``size`` None leaves the size alone; ``mean`` and ``std``
    have one entry, or one a channel. The default does nothing.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """The module at the dotted path ``name``; KdxError with the near matches when there is none."""
    modules: dict[str, nn.Module] = {path: module for path, module in network.named_modules() if path}
    if name in modules:
        return modules[name]
    near = difflib.get_close_matches(name, modules, n=4, cutoff=0.5) or [path for path, _ in network.named_children()][:6]
    raise KdxError(f"The network has no layer {name!r}.", f"Near matches: {', '.join(near)}.")


def as_map(feature: object, layer: str, image: tuple[int, int]) -> Tensor:
    """A layer's output as a feature map [n, C, H, W], for images of height and width ``image``.

    [n, C, H, W] stays; [n, H, W, C], which is told by the images' aspect, is turned; tokens [n, L, C] lose their leading
    class tokens and become the grid of the images' aspect that is left; a vector [n, C] becomes [n, C, 1, 1].
    """
    if not isinstance(feature, Tensor) or not feature.is_floating_point() or feature.ndim not in (2, 3, 4):
        kind = f"a tensor {list(feature.shape)}" if isinstance(feature, Tensor) else type(feature).__name__
        raise KdxError(
            f"The output of layer {layer!r} is {kind}, not one feature map.",
            "Choose a layer whose output is one floating-point tensor [n, C, H, W], tokens [n, L, C] or a vector [n, C].",
        )
    if feature.ndim == 4:
        _, a, b, c = feature.shape
        channels_last = c > max(a, b) and _has_aspect(a, b, image) and not _has_aspect(b, c, image)
        return feature.permute(0, 3, 1, 2) if channels_last else feature
    if feature.ndim == 2:
        return feature[:, :, None, None]
    height, width, prefix = _grid(feature.shape[1], layer, image)
    grid: Tensor = feature[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
    return grid


def _grid(tokens: int, layer: str, image: tuple[int, int]) -> tuple[int, int, int]:
    """Height and width of the largest grid with exactly the images' aspect, and the number of tokens before it."""
    unit = math.gcd(*image)
    ratio = image[0] // unit, image[1] // unit
    scale = math.isqrt(tokens // (ratio[0] * ratio[1]))
    height, width = ratio[0] * scale, ratio[1] * scale
    prefix = tokens - height * width
    if scale == 0 or prefix > _MAX_PREFIX_TOKENS:
        raise KdxError(
            f"The {tokens} tokens of layer {layer!r} are no grid of the images' aspect behind at most {_MAX_PREFIX_TOKENS} class tokens.",
            "Choose a layer with a grid of tokens, or images whose size gives one.",
        )
    return height, width, prefix


def _has_aspect(height: int, width: int, image: tuple[int, int]) -> bool:
    """Whether height : width is the image's, but for the rounding of strides to whole places."""
    return abs(height * image[1] - width * image[0]) <= image[0] + image[1]


class FeatureGraph(nn.Module):
    """A network as kdx runs it in every runtime: images in [0, 1] [n, 3, h, w] -> (logits, one feature map a layer).

    Every runtime executes this module or a file exported from it, so preprocessing and the layout of features
    are decided here and nowhere else. Gradients flow through it; callers who want none say so.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], preprocessing: Preprocessing = Preprocessing()) -> None:
        super().__init__()
        self.network = network
        self.layers = tuple(layers)
        self.preprocessing = preprocessing
        self.mean: Tensor
        self.std: Tensor
        kind = next((parameter for parameter in network.parameters() if parameter.is_floating_point()), torch.empty(0))
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values, dtype=kind.dtype, device=kind.device).view(1, -1, 1, 1), persistent=False)
        # A tuple, so that the layers' modules are not registered a second time.
        self._layer_modules = tuple(find_layer(network, layer) for layer in self.layers)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size = self.preprocessing.size
        if size is not None:
            images = nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        seen: dict[str, object] = {}
        hooks = [
            module.register_forward_hook(_remember(seen, layer)) for layer, module in zip(self.layers, self._layer_modules, strict=True)
        ]
        try:
            logits = self.network((images - self.mean) / self.std)
        finally:
            for hook in hooks:
                hook.remove()
        unreached = [layer for layer in self.layers if layer not in seen]
        if unreached:
            raise KdxError(
                f"The forward pass does not reach layer {unreached[0]!r}.", "Choose a layer that the network uses when it predicts."
            )
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise KdxError(
                "The network does not return logits [n, classes].", "Wrap it in a module whose forward returns one tensor of logits."
            )
        aspect = size or (images.shape[2], images.shape[3])
        return logits, *(as_map(seen[layer], layer, aspect) for layer in self.layers)


def _remember(seen: dict[str, object], layer: str) -> Callable[[nn.Module, object, object], Tensor | None]:
    def hook(_module: nn.Module, _inputs: object, output: object) -> Tensor | None:
        seen[layer] = output
        # The network goes on with a copy: an in-place ReLU after the layer would overwrite the feature.
        return output.clone() if isinstance(output, Tensor) else None

    return hook
