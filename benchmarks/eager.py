"""What kdx is timed against: the method as it is published, as a careful engineer writes it in PyTorch, and that compiled.

The published method is written out from its description: "On Explaining Knowledge Distillation: Measuring and Visualising the
Knowledge Transfer Process" (Adhane, Dehshibi, Vetter, Masip, Roig; WACV 2025, arXiv 2412.13943). None of kdx's arithmetic is
used, so that an agreement with kdx means something; only a layer's output becomes a feature map [n, C, H, W] by kdx's rule.

Images come as the networks take them, and networks in evaluation mode. An operation in place must not follow the layer: it would
write over the feature that a hook keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kdx.export.graphs import as_map, find_layer


@dataclass(frozen=True)
class Found:
    """One batch explained at one layer.

    distilled, residual: maps [n, H, W] of the student given the base and of the base given the student, min-max scaled to [0, 1]
    image by image and resized to the images. fss: FSS(S,B), how alike the two networks are. rs_distilled, rs_residual: RS(S|B) and
    RS(B|S), the scores that the maps raise.
    """

    distilled: Tensor
    residual: Tensor
    fss: float
    rs_distilled: float
    rs_residual: float


# The formulas that both ways share, on n x n matrices


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
    """R = A - (<A,B>/<B,B>) B: what is left of A without B."""
    return a - _inner(a, b) / _inner(b, b) * b


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """<A,B>/sqrt(<A,A><B,B>)."""
    return _inner(a, b) / (_inner(a, a) * _inner(b, b)).sqrt()


def _scaled(maps: Tensor) -> Tensor:
    """Maps [n, H, W], each less its minimum and over its span; a constant one becomes zero."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


# As published


def published(student: nn.Module, base: nn.Module, layer: str, images: Tensor, target: Tensor) -> Found:
    """Both maps of images [n, c, h, w] for target rows [n, e], a call each, as the method is published.

    A call runs both networks with a hook on the layer, broadcasts the differences of every two images' features, and goes backward
    through the distances and both networks to their parameters (as loaded, they take gradients), to read the gradient that a hook on
    the explained feature saw. Maps are resized one after the other.

    The features d = C H W of both networks make at most five tensors n x n x d at once: the differences of each, and in the backward
    pass of a square the three that it makes. Parameters keep the gradients of the last call.
    """
    distilled, rs_distilled, fss = _hooked_maps(student, base, layer, images, target)
    residual, rs_residual, _ = _hooked_maps(base, student, layer, images, target)
    return Found(distilled, residual, fss.item(), rs_distilled.item(), rs_residual.item())


