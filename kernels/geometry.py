"""Distance geometry and UniCAM in closed form: no backward pass through features, nothing larger than n x n.

Every n x n function takes any number of leading dimensions, so one call serves one batch or a stack of batches. Everything is plain
PyTorch without control flow that depends on the data (except the repair in `distances.py`, which an exported graph leaves out), so the
exported graph is this same code. The definitions are in `reference.py`; the derivation:

    with R the residual, L the objective and E = dL/dR, the gradient with respect to the distances is
        M = U(E - <E,B>/<B,B> B),      U the U-centring, which is linear and its own adjoint (given nothing, R = A and M = U(E)),
    and with W_ij = (M_ij + M_ji)/D_ij off the diagonal, Lap = diag(W 1) - W,
        dL/dX = Lap X,      and, because the spatial mean is linear,      dL/dX averaged over h, w = Lap mean_hw(F).

Matrices are scaled to unit norm first: products of raw norms under- and overflow in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.kernels.distances import EXPONENTS, hollow, parts_per_step

# `geometry` is the name under which callers know these too.
from kdx.kernels.distances import REPAIR_BELOW as REPAIR_BELOW
from kdx.kernels.distances import blocks as blocks
from kdx.kernels.distances import centred_distances as centred_distances
from kdx.kernels.distances import cross_distances as cross_distances
from kdx.kernels.distances import distances as distances
from kdx.kernels.distances import label_distances as label_distances
from kdx.kernels.distances import wide as wide

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(R [..., n, n], unit-norm G [..., n, n]) -> (score [...], dL/dR [..., n, n])."""

_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Elements per step over permutations. On the CPU they stay in the cache, which makes the step eight times as fast; a GPU needs as many as
its memory allows, because each step costs several launches."""


# Centred matrices and their products


def u_centered(d: Tensor) -> Tensor:
    """U-centred distances [..., n, n]: unbiased inner products, zero diagonal, rows that sum to zero. n >= 4."""
    n = d.shape[-1]
    rows = d.sum(-1)
    total = rows.sum(-1)[..., None, None] / ((n - 1) * (n - 2))
    off_diagonal = hollow(n, d)
    return (d - (rows[..., :, None] + rows[..., None, :]) / (n - 2) + total) * off_diagonal


def double_centered(d: Tensor) -> Tensor:
    """Distances [..., n, n] minus row and column means plus the grand mean: the biased (V-statistic) centring."""
    rows = d.mean(-1)
    return d - rows[..., :, None] - rows[..., None, :] + rows.mean(-1)[..., None, None]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_ij A_ij B_ij [...], unnormalised."""
    return (a * b).sum((-2, -1))


def products(matrices: Tensor) -> Tensor:
    """Every inner product <A,B> = sum_{i != j} A_ij B_ij/(n(n-3)) of U-centred matrices [..., k, n, n] -> [..., k, k]."""
    n = matrices.shape[-1]
    flat = matrices.flatten(-2)
    return flat @ flat.mT / (n * (n - 3))


def combined(pairs: Tensor, row_products: Tensor, total_products: Tensor, n: int | Tensor, biased: bool = False) -> Tensor:
    """Inner products of centred matrices from sums over the raw distances of n images: sum_ij D E, sum_i r s and t u, which broadcast.

    <A,B> = (sum D E - 2/(n-2) sum r s + t u/((n-1)(n-2)))/(n(n-3)); biased: the factors of the V-statistic.
    """
    if biased:
        return pairs / n**2 - 2 * row_products / n**3 + total_products / n**4
    return (pairs - 2 * row_products / (n - 2) + total_products / ((n - 1) * (n - 2))) / (n * (n - 3))


