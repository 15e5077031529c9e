"""What is exported: a network with its layers' features, or with their gradients too; or networks and the geometry that compares them.

Preprocessing is inside every graph. The names of a graph's inputs and outputs are those of the files made from it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdx.errors import KdxError
from kdx.kernels import geometry

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
    """The module at the dotted path ``name``, or at ``path`` of ``path[i]``; KdxError with the near matches when there is none."""
    modules: dict[str, nn.Module] = {path: module for path, module in network.named_modules() if path}
    path, _ = _taken_apart(name)
    if path in modules:
        return modules[path]
    near = difflib.get_close_matches(path, modules, n=4, cutoff=0.5) or [path for path, _ in network.named_children()][:6]
    raise KdxError(f"The network has no layer {name!r}.", f"Near matches: {', '.join(near)}.")


def _taken_apart(layer: str) -> tuple[str, int | None]:
    """``path`` or ``path[i]`` -> the path, and which of the module's several outputs is meant."""
    found = re.fullmatch(r"(.+)\[(\d+)\]", layer)
    return (found[1], int(found[2])) if found else (layer, None)


def as_map(feature: object, layer: str, image: tuple[int, int]) -> Tensor:
    """A layer's output as a feature map [n, C, H, W], for images of height and width ``image``.

    [n, C, H, W] stays; [n, H, W, C], which is told by the images' aspect, is turned; tokens [n, L, C] lose their leading
    class tokens and become the grid of the images' aspect that is left; a vector [n, C] becomes [n, C, 1, 1].
    """
    if not isinstance(feature, Tensor) or not feature.is_floating_point() or feature.ndim not in (2, 3, 4):
        kind = f"a tensor {list(feature.shape)}" if isinstance(feature, Tensor) else type(feature).__name__
        hint = "Choose a layer whose output is one floating-point tensor [n, C, H, W], tokens [n, L, C] or a vector [n, C]."
        if isinstance(feature, list | tuple) and len(feature) > 1:
            hint = f"Name one of its {len(feature)} as {layer}[0] and so on."
        raise KdxError(f"The output of layer {layer!r} is {kind}, not one feature map.", hint)
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


