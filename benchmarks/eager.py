"""The baselines of kdx: the method as it is published, as a careful engineer writes it in PyTorch, and the latter compiled.

The published method is implemented from its description: "On Explaining Knowledge Distillation: Measuring and Visualising the
Knowledge Transfer Process" (Adhane, Dehshibi, Vetter, Masip, Roig; WACV 2025, arXiv 2412.13943). It does not use the arithmetic of kdx,
so that its agreement with kdx is evidence; only the rule that turns a layer's output into a feature map [n, C, H, W] is kdx's.

Images must be normalised for the networks, and the networks must be in evaluation mode. No in-place operation may follow the layer: it
would overwrite the feature that a hook stores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kdx.export.graphs import FeatureGraph
from kdx.export.layer_names import find_layer
from kdx.export.layouts import decisions_of
from kdx.features.layout import Layout


@dataclass(frozen=True)
class EagerResult:
    """One batch explained at one layer.

    distilled, residual: maps [n, H, W] of the student given the base and of the base given the student, min-max scaled to [0, 1] per
    image and resized to the images. fss: FSS(S,B), the similarity of the two networks. rs_distilled, rs_residual: RS(S|B) and RS(B|S),
    the scores whose gradients the maps show.
    """

    distilled: Tensor
    residual: Tensor
    fss: float
    rs_distilled: float
    rs_residual: float


# ---- formulas on n x n matrices, shared by both implementations ----


def _u_centred(d: Tensor) -> Tensor:
    """A_ij = D_ij - r_i/(n-2) - r_j/(n-2) + t/((n-1)(n-2)) off the diagonal, 0 on it, of symmetric distances [n, n]."""
    n = len(d)
    rows = d.sum(1)
    a = d - rows[:, None] / (n - 2) - rows[None, :] / (n - 2) + d.sum() / ((n - 1) * (n - 2))
    return a.masked_fill(torch.eye(n, dtype=torch.bool, device=d.device), 0)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """<A,B> = sum_{i != j} A_ij B_ij / (n(n-3))."""
    n = len(a)
    return (a * b).sum() / (n * (n - 3))


def _residual(a: Tensor, b: Tensor) -> Tensor:
    """R = A - (<A,B>/<B,B>) B: the part of A that B does not explain."""
    return a - _inner(a, b) / _inner(b, b) * b


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """<A,B>/sqrt(<A,A><B,B>)."""
    return _inner(a, b) / (_inner(a, a) * _inner(b, b)).sqrt()


def _scaled(maps: Tensor) -> Tensor:
    """Maps [n, H, W], each min-max scaled to [0, 1]. A constant map becomes zero."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


# ---- the published method ----


def published(student: nn.Module, base: nn.Module, layer: str, images: Tensor, target: Tensor) -> EagerResult:
    """Both maps of images [n, c, h, w] for target rows [n, e] as the method is published, with one call per map.

    A call runs both networks with a hook on the layer and broadcasts the differences of the features of every two images. It then goes
    backward through the distances and both networks to their parameters, which require gradients as loaded, and reads the gradient that
    a hook on the explained feature received. Maps are resized one after the other.

    With d = C H W features per image, at most five tensors n x n x d exist at once: the differences of each network, and three that the
    backward pass of a square creates. The parameters keep the gradients of the last call.
    """
    distilled, rs_distilled, fss = _hooked_maps(student, base, layer, images, target)
    residual, rs_residual, _ = _hooked_maps(base, student, layer, images, target)
    return EagerResult(distilled, residual, fss.item(), rs_distilled.item(), rs_residual.item())