def per_step(elements: int, device: torch.device) -> int:
    """How many parts with this many elements each are computed in one step on a device."""
    return max(1, _ELEMENTS.get(device.type, _ELEMENTS["cpu"]) // max(1, elements))


def permuted_products(matrices: Tensor, permuted: Tensor, permutations: Tensor) -> Tensor:
    """<A_k, B_p> for centred matrices [k, n, n] and ``permuted`` B [n, n] with its images permuted: permutations [p, n] -> [p, k].

    Normalised as in `products`; permuting the images of a centred matrix commutes with centring.
    """
    n = permuted.shape[-1]
    flat = matrices.flatten(1).T
    parts = []
    for p in permutations.split(per_step(n * n, matrices.device)):
        rows = permuted.index_select(0, p.flatten()).unflatten(0, p.shape)
        parts.append(rows.gather(2, p[:, None, :].expand(-1, n, -1)).flatten(1) @ flat)
    return torch.cat(parts) / (n * (n - 3))


def permuted_class_products(matrices: Tensor, d: Tensor, classes: Tensor, permutations: Tensor) -> Tensor:
    """`permuted_products` for a target of few classes: its uncentred distances d [n, n], class indices [n] -> [p, k].

    Rows and columns of a centred A sum to zero, so <A,G> = sum_ij A_ij D_ij. With one-hot Z and the distances D_C between classes,
    this is sum (A Z) (Z D_C): each permutation needs a matrix product with n x c instead of a pass over n x n.
    """
    n, count = len(classes), int(classes.max()) + 1
    one_hot = (classes[:, None] == torch.arange(count, device=d.device)).to(d.dtype)
    first = one_hot.argmax(0)
    between = d[first][:, first][classes]
    parts = []
    for p in permutations.split(per_step(n * count, matrices.device)):
        gathered = matrices @ one_hot[p].permute(1, 0, 2).flatten(1)
        parts.append((gathered.unflatten(2, (len(p), count)) * between[p].permute(1, 0, 2)).sum((1, 3)).T)
    return torch.cat(parts) / (n * (n - 3))


def unit(a: Tensor) -> Tensor:
    """A/||A|| in the Frobenius norm."""
    return a / dot(a, a).sqrt()[..., None, None]


def residual(a: Tensor, b: Tensor) -> Tensor:
    """A - (<A,B>/<B,B>) B: the part of A's geometry that B does not explain."""
    b = unit(b)
    return a - dot(a, b)[..., None, None] * b


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """<A,B>/sqrt(<A,A><B,B>) in [-1, 1]."""
    return dot(unit(a), unit(b))


def semipartial(a: Tensor, g: Tensor, given: Tensor) -> Tensor:
    """Correlation of G with the residual of A after ``given``; G itself is not projected."""
    return correlation(residual(a, given), g)


# Objectives: L as a function of the residual, with its derivative


def relevance(r: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """L = <R,G>/sqrt(<R,R><G,G>); dL/dR = (G^ - L R^)/||R|| with unit-norm R^, G^."""
    norm = dot(r, r).sqrt()[..., None, None]
    direction = r / norm
    score = dot(direction, g)
    return score, (g - score[..., None, None] * direction) / norm


def uniqueness(r: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """L = sum_i max_j R_ij; dL/dR is one at each row's first maximum."""
    best, where = r.max(-1)
    return best.sum(-1), torch.zeros_like(r).scatter(-1, where[..., None], 1.0)


OBJECTIVES: dict[str, Objective] = {"relevance": relevance, "uniqueness": uniqueness}


def differentiated(function: Callable[[Tensor], Tensor]) -> Objective:
    """The objective of any differentiable scalar function of R; autograd processes n x n matrices only."""

    def objective(r: Tensor, _g: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = r.detach().requires_grad_()
            score = function(leaf)
            (derivative,) = torch.autograd.grad(score.sum(), leaf)
        return score.detach(), derivative

    return objective


# UniCAM


@dataclass(frozen=True)
class Laplacian:
    """The UniCAM gradient as a matrix, dL/dX = lap X: ``lap`` [..., n, n], ``score`` L [...], ``left`` = ||R||/||D|| [...]."""

    lap: Tensor
    score: Tensor
    left: Tensor


def laplacian(d: Tensor, a: Tensor, b: Tensor | None, g: Tensor, objective: Objective = relevance) -> Laplacian:
    """Lap of the objective for the explained model's distances d and U-centred a, given b, target g, all [..., n, n].

    b: None for given nothing: then R = A. Pairs at distance zero carry no gradient. If ``left`` is near the rounding of distances, the
    given model explains everything, and the score and the gradient mean nothing.
    """
    b, g = None if b is None else unit(b), unit(g)
    r = a if b is None else residual(a, b)
    score, derivative = objective(r, g)
    # The derivative of relevance is a difference of matrices of norm 1/||R|| and L/||R||, and no more exact than they are.
    scale = torch.maximum(dot(derivative, derivative), score.square() / dot(r, r))
    if b is not None:
        derivative = derivative - dot(derivative, b)[..., None, None] * b
    # With four images, one dimension remains besides B, so L is plus or minus a constant. The derivative is then only rounding, but
    # its map would look like a real one. The same happens if R already points along G.
    share = dot(a, a) / dot(r, r)  # R is a difference: the smaller it is compared with A, the larger is its rounding
    rounding = (1e3 * torch.finfo(d.dtype).eps) ** 2 * share * scale
    derivative = torch.where((dot(derivative, derivative) > rounding)[..., None, None], derivative, 0.0)
    m = u_centered(derivative + derivative.mT)
    w = pair_weights(m, d)
    lap = w.sum(-1)[..., None] * (1 - hollow(w.shape[-1], w)) - w
    return Laplacian(lap, score, (dot(r, r) / dot(d, d)).sqrt())


def pair_weights(matrix: Tensor, d: Tensor) -> Tensor:
    """W_ij = M_ij/D_ij of matrices [..., l, n] and distances [l, n] or [..., l, n], and 0 for pairs at distance zero."""
    apart = d > 0
    return torch.where(apart, matrix / torch.where(apart, d, 1.0), 0.0)


def gap(features: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The spatial mean [n, C] of features [n, C, H, W], accumulated in ``dtype``."""
    flat = features.flatten(2)  # one axis: three times as fast as two
    if torch.compiler.is_compiling() or flat.dtype == dtype or flat.device.type != "cpu":
        return flat.mean(2, dtype=dtype)
    images = parts_per_step(len(flat), flat.numel() * dtype.itemsize, flat.device)
    buffer = flat.new_empty(images, *flat.shape[1:], dtype=dtype)
    return torch.cat([buffer[: len(part)].copy_(part).mean(2) for part in flat.split(images)])


def gradient(lap: Tensor, x: Tensor) -> Tensor:
    """Lap x [n, k] for lap [n, n] and rows x [n, k]; for spatial means, these are the channel weights [n, C].

    Lap sends constants to zero, so subtracting the mean over images first only removes rounding. Near-duplicates put large opposite
    numbers into Lap, which cancel well only in float64, the default type of `gap`.
    """
    x = wide(x)
    return lap.to(x.dtype) @ (x - x.mean(0))


def cam(features: Tensor, channel_weights: Tensor) -> Tensor:
    """ReLU(sum_c a_ic F_ic) [n, H, W] for features [n, C, H, W] and weights [n, C]; not scaled."""
    flat = wide(features.flatten(2))
    weighted = channel_weights.to(flat.dtype)[:, None, :] @ flat
    return weighted.reshape(-1, *features.shape[2:]).relu()


def split_exponent(a: Tensor) -> tuple[Tensor, Tensor]:
    """(a', e) with a = 2^e a', for a [n, ...]: e [n] is such that the largest absolute value of each a'_i is near one."""
    bound = EXPONENTS[a.dtype]
    exponent = torch.frexp(a.flatten(1).abs().amax(1)).exponent.clamp(-bound, bound)
    power = torch.ldexp(torch.ones_like(exponent, dtype=a.dtype), -exponent)  # `torch.ldexp` of all of a takes seven times as long
    return a * power.view(-1, *[1] * (a.ndim - 1)), exponent


def times_power(maps: Tensor, exponent: Tensor) -> Tensor:
    """2^e maps, for maps [n, H, W] and exponents [n] or []."""
    return torch.ldexp(maps.double(), exponent.view(-1, 1, 1)).to(maps.dtype)


def elementwise_cam(features: Tensor, gradients: Tensor) -> Tensor:
    """HiRes weighting: ReLU(sum_c (dL/dF_ic) F_ic) [n, H, W] for gradients [n, d] of the flattened features."""
    return (gradients * wide(features.flatten(1))).reshape(features.shape).sum(1).relu()


def scaled(maps: Tensor) -> Tensor:
    """Maps [..., H, W], each min-max scaled to [0, 1]; a constant map becomes zero."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    span = high - low
    return (maps - low) / torch.where(span > 0, span, 1.0)


def symmetric(maps: Tensor) -> Tensor:
    """Signed maps [..., H, W], each divided by its largest absolute value, in [-1, 1]; a map of zeros stays zero."""
    highest = maps.abs().amax((-2, -1), keepdim=True)
    return maps / torch.where(highest > 0, highest, 1.0)


# Reference mode


def bordered(inside: Tensor, border: Tensor) -> Tensor:
    """Distances [q, m+1, m+1] of a reference set (inside [m, m]) with one query (border [q, m]) as the last row of each matrix."""
    q, m = border.shape
    matrix = torch.cat([inside.expand(q, m, m), border[:, :, None]], 2)
    last = torch.cat([border, border.new_zeros(q, 1)], 1)
    return torch.cat([matrix, last[:, None, :]], 1)


def query_gradient(lap: Tensor, queries: Tensor, references: Tensor) -> Tensor:
    """The last row of Lap x [q, k] for lap [q, m+1, m+1], in which each query [q, k] comes after the references [m, k]."""
    queries, references = wide(queries), wide(references)
    centre = references.mean(0)
    row = lap[:, -1].to(queries.dtype)
    return row[:, :-1] @ (references - centre) + row[:, -1:] * (queries - centre)
