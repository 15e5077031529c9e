"""Shared by all maps from gradients: a runner that exposes gradients, its passes, and the maps of features and their gradients.

A graph of gradients (`kdx.export.graphs.GradientGraph`) runs in PyTorch, or as a file in another runtime. Its inputs are images and a
cotangent, which determines what is differentiated: a class's logit, or a feature layer. Its outputs are the logits, and features and
gradients of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdx import models
from kdx.choices import Weighting
from kdx.data import inputs
from kdx.data.inputs import InputFormat
from kdx.errors import KdxError
from kdx.export.graphs import GradientGraph
from kdx.export.layer_names import output_name
from kdx.features import arrays
from kdx.features.arrays import Array
from kdx.kernels import rounding
from kdx.models.network import Network
from kdx.runtimes.choice import choose, is_file, open_file
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.runner import Runner, missing_layer, parts

Differentiable = str | Path | Network | nn.Module | Runner
"""A model reference, ``MODELS.toml:ROLE``, the path of a file that was exported with gradients, a network, a PyTorch module (used as it is,
without preprocessing), or an open runner of a graph of gradients, which stays open."""

ClassChoice = int | Sequence[int] | Array | None

LogitTarget = Callable[[Tensor], Tensor]
"""What is differentiated in place of a logit: a function from the logits [n, classes] to one value per image [n]."""


class LayerGradient(NamedTuple):
    """A layer's feature and the gradient with respect to it, both [n, C, H, W]. dtype: the type in which the network computed them."""

    feature: Tensor
    gradient: Tensor
    dtype: torch.dtype

    def maps(self, weighting: Weighting) -> tuple[Tensor, Tensor]:
        """(channel weights [n, C], maps [n, H, W]): ReLU(sum_c w_ic F_ic) with w the mean gradient, or each position's own.

        Weights and maps that are only rounding are zero.
        """
        weights, maps = rounding.class_maps(self.feature, self.gradient, weighting == "elementwise", self.dtype)
        return weights.to(self.feature.dtype), maps.to(self.feature.dtype)


def class_gradients(
    runner: Runner, layers: Sequence[str], images: Tensor, cotangents: Tensor, chunk: int | None
) -> Iterator[tuple[Tensor, dict[str, LayerGradient]]]:
    """(logits, each layer's feature and gradient) for one part of the images after another.

    The gradients are those of sum_k c_ik y_ik, with y the logits and c the cotangents [n, classes].
    """
    for part in parts(runner, chunk, len(images)):
        yield layer_gradients(runner, layers, images[part], cotangents[part].to(images.dtype), part.start)


def layer_gradients(
    runner: Runner, layers: Sequence[str], images: Tensor, cotangent: Tensor, first: int
) -> tuple[Tensor, dict[str, LayerGradient]]:
    """(logits, each layer's feature and gradient) of one pass. Raises KdxError for values that are not finite.

    first: the row of the first of these images among all images, for the message.
    """
    outputs = runner.run({"images": images, "cotangent": cotangent})
    gradients = {layer: LayerGradient(outputs[output_name(layer)], outputs[f"gradient/{layer}"], runner.dtype) for layer in layers}
    check_gradients(gradients, first)
    return outputs["logits"], gradients


def check_gradients(gradients: Mapping[str, LayerGradient], first: int = 0) -> None:
    """Raise KdxError for values that are not finite. first: the row of the first image among all images, for the message."""
    for layer, (feature, gradient, _) in gradients.items():
        finite = feature.isfinite().flatten(1).all(1) & gradient.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise KdxError(
                f"The features of layer {layer!r} or their gradients are not finite {arrays.rows_text(~finite, first)}.",
                "Look at those images, and at the network's weights and precision.",
            )


