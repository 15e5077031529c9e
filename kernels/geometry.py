"""Distance geometry and UniCAM in closed form: no backward pass through features, nothing larger than n x n.

Every n x n function takes any number of leading dimensions, so one call serves one batch or a stack of them. All of
it is plain PyTorch without data-dependent control flow (but for the repair in `distances`, which an exported graph
leaves out), so the exported graph is this same code. The definitions are in `reference.py`; the derivation:

    with R the residual, L the objective and E = dL/dR, the gradient to the distances is
        M = U(E - <E,B>/<B,B> B),      U the U-centring, which is linear and its own adjoint,
    and with W_ij = (M_ij + M_ji)/D_ij off the diagonal, Lap = diag(W 1) - W,
        dL/dX = Lap X,      and, the spatial mean being linear,      dL/dX averaged over h, w = Lap mean_hw(F).

Matrices are brought to unit norm first: products of raw norms under- and overflow in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(R [..., n, n], unit-norm G [..., n, n]) -> (score [...], dL/dR [..., n, n])."""

REPAIR_BELOW = {torch.float32: 1e-3, torch.float64: 1e-9}
"""D^2/(|x_i|^2 + |x_j|^2) under which a Gram product has lost too many digits; its rounding is about 1e-7 and 1e-16."""

_MANY = 0.01
"""Of all pairs. Past this share a Gram product in float64 is quicker than one difference after the other."""

_EQUAL = 1e-14
"""D^2/(|x_i|^2 + |x_j|^2) under which rows of float32 count as equal after a Gram product in float64."""

_TRACED_ZERO = 4e-6
"""The same under which a traced graph, which repairs no pair, takes two rows as equal. The square root of mere rounding, left in
place of zero, would be a thousandth of the norms, and a gradient divides by it."""

_BLOCK = 4096
"""Columns that a Gram product adds up in one go. A float32 sum loses digits as it grows; over 800,000 columns two of them."""

_ELEMENTS = 1 << 24
"""Elements that a step over pairs holds at a time."""

_COPIED = 1 << 20
"""Bytes of features that a step on the CPU copies at a time for each thread, to centre or to widen them. A copy of all would go to new
memory, and the system takes longer to find that than the products take: 3 times as long at n = 128, d = 100,352."""

_CACHED = 1 << 18
"""Elements that a step over permutations holds at a time: what the cache keeps, eight times as fast as what it does not."""


# Distances


def _hollow(n: int, like: Tensor) -> Tensor:
    """Ones [n, n] with a diagonal of zeros. By comparison: TensorRT has no identity matrix of a size that it learns at run time."""
    place = torch.arange(n, device=like.device)
    return (place[:, None] != place[None, :]).to(like.dtype)


