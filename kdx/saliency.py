"""Maps from exposed gradients: Grad-CAM and HiResCAM of a class, UniCAM of a layer before the feature layer.

All of them run a graph of gradients (`kdx.export.graphs.GradientGraph`), in PyTorch or as a file in another runtime: images and a
cotangent in, layers' features and gradients out. The cotangent says whose gradient it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdx import arrays, models, unicam
from kdx.arrays import Array
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.kernels import geometry
from kdx.models import Network
from kdx.runner import FileRunner, Runner
from kdx.runtime import EagerRunner, choose, is_file, layer_not_held, open_file, parts
from kdx.unicam import Maps, ObjectiveName, Reference, Weighting

Differentiable = str | Path | Network | nn.Module | Runner
"""A model reference, a path of a file exported with its gradients, a network, a PyTorch module (taken as it is, without
preprocessing), or an open runner of a graph of gradients, which stays open."""

Classes = int | Array | None


@dataclass(frozen=True)
class ClassMaps:
    """Grad-CAM or HiResCAM of one layer and one class an image.

    maps: [n, H, W] >= 0, at feature resolution, before scaling; comparable within one image, not between images.
    weights: [n, C], the mean over h, w of the class's gradient. classes: [n], whose logit each map explains.
    logits: [n, classes].
    """

    maps: Any
    weights: Any
    classes: Any
    logits: Any

    def scaled(self, size: tuple[int, int] | None = None) -> Any:
        """The maps min-max scaled to [0, 1] image by image, resized (bilinear) to ``size`` (H, W) where given."""
        return unicam.scaled(self.maps, size)


def grad_cam(
    network: Differentiable,
    images: Array,
    layer: str | None = None,
    classes: Classes = None,
    *,
    device: str = "auto",
    chunk: int | None = None,
) -> ClassMaps:
    """Where a layer's features, weighted by channel, raise a class's logit.

    With F the layer's feature [n, C, H, W] and y_k the logit of image i's class k,

        a_ic = mean over h, w of dy_k/dF_ichw,        map_i = ReLU(sum_c a_ic F_ic).

    Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017.

    network: a model reference, a path of a file exported with ``--kind gradients``, a `kdx.models.Network`, a PyTorch module
    (taken as it is, without preprocessing), or an open runner of a graph of gradients, which stays open. images: [n, 3, h, w]
    in [0, 1], NumPy or PyTorch. layer: by default the file's or runner's only one, or a network's last one that is worth
    explaining. classes: one for all images, or integers [n]; by default what the network predicts, which takes a pass more.
    device: where a network or file runs, as `kdx.Explainer` takes it. chunk: how many images go through at once (by default
    all, or as many as an engine takes); it changes no result. Tensors come back on the device of the pass.

    A map is no share of the logit: its sum means nothing, and two images' maps have no common scale. Since a gradient is
    averaged over positions before it meets the features, a place can light up that the class does not use; `hires_cam`
    does not average. What lowers the logit is cut off by the ReLU.

    Raises KdxError for no images, a layer or class that is not there, a file or runner without the gradients of the logits,
    features or gradients that are not finite, and a layer that has no gradient at any position of any image.

    >>> import numpy as np, kdx
    >>> images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    >>> found = kdx.grad_cam("kdx:resnet,width=4,depth=1,classes=5", images, "layer3", classes=2)
    >>> found.maps.shape, found.weights.shape, found.scaled((32, 32)).shape
    ((3, 8, 8), (3, 16), (3, 32, 32))
    """
    return _class_maps(network, images, layer, classes, "gap", device, chunk)


def hires_cam(
    network: Differentiable,
    images: Array,
    layer: str | None = None,
    classes: Classes = None,
    *,
    device: str = "auto",
    chunk: int | None = None,
) -> ClassMaps:
    """Where a layer's features raise a class's logit, each position by its own gradient.

    With F the layer's feature [n, C, H, W] and y_k the logit of image i's class k,

        map_ihw = ReLU(sum_c dy_k/dF_ichw F_ichw).

    Source: Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks",
    arXiv 2011.08891 (2020). They define the sum without the ReLU: where one linear layer follows F, it then adds up to the logit
    less its bias. Here the ReLU is taken as in Grad-CAM, so a map shows what raises the logit and not what lowers it.

    Arguments, results and errors are those of `grad_cam`, ``weights`` too, though the map is not made of them. Where a mean
    over positions and one linear layer follow F, both maps are equal. Behind further layers a map is a first-order
    statement: it does not say what the logit would be without a place. Where F is read through a normalisation alone, as the
    blocks of a transformer are, its scale has no influence, so the sum is zero but for rounding, and so is the map: name the
    normalisation that follows (``blocks.11.norm1``), or take `grad_cam`.

    >>> import numpy as np, kdx
    >>> images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    >>> found = kdx.hires_cam("kdx:resnet,width=4,depth=1,classes=5", images, "layer2")
    >>> found.maps.shape, bool((found.classes == found.logits.argmax(1)).all())
    ((3, 16, 16), True)
    """
    return _class_maps(network, images, layer, classes, "elementwise", device, chunk)


def unicam_before(
    network: Differentiable,
    images: Array,
    layer: str,
    explained: Array,
    given: Array,
    target: Array,
    objective: ObjectiveName | Callable[[Tensor], Tensor] = "relevance",
    weighting: Weighting = "gap",
    *,
    at: str | None = None,
    pooled: bool = False,
    reference: Reference | None = None,
    device: str = "auto",
    chunk: int | None = None,
) -> Maps:
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
        placed = unicam.place(explained, given, target, objective, pooled=pooled, reference=reference)
        cotangent = unicam.feature_gradient(placed)
        # Gradients of a score of many distances are small; a network in half precision would lose them.
        largest = cotangent.abs().max().clamp_min(torch.finfo(cotangent.dtype).tiny)
        found = []
        with opened(network, layer, batch, device, at) as (runner, name):
            if _is_of_logits(runner):
                raise KdxError(
                    "The gradients are those of the logits, not of a feature layer.",
                    "Name the feature layer: at, or --at where the file is exported.",
                )
            for part in parts(runner, chunk, len(batch)):
                _, passed = _differentiated(runner, [name], batch[part], cotangent[part] / largest, part)
                feature, gradient = passed[name]
                found.append(_weighed(feature, gradient.double() * largest.to(gradient.device), weighting))
    weights, maps = (arrays.like(torch.cat(pieces), images) for pieces in zip(*found, strict=True))
    return Maps(maps, weights, placed.score)


# ---- one pass ----


def _class_maps(
    network: Differentiable, images: Array, layer: str | None, classes: Classes, weighting: Weighting, device: str, chunk: int | None
) -> ClassMaps:
    batch = arrays.pixels(images)
    found: list[tuple[Tensor, ...]] = []
    reached = False
    with torch.no_grad(), opened(network, layer, batch, device) as (runner, name):
        chosen, count = chosen_classes(runner, batch, classes, chunk)
        for logits, passed in passes(runner, [name], batch, chosen, count, chunk):
            feature, gradient = passed[name]
            found.append((*_weighed(feature, gradient, weighting), logits))
            reached |= bool(gradient.any())
    if not reached:
        raise KdxError(
            f"No position of layer {name!r} has any influence on these classes.",
            "Choose an earlier layer: behind the last block of a transformer, only its class token may be read.",
        )
    weights, maps, logits = (arrays.like(torch.cat(pieces), images) for pieces in zip(*found, strict=True))
    return ClassMaps(maps, weights, arrays.like(chosen, images), logits)


def passes(
    runner: Runner, layers: Sequence[str], images: Tensor, classes: Tensor, count: int, chunk: int | None
) -> Iterator[tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]:
    """(logits, (feature, gradient) a layer) of each part of the images; the gradients are those of their classes' logits."""
    for part in parts(runner, chunk, len(images)):
        cotangent = nn.functional.one_hot(classes[part], count).to(images.dtype)
        yield _differentiated(runner, layers, images[part], cotangent, part)