def published_geometry(explained: Tensor, given: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(channel weights [n, C], RS(explained|given)) of one map as published, from features [n, C, H, W] in place of networks.

    target: rows [n, e]. The backward pass goes to the features of both.
    """
    x, y = (features.detach().requires_grad_() for features in (explained, given))
    score, _ = _broadcast_scores(x, y, target)
    score.backward()
    assert x.grad is not None
    return x.grad.mean((2, 3)), score.detach()


def _hooked_maps(explained: nn.Module, given: nn.Module, layer: str, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One map of each image, RS(explained|given) and FSS, by hooks and a backward pass through both networks."""
    feature, other = (_feature(network, layer, images) for network in (explained, given))
    gradients: list[Tensor] = []
    feature.register_hook(gradients.append)
    score, likeness = _broadcast_scores(feature, other, target)
    for network in (explained, given):
        network.zero_grad()
    score.backward()
    weights = gradients[0].mean((2, 3))
    maps = _scaled((weights[:, :, None, None] * feature.detach()).sum(1).relu())
    size = (images.shape[2], images.shape[3])
    resized = [interpolate(one[None, None], size=size, mode="bilinear", align_corners=False)[0, 0] for one in maps]
    return torch.stack(resized), score.detach(), likeness.detach()


def _feature(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    """The layer's output [n, C, H, W] in a whole forward pass, kept by a hook."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        kept.append(as_map(output, layer, (images.shape[2], images.shape[3])))

    handle = find_layer(network, layer).register_forward_hook(keep)
    try:
        network(images)
    finally:
        handle.remove()
    return kept[-1]


def _broadcast_scores(x: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(RS(x|y), FSS(x,y)) of features [n, C, H, W] and target rows [n, e]."""
    a, b, g = (_u_centred(_broadcast_distances(rows)) for rows in (x.flatten(1), y.flatten(1), target))
    return _correlation(_residual(a, b), g), _correlation(a, b)


def _broadcast_distances(x: Tensor) -> Tensor:
    """||x_i - x_j|| [n, n] of rows [n, d], from n x n x d differences; a root at zero has no gradient, and gets zero."""
    squared = (x[:, None, :] - x[None, :, :]).square().sum(2)
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


# With care


def fair(student: nn.Module, base: nn.Module, layer: str, images: Tensor, target: Tensor) -> Found:
    """`published` with care, and still by autograd: one forward pass of each network without gradients, distances that never hold
    n x n x d (torch.cdist), one backward pass for both maps that ends at the features, and one resize."""
    with torch.no_grad():
        features, others = (_feature(network, layer, images) for network in (student, base))
    return _found(*_careful_maps(features, others, target, (images.shape[2], images.shape[3])))


def fair_geometry(student: Tensor, base: Tensor, target: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(channel weights of the distilled and the residual map, each [n, C]; FSS(S,B), RS(S|B) and RS(B|S) [3]) of features [n, C, H, W].

    Distances once a network, through torch.cdist, and one backward pass for both maps: each objective is differentiated in its
    explained network alone.
    """
    x, y = (features.detach().requires_grad_() for features in (student, base))
    a, b = (_u_centred(_distances(rows)) for rows in (x.flatten(1), y.flatten(1)))
    g = _target_geometry(target)
    distilled, residual = _correlation(_residual(a, b.detach()), g), _correlation(_residual(b, a.detach()), g)
    of_student, of_base = torch.autograd.grad(distilled + residual, (x, y))
    scores = torch.stack([_correlation(a, b), distilled, residual]).detach()
    return (of_student.mean((2, 3)), of_base.mean((2, 3))), scores


def compiled(student: nn.Module, base: nn.Module, layer: str) -> Callable[[Tensor, Tensor], Found]:
    """images, target -> `fair` of them by torch.compile in its default mode: both forward passes and the geometry with its backward
    pass are one graph without a break. The first call compiles, and so does the first one of another batch size.

    PyTorch traces torch.autograd.grad where `torch._dynamo.config.trace_autograd_ops` asks for it, and needs a C++ compiler on a CPU.
    The networks are copied: the hooks that the graph was traced with stay on them.
    """
    networks = copy.deepcopy((student, base))
    kept: list[Tensor] = []
    for network in networks:
        find_layer(network, layer).register_forward_hook(lambda _module, _inputs, output: kept.append(output))

    def whole(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for network in networks:
                network(images)
        size = (images.shape[2], images.shape[3])
        other, feature = (as_map(kept.pop(), layer, size) for _ in networks)
        return _careful_maps(feature, other, target, size)

    graph = torch.compile(whole, fullgraph=True)

    def run(images: Tensor, target: Tensor) -> Found:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return _found(*graph(images, target))

    return run


def _careful_maps(student: Tensor, base: Tensor, target: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Both maps [2, n, h, w] resized to ``size``, and FSS(S,B), RS(S|B) and RS(B|S) [3], of features [n, C, H, W]."""
    weights, scores = fair_geometry(student, base, target)
    maps = [torch.einsum("nc,nchw->nhw", *pair).relu() for pair in zip(weights, (student, base), strict=True)]
    # The two networks' maps may differ in resolution.
    resized = [interpolate(_scaled(each)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0] for each in maps]
    return torch.stack(resized), scores


def _distances(x: Tensor) -> Tensor:
    """||x_i - x_j|| [n, n] of rows [n, d] without n x n x d: past 25 rows by a Gram product, of which the mean is best taken first."""
    x = x - x.mean(0)
    return torch.cdist(x, x).masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)


def _target_geometry(target: Tensor) -> Tensor:
    """The target's U-centred distances [n, n], by differences: rows of one class are equal, and a Gram product would not say so."""
    return _u_centred(torch.cdist(target, target, compute_mode="donot_use_mm_for_euclid_dist"))


def _found(maps: Tensor, scores: Tensor) -> Found:
    """The maps [2, n, h, w] and scores [3] of `_careful_maps` under their names."""
    fss, rs_distilled, rs_residual = scores.tolist()
    return Found(maps[0], maps[1], fss, rs_distilled, rs_residual)