def wide(x: Tensor) -> Tensor:
    """Features at the precision of their Gram product: float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def blocks(x: Tensor) -> Tensor:
    """Rows [..., n, d] as [..., blocks, n, columns] of at most _BLOCK columns, with columns of zeros where they do not come out even."""
    d = x.shape[-1]
    if not isinstance(d, int) or d <= _BLOCK:  # a width that a traced graph leaves open is a target's, and small
        return x.unsqueeze(-3)
    least = -(-d // _BLOCK)
    count = next((count for count in range(least, 4 * least) if d % count == 0), least)
    if d % count:
        x = torch.nn.functional.pad(x, (0, -d % count))
    parts: Tensor = x.unflatten(-1, (count, -1)).transpose(-2, -3)
    return parts


def distances(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """D_ij = ||x_i - x_j|| [..., n, n] in ``dtype``, for x [..., n, d] of any floating type.

    The column mean is subtracted first, which cancels most of the Gram product's rounding, and pairs closer than
    rounding are taken by direct difference.
    """
    x = wide(x)
    mean = x.mean(-2, keepdim=True)
    if torch.compiler.is_compiling():
        return _traced_distances(x - mean).to(dtype).sqrt()
    gram = _centred_gram(x, mean)
    norms = gram.diagonal(dim1=-2, dim2=-1)
    d = _squares(gram, x, x, norms, norms, mean).to(dtype).sqrt_()
    return d.triu(1) + d.triu(1).mT


def _traced_distances(x: Tensor) -> Tensor:
    """Squared distances [n, n] of centred rows [n, d] for a graph, which cannot hold the loop over pairs that the data chooses."""
    rows = blocks(x)
    gram = (rows @ rows.mT).sum(-3)
    hollow = _hollow(x.shape[-2], x)
    own = (gram * (1 - hollow)).sum(-1)
    norms = (own[..., :, None] + own[..., None, :]) * hollow
    squared = norms - 2 * gram
    upper = torch.where(squared > _TRACED_ZERO * norms, squared, 0.0).triu(1)
    return upper + upper.mT


def cross_distances(x: Tensor, y: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """||x_i - y_j|| [q, m] for x [q, d] and y [m, d], by the means that `distances` takes."""
    x, y = wide(x), wide(y)
    centre = y.mean(0)
    x, y = x - centre, y - centre
    return centred_distances(x, y, x.square().sum(1), y.square().sum(1), dtype)


def centred_distances(x: Tensor, y: Tensor, x_norms: Tensor, y_norms: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """||x_i - y_j|| [..., q, m] of float32 or float64 rows x [..., q, d] and y [..., m, d], less one centre, and their squared norms.

    Where x is y, an image is at distance zero from itself. Pairs closer than rounding are taken by direct difference; where many
    are, by a Gram product in float64.
    """
    return _squares(_gram(x, y), x, y, x_norms, y_norms).to(dtype).sqrt_()


def _centred_gram(x: Tensor, mean: Tensor) -> Tensor:
    """<x_i - mean, x_j - mean> [..., n, n] of rows [..., n, d] about their mean [..., 1, d], a few blocks of columns at a time."""
    rows, means = blocks(x), blocks(mean)
    step = _step(rows.shape[-3], rows.nbytes, x.device)
    held = torch.empty_like(rows.narrow(-3, 0, step), memory_format=torch.contiguous_format)
    gram = x.new_zeros(*x.shape[:-1], x.shape[-2])
    for part, centre in zip(rows.split(step, -3), means.split(step, -3), strict=True):
        centred = torch.sub(part, centre, out=held.narrow(-3, 0, part.shape[-3]))
        gram += (centred @ centred.mT).sum(-3)
    return gram


def _step(count: int, size: int, device: torch.device) -> int:
    """How many of ``count`` parts, of ``size`` bytes together, a step copies: all on a GPU, whose memory PyTorch keeps."""
    if device.type != "cpu":
        return count
    return min(count, max(1, _COPIED * torch.get_num_threads() * count // max(1, size)))


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_j> [..., q, m] of rows x [..., q, d] and y [..., m, d], a block of columns at a time."""
    rows = blocks(x)
    columns = rows if x is y else blocks(y)
    first, *others = range(rows.shape[-3])
    gram = rows.select(-3, first) @ columns.select(-3, first).mT
    for block in others:
        gram += rows.select(-3, block) @ columns.select(-3, block).mT
    return gram