def explained_classes(
    runner: Runner, images: Tensor, classes: ClassChoice, target: LogitTarget | None, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """The classes [n] to explain, by default those that the network predicts, and the cotangents [n, classes] of the logits.

    The cotangents are one at the class to explain, or the derivatives of ``target``.
    """
    if classes is not None and target is not None:
        raise ValueError("give classes or a target, not both")
    if runner.cotangent_layer is not None:
        raise KdxError("The gradients are those of a feature layer, not of the logits.", "Export the network without --at.")
    count = runner.class_count(images)
    if classes is not None:
        chosen = checked_classes(classes, len(images), count).to(runner.device)
        return chosen, nn.functional.one_hot(chosen, count)
    logits = torch.cat([runner.logits(images[part]) for part in parts(runner, chunk, len(images))])
    chosen = logits.argmax(1)
    return chosen, nn.functional.one_hot(chosen, count) if target is None else derivatives(target, logits)


def derivatives(target: LogitTarget, logits: Tensor) -> Tensor:
    """The derivatives [n, classes] of the target of each image by its logits. Raises KdxError for a target that is not one per image."""
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        values = target(leaf)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1] or not values.requires_grad:
            shape = f"a tensor of shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise KdxError(
                f"The target gives {shape} for logits of shape {list(logits.shape)}, or one that does not depend on them.",
                "Give a differentiable function from logits [n, classes] to one value per image [n].",
            )
        (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
    if gradient is None or not bool(gradient.isfinite().all()):
        raise KdxError("The target has no finite derivative by the logits.", "Give a differentiable function of the logits.")
    return gradient


def class_probability(classes: Tensor) -> LogitTarget:
    """The softmax of each image's class [n], as a target."""
    return lambda logits: logits.softmax(1).gather(1, classes[:, None].to(logits.device))[:, 0]


@contextmanager
def gradient_runner(
    source: Differentiable, layer: str | None, images: Any, device: str, at: str | None = None
) -> Iterator[tuple[Runner, str, Tensor]]:
    """A runner with gradients, the layer to explain, and the images (`kdx.data.as_pixels`) [n, 3, h, w] that it takes.

    A runner that is opened here is closed at the end.
    """
    if isinstance(source, Runner):
        if at is not None or device != "auto":
            raise ValueError("an open runner already has a device and a layer for its cotangent; do not give device or at")
        yield source, _layer_of(source, "The runner", layer), _pixels(source, images)
        return
    if is_file(source):
        if at is not None:
            raise ValueError("an exported file already has a layer for its cotangent; do not give at")
        path = Path(str(source))
        with open_file(path, choose("auto", device, files=True, engines=path.suffix == ".engine")) as runner:
            yield runner, _layer_of(runner, str(path), layer), _pixels(runner, images)
        return
    network, chosen = models.as_network(source), choose("eager", device).device
    batch = inputs.as_pixels(images, InputFormat.of([network.preprocessing]))
    layer = _last_layer(network, batch[:1], chosen) if layer is None else layer
    with EagerRunner(GradientGraph(network.module, [layer], network.preprocessing, at), chosen) as eager:
        yield eager, layer, batch


def _pixels(runner: Runner, images: Any) -> Tensor:
    return inputs.as_pixels(images, InputFormat.of(runner.preprocessing, [runner.image_size]))


def _layer_of(runner: Runner, name: str, layer: str | None) -> str:
    """The named layer of a graph of gradients, or its only one."""
    if runner.kind != "gradients":
        raise KdxError(f"{name} contains {runner.kind}, not gradients.", "Export the network with --kind gradients.")
    if layer is None and len(runner.layers) > 1:
        raise KdxError(f"{name} contains several layers.", f"Name one of {', '.join(runner.layers)}.")
    if layer is not None and layer not in runner.layers:
        raise missing_layer(name, layer, runner.layers)
    return runner.layers[0] if layer is None else layer


def _last_layer(network: Network, image: Tensor, device: torch.device) -> str:
    """The last layer whose feature map has a gradient: after the last block of a transformer, the head may read only the class token."""
    try:
        known = models.layers(network, network.preprocessing.size or (image.shape[2], image.shape[3]))
    except KdxError as error:
        raise KdxError(error.problem, "Name a layer.") from error
    for layer in reversed(known):
        with EagerRunner(GradientGraph(network.module, [layer], network.preprocessing), device) as runner:
            unequal = torch.arange(1, 1 + runner.class_count(image), dtype=torch.float32)[None]
            if bool(runner.run({"images": image, "cotangent": unequal})[f"gradient/{layer}"].any()):
                return layer
    raise KdxError("The network has no layer whose output is a feature map that the logits depend on.", "Name a layer.")


def checked_classes(classes: int | Sequence[int] | Array, n: int, count: int) -> Tensor:
    """Classes [n], each from 0 to ``count`` - 1."""
    if isinstance(classes, int | np.integer):
        values = torch.full((n,), int(classes))
    else:
        values = arrays.tensor(np.asarray(classes) if isinstance(classes, Sequence) else classes, "classes")
    if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise KdxError(f"The classes have shape {list(values.shape)} and type {values.dtype}.", "Give one integer, or integers [n].")
    arrays.check_same(len(values), n, "classes", "images")
    outside = (values < 0) | (values >= count)
    if bool(outside.any()):
        raise KdxError(
            f"There is no class {int(values[outside][0])}: the network has {count} classes.", f"Give classes from 0 to {count - 1}."
        )
    return values.long()