def _differentiated(
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


def _weighed(feature: Tensor, gradient: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """(channel weights [n, C], maps [n, H, W]) of features and their gradients, both [n, C, H, W]."""
    weights = geometry.gap(gradient)
    maps = geometry.cam(feature, weights) if weighting == "gap" else geometry.elementwise_cam(feature, gradient.flatten(1))
    return weights.to(feature.dtype), maps.to(feature.dtype)


def chosen_classes(runner: Runner, images: Tensor, classes: Classes, chunk: int | None) -> tuple[Tensor, int]:
    """The classes [n] that were asked for, or else that the network predicts; and how many it has."""
    if not _is_of_logits(runner):
        raise KdxError("The gradients are those of a feature layer, not of the logits.", "Export the network without --at.")
    count = _class_count(runner, images)
    if classes is not None:
        return _asked(classes, len(images), count).to(runner.device), count
    return torch.cat([_logits(runner, images[part], count).argmax(1) for part in parts(runner, chunk, len(images))]), count


def _logits(runner: Runner, images: Tensor, count: int) -> Tensor:
    """Logits [n, count] before there is a cotangent, on which they do not depend."""
    if isinstance(runner, FileRunner):
        return runner.run({"images": images, "cotangent": images.new_zeros(len(images), count)})["logits"]
    return _forward(runner, images)


def _forward(runner: Runner, images: Tensor) -> Tensor:
    """Logits by an eager runner's network, without a backward pass."""
    graph = _graph(runner)
    return EagerRunner(FeatureGraph(graph.network, (), graph.preprocessing), runner.device).run({"images": images})["logits"]


def _class_count(runner: Runner, images: Tensor) -> int:
    return int(runner.outputs["logits"][1]) if isinstance(runner, FileRunner) else _forward(runner, images[:1]).shape[1]


def _is_of_logits(runner: Runner) -> bool:
    """Whether the cotangent is at the logits, not at a layer."""
    return len(runner.inputs["cotangent"]) == 2 if isinstance(runner, FileRunner) else _graph(runner).at is None


def _graph(runner: Runner) -> GradientGraph:
    """What an eager runner runs: it alone knows the number of classes and where the cotangent is."""
    graph = runner.graph if isinstance(runner, EagerRunner) else None
    if not isinstance(graph, GradientGraph):
        raise ValueError("the runner is none of kdx's")
    return graph


# ---- what is given ----


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
        raise layer_not_held(name, layer, runner.layers)
    return runner.layers[0] if layer is None else layer


def _last_layer(network: Network, image: Tensor, device: torch.device) -> str:
    """The last layer worth explaining with a gradient: behind the last block of a transformer only the class token may be read."""
    try:
        known = models.layers(network, network.preprocessing.size or (image.shape[2], image.shape[3]))
    except KdxError as error:
        raise KdxError(error.problem, "Name a layer.") from error
    for layer in reversed(known):
        with EagerRunner(GradientGraph(network.module, [layer], network.preprocessing), device) as runner:
            unequal = torch.arange(1.0, 1 + _class_count(runner, image))[None]
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