def published_geometry(explained: Tensor, given: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(channel weights [n, C], RS(explained|given)) of one map as published, from features [n, C, H, W] instead of networks.

    target: rows [n, e]. The backward pass goes to the features of both networks.
    """
    x, y = (features.detach().requires_grad_() for features in (explained, given))
    score, _ = _broadcast_scores(x, y, target)
    score.backward()
    assert x.grad is not None
    return x.grad.mean((2, 3)), score.detach()


def _hooked_maps(explained: nn.Module, given: nn.Module, layer: str, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One map per image, RS(explained|given) and FSS, by hooks and a backward pass through both networks."""
    feature, other = (_feature(network, layer, images) for network in (explained, given))
    gradients: list[Tensor] = []
    feature.register_hook(gradients.append)
    score, fss = _broadcast_scores(feature, other, target)
    for network in (explained, given):
        network.zero_grad()
    score.backward()
    weights = gradients[0].mean((2, 3))
    maps = _scaled((weights[:, :, None, None] * feature.detach()).sum(1).relu())
    size = (images.shape[2], images.shape[3])
    resized = [interpolate(single[None, None], size=size, mode="bilinear", align_corners=False)[0, 0] for single in maps]
    return torch.stack(resized), score.detach(), fss.detach()


def _feature(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    """The layer's output [n, C, H, W] in a whole forward pass, stored by a hook."""
    features: list[Tensor] = []
    layout = _layout(network, layer, (images.shape[2], images.shape[3]))

    def store(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        features.append(layout.as_map(output))

    handle = find_layer(network, layer).register_forward_hook(store)
    try:
        network(images)
    finally:
        handle.remove()
    return features[-1]


def _layout(network: nn.Module, layer: str, size: tuple[int, int]) -> Layout:
    """The layout of the layer's output, which is decided at the first call."""
    decisions = decisions_of(network)
    if (layer, size) not in decisions:
        FeatureGraph(network, [layer]).decide_for(size)
    return decisions[layer, size].layout


def _broadcast_scores(x: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(RS(x|y), FSS(x,y)) of features [n, C, H, W] and target rows [n, e]."""
    a, b, g = (_u_centred(_broadcast_distances(rows)) for rows in (x.flatten(1), y.flatten(1), target))
    return _correlation(_residual(a, b), g), _correlation(a, b)


def _broadcast_distances(x: Tensor) -> Tensor:
    """||x_i - x_j|| [n, n] of rows [n, d], from n x n x d differences. The root has no gradient at zero; it is set to zero there."""
    squared = (x[:, None, :] - x[None, :, :]).square().sum(2)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)


# ---- a careful implementation ----


def fair(student: nn.Module, base: nn.Module, layer: str, images: Tensor, target: Tensor) -> EagerResult:
    """The same as `published`, written with care and still by autograd.

    It runs each network once without gradients, takes distances by torch.cdist, which creates no n x n x d tensor, goes backward once
    for both maps and only to the features, and resizes once.
    """
    with torch.no_grad():
        student_features, base_features = (_feature(network, layer, images) for network in (student, base))
    return _explanation(*_careful_maps(student_features, base_features, target, (images.shape[2], images.shape[3])))


def fair_geometry(student: Tensor, base: Tensor, target: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(channel weights of the distilled and the residual map, each [n, C]; FSS(S,B), RS(S|B) and RS(B|S) [3]) of features [n, C, H, W].

    Distances are computed once per network by torch.cdist. One backward pass serves both maps: each objective is differentiated with
    respect to its explained network only.
    """
    x, y = (features.detach().requires_grad_() for features in (student, base))
    a, b = (_u_centred(_distances(rows)) for rows in (x.flatten(1), y.flatten(1)))
    g = _target_geometry(target)
    distilled, residual = _correlation(_residual(a, b.detach()), g), _correlation(_residual(b, a.detach()), g)
    of_student, of_base = torch.autograd.grad(distilled + residual, (x, y))
    scores = torch.stack([_correlation(a, b), distilled, residual]).detach()
    return (of_student.mean((2, 3)), of_base.mean((2, 3))), scores


def compiled(student: nn.Module, base: nn.Module, layer: str) -> Callable[[Tensor, Tensor], EagerResult]:
    """A function of images and target that computes `fair` by torch.compile in its default mode, for a layer that returns [n, C, H, W].

    Both forward passes and the geometry with its backward pass are one graph without a break. The first call compiles, and so does the
    first call with another batch size. PyTorch traces torch.autograd.grad only with `torch._dynamo.config.trace_autograd_ops`, and needs
    a C++ compiler on a CPU. The networks are copied because the hooks that the graph was traced with stay on them.
    """
    networks = copy.deepcopy((student, base))
    outputs: list[Tensor] = []
    for network in networks:
        find_layer(network, layer).register_forward_hook(lambda _module, _inputs, output: outputs.append(output))

    def whole(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for network in networks:
                network(images)
        size = (images.shape[2], images.shape[3])
        base_features, student_features = (outputs.pop() for _ in networks)
        return _careful_maps(student_features, base_features, target, size)

    graph = torch.compile(whole, fullgraph=True)

    def run(images: Tensor, target: Tensor) -> EagerResult:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return _explanation(*graph(images, target))

    return run


def _careful_maps(student: Tensor, base: Tensor, target: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Both maps [2, n, h, w] resized to ``size``; FSS(S,B), RS(S|B) and RS(B|S) [3]. The features are [n, C, H, W]."""
    weights, scores = fair_geometry(student, base, target)
    maps = [torch.einsum("nc,nchw->nhw", *pair).relu() for pair in zip(weights, (student, base), strict=True)]
    # The two networks' maps may differ in resolution.
    resized = [interpolate(_scaled(unscaled)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0] for unscaled in maps]
    return torch.stack(resized), scores


def _distances(x: Tensor) -> Tensor:
    """||x_i - x_j|| [n, n] of rows [n, d] without a tensor n x n x d.

    Above 25 rows torch.cdist uses a Gram product, which is more accurate after the mean is subtracted.
    """
    x = x - x.mean(0)
    return torch.cdist(x, x).masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)


def _target_geometry(target: Tensor) -> Tensor:
    """The target's U-centred distances [n, n], by differences: a Gram product would round the zero distance of equal rows."""
    return _u_centred(torch.cdist(target, target, compute_mode="donot_use_mm_for_euclid_dist"))


def _explanation(maps: Tensor, scores: Tensor) -> EagerResult:
    """The maps [2, n, h, w] and scores [3] of `_careful_maps` under their names."""
    fss, rs_distilled, rs_residual = scores.tolist()
    return EagerResult(maps[0], maps[1], fss, rs_distilled, rs_residual)