def _squares(gram: Tensor, x: Tensor, y: Tensor, x_norms: Tensor, y_norms: Tensor, centre: Tensor | float = 0.0) -> Tensor:
    """||x_i - y_j||^2 [..., q, m] from <x_i, y_j> and squared norms of the rows less ``centre``, where that is not done already."""
    squared = _squared(gram, x_norms, y_norms, x is y)
    near = _near(squared, x_norms, y_norms)
    if x.dtype == torch.float32 and len(near[0]) > _MANY * squared.numel():
        left = x.double().sub_(centre)
        right = left if x is y else y.double().sub_(centre)
        x_norms, y_norms = left.square().sum(-1), right.square().sum(-1)
        squared = _squared(_gram(left, right), x_norms, y_norms, x is y)
        # What is closer than this is not told from equal by rows of float32.
        squared[squared < _EQUAL * (x_norms[..., :, None] + y_norms[..., None, :])] = 0
    else:
        *stack, row, column = near
        step = max(1, _ELEMENTS // max(1, x.shape[-1]))
        for start in range(0, len(row), step):
            *at, i, j = (index[start : start + step] for index in (*stack, row, column))
            squared[(*at, i, j)] = (x[(*at, i)] - y[(*at, j)]).square().sum(-1)
    if x is y:
        squared.diagonal(dim1=-2, dim2=-1).zero_()
    return squared.clamp_min_(0)


def _squared(gram: Tensor, x_norms: Tensor, y_norms: Tensor, same: bool) -> Tensor:
    """|x_i|^2 + |y_j|^2 - 2 <x_i, y_j> [..., q, m], infinite where, x being y, an image meets itself."""
    squared = (x_norms[..., :, None] + y_norms[..., None, :]).sub_(gram, alpha=2)
    if same:
        squared.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return squared


def _near(squared: Tensor, x_norms: Tensor, y_norms: Tensor) -> tuple[Tensor, ...]:
    """The indices of pairs whose squared distance [..., q, m] is mostly rounding."""
    share = REPAIR_BELOW[squared.dtype]
    suspect = torch.nonzero(squared.amin(-1) < share * (x_norms + y_norms.amax(-1, keepdim=True)), as_tuple=True)
    *stack, row = suspect
    found, column = torch.nonzero(squared[suspect] < share * (x_norms[suspect][:, None] + y_norms[tuple(stack)]), as_tuple=True)
    return (*(index[found] for index in stack), row[found], column)


# Centred matrices and their products


def u_centered(d: Tensor) -> Tensor:
    """U-centred distances [..., n, n]: unbiased inner products, zero diagonal, rows that sum to zero. n >= 4."""
    n = d.shape[-1]
    rows = d.sum(-1)
    total = rows.sum(-1)[..., None, None] / ((n - 1) * (n - 2))
    hollow = _hollow(n, d)
    return (d - (rows[..., :, None] + rows[..., None, :]) / (n - 2) + total) * hollow


def double_centered(d: Tensor) -> Tensor:
    """Distances [..., n, n] less row and column means plus the grand mean: the biased (V-statistic) centring."""
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


def leave_one_out(d: Tensor, biased: bool = False) -> Tensor:
    """The inner products of distances [k, n, n] with each image left out: [n, k, k], without n centrings.

    By <A,B> = (sum D E - 2/(n-2) sum r s + t u/((n-1)(n-2)))/(n(n-3)), with r, s the row sums of D, E and t, u their totals:
    leaving out image m takes from each of the three sums what m put in. Biased: the factors of the V-statistic.
    """
    n = d.shape[-1]
    rows = d.sum(-1)
    with_m = torch.einsum("ami,bmi->mab", d, d)
    rows_with_m = torch.einsum("ai,bmi->mab", rows, d)
    pairs = torch.einsum("ami,bmi->ab", d, d) - 2 * with_m
    row_products = rows @ rows.T - torch.einsum("am,bm->mab", rows, rows) - rows_with_m - rows_with_m.mT + with_m
    totals = rows.sum(-1)[None] - 2 * rows.T
    total_products = totals[:, :, None] * totals[:, None, :]
    return combined(pairs, row_products, total_products, n - 1, biased)


def combined(pairs: Tensor, row_products: Tensor, total_products: Tensor, n: int | Tensor, biased: bool = False) -> Tensor:
    """Inner products of centred matrices from sums over the raw ones: sum_ij D E, sum_i r s and t u, of n images, broadcast together.

    <A,B> = (sum D E - 2/(n-2) sum r s + t u/((n-1)(n-2)))/(n(n-3)); biased: the factors of the V-statistic.
    """
    if biased:
        return pairs / n**2 - 2 * row_products / n**3 + total_products / n**4
    return (pairs - 2 * row_products / (n - 2) + total_products / ((n - 1) * (n - 2))) / (n * (n - 3))


def permuted_products(matrices: Tensor, permuted: Tensor, permutations: Tensor) -> Tensor:
    """<A_k, B_p> for centred matrices [k, n, n] and ``permuted`` B [n, n] with its images permuted: permutations [p, n] -> [p, k].

    Normalised as in `products`; permuting the images of a centred matrix commutes with centring.
    """
    n = permuted.shape[-1]
    flat = matrices.flatten(1).T
    parts = []
    for p in permutations.split(max(1, _CACHED // (n * n))):
        rows = permuted.index_select(0, p.flatten()).unflatten(0, p.shape)
        parts.append(rows.gather(2, p[:, None, :].expand(-1, n, -1)).flatten(1) @ flat)
    return torch.cat(parts) / (n * (n - 3))


def permuted_class_products(matrices: Tensor, d: Tensor, classes: Tensor, permutations: Tensor) -> Tensor:
    """`permuted_products` for a target of few classes: its uncentred distances d [n, n], class indices [n] -> [p, k].

    Rows and columns of a centred A sum to zero, so <A,G> = sum_ij A_ij D_ij, and with one-hot Z and the distances D_C between
    classes that is sum (A Z) (Z D_C): a matrix product with n x c, in place of a pass over n x n, for each permutation.
    """
    n, count = len(classes), int(classes.max()) + 1
    one_hot = (classes[:, None] == torch.arange(count, device=d.device)).to(d.dtype)
    first = one_hot.argmax(0)
    between = d[first][:, first][classes]
    parts = []
    for p in permutations.split(max(1, _CACHED // (n * count))):
        gathered = matrices @ one_hot[p].permute(1, 0, 2).flatten(1)
        parts.append((gathered.unflatten(2, (len(p), count)) * between[p].permute(1, 0, 2)).sum((1, 3)).T)
    return torch.cat(parts) / (n * (n - 3))


def unit(a: Tensor) -> Tensor:
    """A/||A|| in the Frobenius norm."""
    return a / dot(a, a).sqrt()[..., None, None]


def residual(a: Tensor, b: Tensor) -> Tensor:
    """A - (<A,B>/<B,B>) B: what of A's geometry B does not explain."""
    b = unit(b)
    return a - dot(a, b)[..., None, None] * b


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """<A,B>/sqrt(<A,A><B,B>) in [-1, 1]."""
    return dot(unit(a), unit(b))


def semipartial(a: Tensor, g: Tensor, given: Tensor) -> Tensor:
    """Correlation of G with what of A ``given`` does not explain; G is left whole."""
    return correlation(residual(a, given), g)


def partial(a: Tensor, g: Tensor, given: Tensor) -> Tensor:
    """Partial distance correlation (Szekely and Rizzo 2014): ``given`` is projected out of both A and G."""
    return correlation(residual(a, given), residual(g, given))


# Objectives: L of the residual, with its derivative


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
    """Any differentiable scalar function of R as an objective; autograd sees n x n matrices only."""

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
    """The UniCAM gradient as a matrix: dL/dX = lap X. ``lap`` [..., n, n], ``score`` L [...], ``left`` = ||R||/||D|| [...]."""

    lap: Tensor
    score: Tensor
    left: Tensor


def laplacian(d: Tensor, a: Tensor, b: Tensor, g: Tensor, objective: Objective = relevance) -> Laplacian:
    """Lap of the objective for the explained model's distances d and U-centred a, given b, target g, all [..., n, n].

    Pairs at distance zero carry no gradient. ``left`` near the rounding of distances means that the given model explains
    everything, and then the score and the gradient mean nothing.
    """
    b, g = unit(b), unit(g)
    r = residual(a, b)
    score, derivative = objective(r, g)
    # The derivative of relevance is a difference of matrices of norm 1/||R||, and no more exact than those.
    scale = torch.maximum(dot(derivative, derivative), 1 / dot(r, r))
    derivative = derivative - dot(derivative, b)[..., None, None] * b
    # Four images leave one dimension beside B, and L is then plus or minus a constant: what is left is rounding, and a map of it
    # would look like one. The same happens where R already points along G.
    share = dot(a, a) / dot(r, r)  # R is a difference: the smaller it is beside A, the larger its rounding
    rounding = (1e3 * torch.finfo(d.dtype).eps) ** 2 * share * scale
    derivative = torch.where((dot(derivative, derivative) > rounding)[..., None, None], derivative, 0.0)
    m = u_centered(derivative + derivative.mT)
    apart = d > 0
    w = torch.where(apart, m / torch.where(apart, d, 1.0), 0.0)
    lap = w.sum(-1)[..., None] * (1 - _hollow(w.shape[-1], w)) - w
    return Laplacian(lap, score, (dot(r, r) / dot(d, d)).sqrt())


def gap(features: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The spatial mean [n, C] of features [n, C, H, W], accumulated in ``dtype``."""
    flat = features.flatten(2)  # one axis: three times as fast as two
    if torch.compiler.is_compiling() or flat.dtype == dtype or flat.device.type != "cpu":
        return flat.mean(2, dtype=dtype)
    held = flat.new_empty(_step(len(flat), flat.numel() * dtype.itemsize, flat.device), *flat.shape[1:], dtype=dtype)
    return torch.cat([held[: len(part)].copy_(part).mean(2) for part in flat.split(len(held))])


def gradient(lap: Tensor, x: Tensor) -> Tensor:
    """Lap x [n, k] for lap [n, n] and rows x [n, k]; of spatial means it gives the channel weights [n, C].

    Lap sends constants to zero, so the mean over images is subtracted first, which only removes rounding. Near-duplicates put
    large opposite numbers into Lap, which only float64 cancels well: `gap` gives that by default.
    """
    x = wide(x)
    return lap.to(x.dtype) @ (x - x.mean(0))


def cam(features: Tensor, channel_weights: Tensor) -> Tensor:
    """ReLU(sum_c a_ic F_ic) [n, H, W] for features [n, C, H, W] and weights [n, C]; not scaled."""
    flat = wide(features.flatten(2))
    weighted = channel_weights.to(flat.dtype)[:, None, :] @ flat
    return weighted.reshape(-1, *features.shape[2:]).relu()


def elementwise_cam(features: Tensor, gradients: Tensor) -> Tensor:
    """HiRes weighting: ReLU(sum_c (dL/dF_ic) F_ic) [n, H, W] for gradients [n, d] of the flattened features."""
    return (gradients * wide(features.flatten(1))).reshape(features.shape).sum(1).relu()


def scaled(maps: Tensor) -> Tensor:
    """Maps [..., H, W] min-max scaled to [0, 1] one by one; a constant map becomes zero."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    span = high - low
    return (maps - low) / torch.where(span > 0, span, 1.0)


# Reference mode


def bordered(inside: Tensor, border: Tensor) -> Tensor:
    """Distances [q, m+1, m+1] of a reference set (inside [m, m]) with one query each (border [q, m]) as the last row."""
    q, m = border.shape
    matrix = torch.cat([inside.expand(q, m, m), border[:, :, None]], 2)
    last = torch.cat([border, border.new_zeros(q, 1)], 1)
    return torch.cat([matrix, last[:, None, :]], 1)


def query_gradient(lap: Tensor, queries: Tensor, references: Tensor) -> Tensor:
    """The last row of Lap x [q, k] for lap [q, m+1, m+1], each query [q, k] standing behind the references [m, k]."""
    queries, references = wide(queries), wide(references)
    centre = references.mean(0)
    row = lap[:, -1].to(queries.dtype)
    return row[:, :-1] @ (references - centre) + row[:, -1:] * (queries - centre)