class WatchedNetwork(nn.Module):
    """A network behind its preprocessing, with a hook on each layer for the length of a pass.

    Every runtime executes a graph made of this or a file exported from one, so preprocessing and the layout of features
    are decided here and nowhere else. A layer is a dotted module path; ``path[i]`` is the i-th output of a module that has
    several. A network in half precision takes its images and gives its results in float32.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], preprocessing: Preprocessing = Preprocessing()) -> None:
        super().__init__()
        self.network = network
        self.layers = tuple(layers)
        self.preprocessing = preprocessing
        self.mean: Tensor
        self.std: Tensor
        kind = geometry.wide(
            next((parameter.detach() for parameter in network.parameters() if parameter.is_floating_point()), torch.empty(0))
        )
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values, dtype=kind.dtype, device=kind.device).view(1, -1, 1, 1), persistent=False)
        self.watched = tuple(layers)
        # A tuple, so that the layers' modules are not registered a second time.
        self._watched_modules = tuple(find_layer(network, layer) for layer in layers)

    def as_map(self, raw: object, layer: str, images: Tensor) -> Tensor:
        """What `watch` saw at a layer of these images as a feature map."""
        return as_map(raw, layer, self.preprocessing.size or (images.shape[2], images.shape[3]))

    def watch(self, images: Tensor, held: Callable[[Tensor], Tensor] = lambda raw: raw) -> tuple[Tensor, dict[str, object]]:
        """One pass: logits [n, classes], and each layer's output in the layer's own layout.

        held: what to hold in place of a layer's tensor; the network goes on with a copy of that.
        """
        if self.preprocessing.size is not None:
            images = nn.functional.interpolate(images, size=self.preprocessing.size, mode="bilinear", align_corners=False)
        seen: dict[str, object] = {}
        hooks = [
            module.register_forward_hook(_remember(seen, layer, held))
            for layer, module in zip(self.watched, self._watched_modules, strict=True)
        ]
        try:
            logits = self._predict(((images - self.mean) / self.std).to(self._numbers()))
        finally:
            for hook in hooks:
                hook.remove()
        unreached = [layer for layer in self.watched if layer not in seen]
        if unreached:
            raise KdxError(
                f"The forward pass does not reach layer {unreached[0]!r}.", "Choose a layer that the network uses when it predicts."
            )
        logits = getattr(logits, "logits", logits)  # as Hugging Face's networks give them
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
            raise KdxError(
                "The network does not return logits [n, classes].", "Wrap it in a module whose forward returns one tensor of logits."
            )
        return logits, seen

    def _predict(self, images: Tensor) -> object:
        return self.network(images)

    def _numbers(self) -> torch.dtype:
        """The type that the network computes in."""
        return next((held.dtype for held in self.network.parameters() if held.is_floating_point()), self.mean.dtype)


class FeatureGraph(WatchedNetwork):
    """images in [0, 1] [n, 3, h, w] -> (logits, one feature map a layer). Gradients flow through it; callers who want none say so."""

    kind = "features"
    input_names = ("images",)

    @property
    def output_names(self) -> tuple[str, ...]:
        return ("logits", *self.layers)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, raw = self.watch(images)
        return geometry.wide(logits), *(geometry.wide(self.as_map(raw[layer], layer, images)) for layer in self.layers)


class GradientGraph(WatchedNetwork):
    """A network with its gradients: images, cotangent -> (logits, one feature map a layer, one gradient a layer).

    With y the logits, or the feature map of the layer ``at``, the gradient at a layer with feature F is the vector-Jacobian
    product cotangent . dy/dF, in F's layout as a map. cotangent: [n, classes], or the shape of the feature map ``at``. A
    one-hot row gives the gradient of one class's logit (Grad-CAM, HiResCAM); the gradient Lap X of UniCAM's objective at
    ``at`` gives UniCAM of a layer before it.

    Weights get no gradient, and nothing before the first layer is differentiated.
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
                "There is no layer to differentiate to." if not self.layers else f"The cotangent and a gradient are both at layer {at!r}.",
                "Name layers that come before the cotangent.",
            )

    @property
    def output_names(self) -> tuple[str, ...]:
        return ("logits", *self.layers, *(f"gradient/{layer}" for layer in self.layers))

    def forward(self, images: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            logits, raw = self.watch(images, _cut)
            return self.differentiated(images, cotangent, logits, raw)

    def cotangent_shape(self, images: Tensor) -> tuple[int, ...]:
        """The shape of the cotangent for these images."""
        with torch.no_grad():
            logits, raw = self.watch(images.to(self.mean.device))
            return tuple((logits if self.at is None else self.as_map(raw[self.at], self.at, images)).shape)

    def differentiated(self, images: Tensor, cotangent: Tensor, logits: Tensor, raw: Mapping[str, object]) -> tuple[Tensor, ...]:
        """The graph's outputs, from one pass whose layers' tensors ask for gradients."""
        end = logits if self.at is None else self.as_map(raw[self.at], self.at, images)
        if cotangent.shape != end.shape:
            raise KdxError(
                f"The cotangent has shape {list(cotangent.shape)}, and {self.at or 'the logits'} {list(end.shape)}.",
                "Give one number for each of those.",
            )
        maps = [self.as_map(raw[layer], layer, images) for layer in self.layers]
        leaves = [raw[layer] for layer in self.layers]
        found: list[Tensor | None] = [None] * len(leaves)
        if end.requires_grad:
            found = list(torch.autograd.grad(end, leaves, cotangent.to(end.dtype), allow_unused=True))  # type: ignore[arg-type]
        for layer, gradient in zip(self.layers, found, strict=True):
            if gradient is None:
                raise KdxError(
                    f"{self.at or 'The prediction'} does not depend on layer {layer!r}.", "Name layers that come before the cotangent."
                )
        gradients = [self.as_map(gradient, layer, images) for layer, gradient in zip(self.layers, found, strict=True)]
        return tuple(geometry.wide(result).detach() for result in (logits, *maps, *gradients))

    def _predict(self, images: Tensor) -> object:
        # Detached weights: autograd records from the first layer on, and the network's own flags stay as they are.
        weights = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        return torch.func.functional_call(self.network, weights, (images.detach(),))


class ExplainerGraph(nn.Module):
    """Networks and the geometry of their features in one graph: images, target -> maps, weights, scores, distances and logits.

    networks: a `FeatureGraph` a role, each with as many layers, which correspond in order; outputs are named after the
    student's. maps: a name -> the explained and the given role. scores: a name -> the roles, or ``target``, whose distance
    correlation it is; with a third one, the semi-partial correlation of the first two given that.

    target: an embedding [n, e], such as one-hot rows. For each layer L and map M, with relevance as the objective:

    - ``L/M/maps`` [n, H, W], at feature resolution, as `kdx.unicam` gives them; ``L/M/scaled`` [n, h, w], min-max scaled to
      [0, 1] and resized to the images; ``L/M/weights`` [n, C];
    - ``L/scores``, in the order of ``scores``; ``L/distances`` [roles, n, n], from which any other score follows.

    Images n >= 4, as scores and maps are those of a batch. Geometry is float32 whatever the networks are. A map of networks
    that differ by no more than rounding is zero everywhere.
    """

    kind = "explainer"
    input_names = ("images", "target")
    target = "target"

    def __init__(
        self, networks: Mapping[str, FeatureGraph], maps: Mapping[str, tuple[str, str]], scores: Mapping[str, tuple[str, ...]]
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.roles = tuple(networks)
        self.layers = networks["student"].layers
        self.maps = dict(maps)
        self.scores = dict(scores)

    def network(self, role: str) -> FeatureGraph:
        found = self.networks[role]
        assert isinstance(found, FeatureGraph)
        return found

    @property
    def output_names(self) -> tuple[str, ...]:
        names = [f"logits/{role}" for role in self.roles]
        for layer in self.layers:
            names += [f"{layer}/{name}/{what}" for name in self.maps for what in ("maps", "scaled", "weights")]
            names += [f"{layer}/scores", f"{layer}/distances"]
        return tuple(names)

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        passed = {role: network(images) for role, network in self.networks.items()}
        goal = geometry.u_centered(geometry.distances(target, torch.float32))
        results = [logits for logits, *_ in passed.values()]
        for index in range(len(self.layers)):
            features = {role: rest[index] for role, (_, *rest) in passed.items()}
            results += self._layer(features, goal, (images.shape[2], images.shape[3]))
        return tuple(results)

    def _layer(self, features: Mapping[str, Tensor], goal: Tensor, size: tuple[int, int]) -> list[Tensor]:
        d = {role: geometry.distances(feature.flatten(1), torch.float32) for role, feature in features.items()}
        centred = {role: geometry.u_centered(distances) for role, distances in d.items()} | {self.target: goal}
        results = []
        for explained, given in self.maps.values():
            feature = features[explained]
            found = geometry.laplacian(d[explained], centred[explained], centred[given], goal)
            lap = torch.where(found.left > _ROUNDING, found.lap, 0.0)
            # Lap sends constants to zero. Taken from the features first, they cannot drown what images differ in as means are rounded.
            weights = geometry.gradient(lap, geometry.gap(feature - feature.mean(0), torch.float32))
            maps = geometry.cam(feature, weights)
            scaled = nn.functional.interpolate(geometry.scaled(maps)[:, None], size=size, mode="bilinear", align_corners=False)
            results += [maps, scaled[:, 0], weights]
        scores = [
            (geometry.semipartial if len(matrices) == 3 else geometry.correlation)(*(centred[name] for name in matrices))
            for matrices in self.scores.values()
        ]
        return [*results, torch.stack(scores), torch.stack([d[role] for role in self.roles])]


Graph = FeatureGraph | GradientGraph | ExplainerGraph
"""What is exported and run: named tensors in, named tensors out."""

_ROUNDING = 1e-5
"""||R||/||D|| below which what is left of one network given another is rounding: distances in float32 are known to about 1e-6."""


def _cut(raw: Tensor) -> Tensor:
    """A layer's tensor as a leaf that gradients are taken to, or as a view where it depends on such a leaf.

    Never the tensor itself: a layer that gives on what it was given, as dropout does, would answer for its neighbours too.
    """
    if raw.requires_grad or not raw.is_floating_point():
        return raw.view_as(raw)
    return raw.detach().requires_grad_()


def _remember(seen: dict[str, object], layer: str, held: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, object, object], object]:
    """A hook that holds a module's output, or the named one of several, and lets the network go on with a copy of it.

    A copy, since an in-place ReLU after the layer would overwrite the feature.
    """
    path, index = _taken_apart(layer)

    def hook(_module: nn.Module, _inputs: object, output: object) -> object:
        items = list(output) if isinstance(output, list | tuple) else [output]
        place = index or 0
        if place >= len(items):
            raise KdxError(
                f"There is no {layer!r}: {path} has {len(items)} outputs.", f"Name one from {path}[0] to {path}[{len(items) - 1}]."
            )
        found = items[place]
        if not isinstance(found, Tensor) or (index is None and len(items) > 1):
            seen[layer] = output  # for `as_map` to refuse
            return None
        seen[layer] = kept = held(found)
        items[place] = kept.clone()
        return type(output)(items) if isinstance(output, list | tuple) else items[0]

    return hook
