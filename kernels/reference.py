"""The definitions in float64, in the order of the paper; slow on purpose, and never optimised.

Tests and benchmarks compare with them. Distances come from a broadcast of n x n x d differences and
gradients from autograd through the features, as in the published method: "On Explaining Knowledge Distillation:
Measuring and Visualising the Knowledge Transfer Process" (Adhane, Dehshibi, Vetter, Masip, Roig; WACV 2025,
arXiv 2412.13943). Distance correlation: Szekely and Rizzo, "Partial distance correlation with methods for
dissimilarities", Annals of Statistics 42 (2014).
"""

from __future__ import annotations

import torch
from torch import Tensor


def distances(x: Tensor) -> Tensor:
    """D_ij = ||x_i - x_j|| for rows x [n, d]. The gradient of a distance of zero is zero."""
    squared = (x[:, None, :] - x[None, :, :]).square().sum(-1)
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


def u_centered(d: Tensor) -> Tensor:
    """A_ij = D_ij - r_i/(n-2) - r_j/(n-2) + t/((n-1)(n-2)) off the diagonal, 0 on it. Symmetric D [n, n]."""
    n = d.shape[0]
    rows = d.sum(1)
    a = d - rows[:, None] / (n - 2) - rows[None, :] / (n - 2) + d.sum() / ((n - 1) * (n - 2))
    return a * (1 - torch.eye(n, dtype=d.dtype))


def double_centered(d: Tensor) -> Tensor:
    """D_ij minus the means of its row and its column, plus the grand mean: the biased (V-statistic) centring."""
    return d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean()


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<A,B> = sum_{i != j} A_ij B_ij / (n(n-3)) of U-centred matrices."""
    n = a.shape[0]
    return (a * b).sum() / (n * (n - 3))


def residual(a: Tensor, b: Tensor) -> Tensor:
    """R = A - (<A,B>/<B,B>) B."""
    return a - inner(a, b) / inner(b, b) * b


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """<A,B>/sqrt(<A,A><B,B>), in [-1, 1]; the same for both centrings, since their factors cancel."""
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


def semipartial(a: Tensor, g: Tensor, given: Tensor) -> Tensor:
    """Correlation of A's residual given B with G: only A is projected."""
    return correlation(residual(a, given), g)


def partial(a: Tensor, g: Tensor, given: Tensor) -> Tensor:
    """Partial distance correlation of Szekely and Rizzo: both A and G are projected."""
    return correlation(residual(a, given), residual(g, given))


def uniqueness(r: Tensor) -> Tensor:
    """sum_i max_j R_ij."""
    return r.max(dim=1).values.sum()


def unicam(
    x: Tensor, y: Tensor | None, target: Tensor, objective: str, weighting: str = "gap", pooled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(score, weights [n, C], maps [n, H, W] after ReLU) by autograd through the features x [n, C, H, W].

    weights_ic = mean over h, w of dL/dx_ichw; the map is ReLU(sum_c weights_ic x_ic) or, elementwise (HiRes),
    ReLU(sum_c (dL/dx_ic) x_ic). ``pooled`` measures distances between spatial means instead of whole features.
    y: None for given nothing, where the residual is the U-centred matrix of x itself.
    """
    x = x.double().detach().requires_grad_()
    r = u_centered(distances(x.mean((2, 3)) if pooled else x.flatten(1)))
    if y is not None:
        r = residual(r, u_centered(distances(y.double().mean((2, 3)) if pooled else y.double().flatten(1))))
    score = uniqueness(r) if objective == "uniqueness" else correlation(r, u_centered(distances(target.double())))
    (gradient,) = torch.autograd.grad(score, x)
    weights = gradient.mean((2, 3))
    weighted = gradient * x if weighting == "elementwise" else weights[:, :, None, None] * x
    return score.detach(), weights, weighted.sum(1).relu().detach()


def shares(x: Tensor, g: Tensor) -> Tensor:
    """c_i(p) = sum_j (G_ij/D_ij) |x_i(p) - x_j(p)|^2 [n, P] of features x [n, C, P] and a U-centred G; pairs with D_ij = 0 add nothing.

    D are the distances of x. The sum over i and p is sum_ij D_ij G_ij, the numerator of every score.
    """
    x, g = x.double(), g.double()
    squared = (x[:, None] - x[None, :]).square().sum(2)  # [n, n, P]
    d = squared.sum(2).sqrt()
    w = torch.where(d > 0, g / torch.where(d > 0, d, 1.0), 0.0)
    return (w[:, :, None] * squared).sum(1)


def imputed(image: Tensor, kept: Tensor) -> Tensor:
    """Linear imputation of an image [c, h, w], kept [h, w], by one dense system.

    Every pixel that is not kept is the mean of its neighbours inside the image, with weight 1/6 for the four beside it and 1/12 for
    the four diagonal ones: Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022.
    """
    c, h, w = image.shape
    matrix = torch.eye(h * w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            if kept[y, x]:
                continue
            weights = {
                (v, u): 1 / 12 if v != y and u != x else 1 / 6
                for v in range(max(0, y - 1), min(h, y + 2))
                for u in range(max(0, x - 1), min(w, x + 2))
                if (v, u) != (y, x)
            }
            for (v, u), weight in weights.items():
                matrix[y * w + x, v * w + u] = -weight / sum(weights.values())
    right = torch.where(kept, image.double(), 0.0).reshape(c, h * w)
    solution: Tensor = torch.linalg.solve(matrix, right.T)
    return solution.T.reshape(c, h, w)
