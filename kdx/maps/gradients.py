"""Maps from exposed gradients: Grad-CAM and HiResCAM of a class, UniCAM of a layer before the feature layer.

All of them run a graph of gradients (`kdx.export.graphs.GradientGraph`), in PyTorch or as a file in another runtime: images and a
cotangent in, layers' features and gradients out. The cotangent says whose gradient it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdx import models
from kdx.choices import Weighting
from kdx.errors import KdxError
from kdx.export.graphs import GradientGraph
from kdx.features import arrays
from kdx.features.arrays import Array
from kdx.kernels import geometry
from kdx.models.network import Network
from kdx.runtimes.choice import choose, is_file, open_file
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.runner import Runner, missing_layer, parts

Differentiable = str | Path | Network | nn.Module | Runner
"""A model reference, a path of a file exported with its gradients, a network, a PyTorch module (taken as it is, without
preprocessing), or an open runner of a graph of gradients, which stays open."""

ClassChoice = int | Array | None


def passes(
    runner: Runner, layers: Sequence[str], images: Tensor, classes: Tensor, count: int, chunk: int | None
) -> Iterator[tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]:
    """(logits, (feature, gradient) a layer) of each part of the images; the gradients are those of their classes' logits."""
    for part in parts(runner, chunk, len(images)):
        cotangent = nn.functional.one_hot(classes[part], count).to(images.dtype)
        yield differentiated(runner, layers, images[part], cotangent, part)


def differentiated(
    runner: Runner, layers: Sequence[str], images: Tensor, cotangent: Tensor, part: slice
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """(logits, (feature, gradient) a layer) of one pass, checked; the images are this part of all."""
    found = runner.run({"images": images, "cotangent": cotangent})
    passed = {layer: (found[layer], found[f"gradient/{layer}"]) for layer in layers}
    for layer, (feature, gradient) in passed.items():
        finite = feature.isfinite().flatten(1).all(1) & gradient.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise KdxError(
                f"The features of layer {layer!r} or their gradients are not finite{rows_text(finite, part.start)}.",
                "Look at those images, and at the network's weights and precision.",
            )
    return found["logits"], passed


def weighed(feature: Tensor, gradient: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """(channel weights [n, C], maps [n, H, W]) of features and their gradients, both [n, C, H, W]."""
    weights = geometry.gap(gradient)
    maps = geometry.cam(feature, weights) if weighting == "gap" else geometry.elementwise_cam(feature, gradient.flatten(1))
    return weights.to(feature.dtype), maps.to(feature.dtype)


def chosen_classes(runner: Runner, images: Tensor, classes: ClassChoice, chunk: int | None) -> tuple[Tensor, int]:
    """The classes [n] that were asked for, or else that the network predicts; and how many it has."""
    if runner.cotangent_layer is not None:
        raise KdxError("The gradients are those of a feature layer, not of the logits.", "Export the network without --at.")
    count = runner.class_count(images)
    if classes is not None:
        return _asked(classes, len(images), count).to(runner.device), count
    return torch.cat([runner.logits(images[part]).argmax(1) for part in parts(runner, chunk, len(images))]), count


@contextmanager
def opened(given: Differentiable, layer: str | None, images: Tensor, device: str, at: str | None = None) -> Iterator[tuple[Runner, str]]:
    """A runner of gradients and the layer to explain; what is opened here is closed here."""
    if isinstance(given, Runner):
        if at is not None or device != "auto":
            raise ValueError("an open runner has its device and the place of its cotangent")
        yield given, _held(given, "The runner", layer)
        return
    if is_file(given):
        if at is not None:
            raise ValueError("a file has the place of its cotangent")
        path = Path(str(given))
        with open_file(path, choose("auto", device, files=True, engines=path.suffix == ".engine")) as runner:
            yield runner, _held(runner, str(path), layer)
        return
    network, chosen = models.as_network(given), choose("eager", device).device
    layer = _last_layer(network, images[:1], chosen) if layer is None else layer
    with EagerRunner(GradientGraph(network.module, [layer], network.preprocessing, at), chosen) as eager:
        yield eager, layer


def _held(runner: Runner, name: str, layer: str | None) -> str:
    """The layer that was asked for, or the only one, of a graph of gradients."""
    if runner.kind != "gradients":
        raise KdxError(f"{name} holds {runner.kind}, and gradients are asked for.", "Export the network with --kind gradients.")
    if layer is None and len(runner.layers) > 1:
        raise KdxError(f"{name} holds several layers.", f"Name one of {', '.join(runner.layers)}.")
    if layer is not None and layer not in runner.layers:
        raise missing_layer(name, layer, runner.layers)
    return runner.layers[0] if layer is None else layer


def _last_layer(network: Network, image: Tensor, device: torch.device) -> str:
    """The last layer worth explaining with a gradient: behind the last block of a transformer only the class token may be read."""
    try:
        known = models.layers(network, network.preprocessing.size or (image.shape[2], image.shape[3]))
    except KdxError as error:
        raise KdxError(error.problem, "Name a layer.") from error
    for layer in reversed(known):
        with EagerRunner(GradientGraph(network.module, [layer], network.preprocessing), device) as runner:
            unequal = torch.arange(1.0, 1 + runner.class_count(image))[None]
            if bool(runner.run({"images": image, "cotangent": unequal})[f"gradient/{layer}"].any()):
                return layer
    raise KdxError("The network has no layer whose output is a feature map that the logits depend on.", "Name a layer.")


def _asked(classes: int | Array, n: int, count: int) -> Tensor:
    """Classes [n], each of them one of ``count``."""
    asked = torch.full((n,), int(classes)) if isinstance(classes, int | np.integer) else arrays.tensor(classes, "classes")
    if asked.ndim != 1 or asked.is_floating_point() or asked.dtype == torch.bool:
        raise KdxError(f"The classes have shape {list(asked.shape)} and type {asked.dtype}.", "Give one integer, or integers [n].")
    arrays.check_same(len(asked), n, "classes", "images")
    outside = (asked < 0) | (asked >= count)
    if bool(outside.any()):
        raise KdxError(f"There is no class {int(asked[outside][0])}: the network has {count}.", f"Give classes from 0 to {count - 1}.")
    return asked.long()


def rows_text(fine: Tensor, start: int = 0) -> str:
    """Which rows are not fine, counted from ``start``, for the end of a sentence."""
    rows = (start + (~fine).nonzero().flatten()).tolist()
    return f" in rows {', '.join(map(str, rows[:5]))}{' ...' if len(rows) > 5 else ''}"
