"""What losses see of a network: logits, features, features before the activation, and the classifier's weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from kdx.distill.losses.base import Outputs, Requirements
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph
from kdx.export.layer_names import find_layer
from kdx.kernels import geometry

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish)


class Observed:
    """Computes the `Outputs` that losses require of one network: images [n, 3, H, W] in [0, 1] -> Outputs.

    graph: has the paired layers. If losses need features before the activation, the layers' activation modules are made to work out of
    place, because in place they would overwrite what is needed; results do not change. A layer that does not end in an activation module
    is its own pre-activation.
    """

    def __init__(self, graph: FeatureGraph, requirements: Requirements) -> None:
        self.graph = graph
        self.requirements = requirements
        self._raw: dict[str, tuple[object, object]] = {}
        self._latest: dict[str, tuple[object, object]] = {}
        if requirements.pre_activations:
            for layer in graph.layers:
                self._watch(layer)

    def __call__(self, images: Tensor) -> Outputs:
        if self.requirements.pre_activations:  # a pass with random images, to decide on layouts, must not come after the one with these
            self.graph.decide_for((images.shape[2], images.shape[3]))
        logits, *features = self.graph(images)
        before = [self._pre_activation(layer, feature, images) for layer, feature in zip(self.graph.layers, features, strict=True)]
        self._raw.clear()
        self._latest.clear()
        head = None
        if self.requirements.head:
            head = classifier_weight(self.graph.network, logits.shape[1], features[-1].shape[1], self.graph.layers[-1])
        return Outputs(logits, tuple(features), tuple(before) if self.requirements.pre_activations else (), head)

    def _watch(self, layer: str) -> None:
        def finished(_module: nn.Module, _inputs: object, output: object) -> None:
            before, after = self._latest.get(layer, (None, None))
            if after is output:
                self._raw[layer] = (before, output)

        # Before the graph's own hook, which lets the network continue with a copy, and after that of the layer's activation.
        module = find_layer(self.graph.network, layer)
        module.register_forward_hook(finished, prepend=True)
        for part in module.modules():
            if isinstance(part, _ACTIVATIONS):
                part.register_forward_hook(_record(self._latest, layer), prepend=True)
                if hasattr(part, "inplace"):
                    part.inplace = False

    def _pre_activation(self, layer: str, feature: Tensor, images: Tensor) -> Tensor:
        if layer not in self._raw:
            return feature
        return geometry.wide(self.graph.as_map(self._raw[layer][0], layer, images))


def _record(latest: dict[str, tuple[object, object]], layer: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
    def hook(_module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        latest[layer] = (inputs[0], output)

    return hook


def classifier_weight(network: nn.Module, classes: int, channels: int, layer: str) -> Tensor:
    """The weight [classes, channels] of the network's last linear layer or 1 x 1 convolution from ``channels`` to ``classes``.

    Raises KdxError if there is none: class attention is defined for networks whose logits are a linear function of the last feature.
    """
    for module in reversed(list(network.modules())):
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | nn.Conv2d) and isinstance(weight, Tensor) and weight.flatten(1).shape == (classes, channels):
            return weight.flatten(1)
    raise KdxError(
        f"The network has no linear classifier from the {channels} channels of layer {layer!r} to its {classes} classes.",
        "Name the last layer before the classifier, or choose a method that does not need class maps.",
    )
