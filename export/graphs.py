"""The graphs of one network that runtimes execute and files are exported from.

`FeatureGraph` is a network with its layers' features, and `GradientGraph` adds their gradients. `kdx.export.explainer_graphs` contains
the graphs of several networks. Preprocessing is inside every graph. A file has its graph's names of inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdx.errors import KdxError
from kdx.export import layouts
from kdx.export.layer_names import find_layer, output_name, parse_layer
from kdx.export.outputs import logits_of
from kdx.export.passes import GradientsStayOn, network_errors, no_checkpointing
from kdx.kernels import ambient, geometry


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of images in [0, 1] before a network's first layer: ``(resize(images, size) - mean) / std``.

    Resizing is bilinear; with ``size`` None, images keep their size. ``mean`` and ``std`` have one entry, or one per channel. The
    default changes nothing.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


class WatchedNetwork(nn.Module):
    """A network with its preprocessing, and with a hook on each layer during a forward pass.

    Every runtime executes a graph that is built on this class, or a file exported from one, so only this class decides on
    preprocessing and on the layout of features (`kdx.export.layouts`). A layer is a dotted module path; ``path[i]`` is the i-th output
    of a module that has several, which is necessary if several are floating-point tensors, and ``path:layout`` states the layout of its
    output. A network in half precision still takes float32 images and returns float32 results.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], preprocessing: Preprocessing = Preprocessing()) -> None:
        super().__init__()
        self.network = network
        self.layers = tuple(layers)
        self.preprocessing = preprocessing
        self.mean: Tensor
        self.std: Tensor
        weights = (parameter.detach() for parameter in network.parameters() if parameter.is_floating_point())
        like = geometry.wide(next(weights, torch.empty(0, dtype=torch.float32)))
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1), persistent=False)
        self.watched = tuple(layers)
        # A tuple, so that the layers' modules are not registered a second time.
        self._watched_modules = tuple(find_layer(network, layer) for layer in layers)
        self.decisions = layouts.decisions_of(network)

    def as_map(self, raw: object, layer: str, images: Tensor) -> Tensor:
        """A layer's raw output for these images, from `watch`, or its gradient, as a feature map [n, C, H, W].

        Raises KdxError for an output that is not one floating-point tensor with one row per image, and for a layout that is not known.
        """
        feature = layouts.checked_feature(raw, layer)
        key = layer, self._size_of(images)
        if key in self.decisions and not self.decisions[key].layout.fits(feature.shape):
            del self.decisions[key]  # the network was changed since
        self.decide({layer: raw}, images)
        layout = self.decisions[key].layout
        if not isinstance(images.shape[0], torch.SymInt):  # under tracing, the comparison would fix the size of the batch
            layouts.check_rows(layout, tuple(feature.shape), layer, images.shape[0])
        return layout.as_map(feature)

    def decide(self, raw: Mapping[str, object], images: Tensor) -> None:
        """Decide on the layouts of these layers' outputs for images of this size, as far as they are not decided."""
        size = self._size_of(images)
        open_layers = [layer for layer in raw if (layer, size) not in self.decisions]
        if not open_layers:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(f"the layout of {open_layers[0]} must be decided before tracing")
        decider = layouts.Decider(self.network, lambda probes: self.watch(probes)[1], size, self.mean)
        for layer in open_layers:
            self.decisions[layer, size] = decider.decide(layer, raw[layer], len(images))

    def decide_for(self, image_size: tuple[int, int]) -> None:
        """Before tracing: decide on the layouts of all layers for images of this size, with a pass of two random images if any is open."""
        size = self.preprocessing.size or image_size
        if any((layer, size) not in self.decisions for layer in self.watched):
            images = torch.rand(2, 3, *image_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(self.mean)
            with torch.no_grad(), layouts.eval_mode(self.network):
                self.decide(self.watch(images)[1], images)
        for layer in self.watched:
            self.decisions[layer, size].layout.prepare(self.mean.device)

    def _size_of(self, images: Tensor) -> tuple[int, int]:
        return self.preprocessing.size or (images.shape[2], images.shape[3])

    def watch(self, images: Tensor, capture: Callable[[Tensor], Tensor] = lambda raw: raw) -> tuple[Tensor, dict[str, object]]:
        """One forward pass: logits [n, classes], and each layer's raw output, in the layer's own layout.

        capture: applied to each layer's tensor. Its result is returned, and the network continues with a copy of it.
        """
        size = self.preprocessing.size
        sides = images.shape[2:]
        is_symbolic = any(isinstance(side, torch.SymInt) for side in sides)  # a comparison would fix a symbolic size
        if size is not None and (is_symbolic or sides != size):  # resizing to the same size is slow and changes nothing
            images = nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        with no_checkpointing(), network_errors():
            output, raw = self._pass(((images - self.mean) / self.std).to(self.dtype), capture)
        unreached = [layer for layer in self.watched if layer not in raw]
        if unreached:
            raise KdxError(
                f"The forward pass does not reach layer {unreached[0]!r}.", "Choose a layer that the network uses for its prediction."
            )
        return logits_of(output, self.network), raw

    def _pass(self, images: Tensor, capture: Callable[[Tensor], Tensor]) -> tuple[object, dict[str, object]]:
        """The network's output for preprocessed images, and each layer's raw output."""
        raw: dict[str, object] = {}
        hooks = self._register_hooks(raw, capture)
        try:
            return self._predict(images), raw
        finally:
            for hook in hooks:
                hook.remove()

    def _register_hooks(self, raw: dict[str, object], capture: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
        """Hooks that store the output of every watched layer in ``raw``."""
        return [
            module.register_forward_hook(_capture_hook(raw, layer, capture))
            for layer, module in zip(self.watched, self._watched_modules, strict=True)
        ]

    def _predict(self, images: Tensor) -> object:
        return self.network(images)

    @property
    def dtype(self) -> torch.dtype:
        """The number format in which the network computes."""
        return next((weight.dtype for weight in self.network.parameters() if weight.is_floating_point()), self.mean.dtype)


class FeatureGraph(WatchedNetwork):
    """images [n, 3, h, w] in [0, 1] -> (logits, one feature map per layer).

    Autograd records the pass; a caller that does not differentiate uses torch.no_grad().
    """

    kind = "features"
    input_names = ("images",)

    @property
    def output_names(self) -> tuple[str, ...]:
        return ("logits", *map(output_name, self.layers))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, raw = self.watch(images)
        self.decide(raw, images)
        return geometry.wide(logits), *(geometry.wide(self.as_map(raw[layer], layer, images)) for layer in self.layers)


def no_influence(layer: str) -> KdxError:
    """The error for a layer whose feature map has no gradient in any image."""
    return KdxError(
        f"No position of layer {layer!r} has any influence on the prediction.",
        "Choose an earlier layer: after the last block of a transformer, the head may read "
        "only the class token. A head of zeros, as before training, gives no layer any influence.",
    )


class GradientGraph(WatchedNetwork):
    """A network with its gradients: images, cotangent -> (logits, one feature map per layer, one gradient per layer).

    With y the logits, or the feature map of the layer ``at``, the gradient at a layer with feature F is the vector-Jacobian product
    cotangent . dy/dF, in the layout of F as a feature map. cotangent: [n, classes], or the shape of the feature map ``at``. A
    one-hot row gives the gradient of one class's logit (Grad-CAM, HiResCAM). The gradient Lap X of UniCAM's objective at the layer
    ``at`` gives UniCAM of an earlier layer.

    Weights get no gradient, and nothing before the first layer is differentiated.

    Raises KdxError if there is no layer, or if ``at`` is one of the layers; called, also for a cotangent of another shape, and for a
    layer that y does not depend on.
    """

    kind = "gradients"
    input_names = ("images", "cotangent")

    def __init__(
        self, network: nn.Module, layers: Sequence[str], preprocessing: Preprocessing = Preprocessing(), at: str | None = None
    ) -> None:
        super().__init__(network, (*layers, *([] if at is None else [at])), preprocessing)
        self.layers = tuple(layers)
        self.at = at
        if not self.layers or at in self.layers:
            raise KdxError(
                "No layer is named to take the gradient at."
                if not self.layers
                else f"The cotangent and a gradient are both at layer {at!r}.",
                "Name layers that come before the cotangent.",
            )

    @property
    def output_names(self) -> tuple[str, ...]:
        return ("logits", *map(output_name, self.layers), *(f"gradient/{layer}" for layer in self.layers))

    def forward(self, images: Tensor, cotangent: Tensor | Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """cotangent: a tensor, or a function of the logits that returns one."""
        with torch.enable_grad():
            logits, raw = self.recorded(images)
            self.decide(raw, images)
            return self.with_gradients(images, cotangent if isinstance(cotangent, Tensor) else cotangent(logits), logits, raw)

    def recorded(self, images: Tensor) -> tuple[Tensor, dict[str, object]]:
        """`watch` in a pass that autograd records from the first layer on."""
        with torch.enable_grad():
            return self.watch(images, _cut)

    def cotangent_shape(self, images: Tensor) -> tuple[int, ...]:
        """The shape of the cotangent for these images."""
        with torch.no_grad():
            logits, raw = self.watch(images.to(self.mean.device))
            return tuple((logits if self.at is None else self.as_map(raw[self.at], self.at, images)).shape)

    def with_gradients(self, images: Tensor, cotangent: Tensor, logits: Tensor, raw: Mapping[str, object]) -> tuple[Tensor, ...]:
        """The graph's outputs, computed from one pass whose layers' tensors require gradients."""
        end = logits if self.at is None else self.as_map(raw[self.at], self.at, images)
        if cotangent.shape != end.shape:
            raise KdxError(
                f"The cotangent has shape {list(cotangent.shape)}, and {self.at or 'the logits'} {list(end.shape)}.",
                "Give a cotangent of that shape.",
            )
        maps = [self.as_map(raw[layer], layer, images) for layer in self.layers]
        leaves = [raw[layer] for layer in self.layers]
        raw_gradients: list[Tensor | None] = [None] * len(leaves)
        if end.requires_grad:
            if end.device.type == "cuda":
                _start_backward_thread(end.device)
            with network_errors("The backward pass of the network"):
                cotangent = cotangent.to(end.dtype)
                raw_gradients = list(torch.autograd.grad(end, leaves, cotangent, allow_unused=True))  # type: ignore[arg-type]
        for layer, gradient in zip(self.layers, raw_gradients, strict=True):
            if gradient is None:
                raise KdxError(
                    f"{self.at or 'The prediction'} does not depend on layer {layer!r}.",
                    "Name layers that come before the cotangent, with no detach() and no torch.inference_mode() between them.",
                )
        gradients = [self.as_map(gradient, layer, images) for layer, gradient in zip(self.layers, raw_gradients, strict=True)]
        return tuple(geometry.wide(result).detach() for result in (logits, *maps, *gradients))

    def _predict(self, images: Tensor) -> object:
        # With detached weights autograd records from the first layer on, and the network's own requires_grad flags stay as they are.
        with GradientsStayOn():
            return torch.func.functional_call(self.network, _detached_weights(self.network), (images.detach(),), tie_weights=False)


@cache
def _start_backward_thread(device: torch.device) -> None:
    """Make the GPU's context current in the thread in which autograd computes its backward passes.

    A kernel makes it current silently. A product of cuBLAS, with which the backward pass of many networks starts, prints a warning.
    """
    with torch.inference_mode(False), torch.enable_grad():
        one = torch.ones((), device=device, requires_grad=True)
        torch.autograd.grad(one.exp(), one)


def _detached_weights(network: nn.Module) -> dict[str, Tensor]:
    """The detached parameters by path, and the buffers that autograd could not record.

    One path per attribute of a module. `functional_call` would otherwise replace an attribute once per path of a module that is
    registered at several paths, and leave its replacement in place of the parameter.
    """
    weights: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            weights[prefix + name] = ambient.recordable(parameter.detach())
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if buffer.is_inference():
                weights[prefix + name] = buffer.clone()
    return weights


def _cut(raw: Tensor) -> Tensor:
    """A layer's tensor as a leaf of autograd, or as a view if it depends on such a leaf.

    Never the tensor itself: a layer that returns its input, as dropout does, would share its gradient with the layer before it.
    """
    if raw.requires_grad or not raw.is_floating_point():
        return raw.view_as(raw)
    return raw.detach().requires_grad_()


def _capture_hook(raw: dict[str, object], layer: str, capture: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, object, object], object]:
    """A hook that stores a module's output, or the named one of several, in ``raw`` and lets the network continue with a copy of it.

    A copy, since an in-place ReLU after the layer would overwrite the feature.
    """
    name = parse_layer(layer)
    path, index = name.path, name.index

    def hook(_module: nn.Module, _inputs: object, output: object) -> object:
        items = list(output) if isinstance(output, list | tuple) else [output]
        if index is not None and index >= len(items):
            raise KdxError(
                f"There is no {layer!r}: {path} has {len(items)} outputs.", f"Name one from {path}[0] to {path}[{len(items) - 1}]."
            )
        position = _only_feature(items) if index is None else index
        tensor = None if position is None else items[position]
        if position is None or not isinstance(tensor, Tensor):
            raw[layer] = output  # `checked_feature` raises the error
            return None
        raw[layer] = captured = capture(tensor)
        items[position] = captured.clone()
        if not isinstance(output, list | tuple):
            return items[0]
        return output._make(items) if hasattr(output, "_make") else type(output)(items)  # a named tuple takes its entries one by one

    return hook


def _only_feature(items: Sequence[object]) -> int | None:
    """The place of the only floating-point tensor among a module's outputs, such as tokens with the size of their grid; else None."""
    places = [place for place, item in enumerate(items) if isinstance(item, Tensor) and item.is_floating_point()]
    return places[0] if len(places) == 1 else None
