"""Pairwise Euclidean distances from Gram products, with a repair of the pairs for which a Gram product loses too many digits.

All functions are plain PyTorch and take any number of leading dimensions. Only the repair depends on the data; an exported graph
leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import frexp, isfinite

import torch
from torch import Tensor

REPAIR_BELOW = {torch.float32: 1e-3, torch.float64: 1e-9}
"""D^2/(|x_i|^2 + |x_j|^2) below which a Gram product has lost too many digits; its rounding is about 1e-7 and 1e-16."""

_MANY = 0.01
"""The share of all pairs above which a Gram product in float64 is faster than single differences."""

_EQUAL = 1e-14
"""D^2/(|x_i|^2 + |x_j|^2) below which float32 rows count as equal after a Gram product in float64."""

_TRACED_ZERO = 4e-6
"""The same bound for a traced graph, which repairs no pair. Without it, the square root of mere rounding would be a thousandth of the
norms in place of zero, and a gradient divides by it."""

ORDINARY = {torch.float32: (2.0**-30, 2.0**50), torch.float64: (2.0**-400, 2.0**400)}
"""The largest distance of a matrix lies in this range if the squares that it is made of keep all their digits."""

EXPONENTS = {torch.float32: 126, torch.float64: 1022}
"""The largest exponents of a type's powers of two."""

_BLOCK = 4096
"""Columns that one Gram product sums over. A float32 sum loses digits as it grows: two digits over 800,000 columns."""

_WHOLE = 128
"""Up to this many rows, a product of rows with themselves is one product on the CPU. More rows are halved, because half of the product
follows by symmetry."""

_ELEMENTS = 1 << 24
"""The most elements that one step over pairs keeps in memory."""

_COPIED = 1 << 20
"""Bytes of features that a step on the CPU copies per thread, to centre or to widen them. A copy of all features would go to new
memory, and the system takes longer to provide that than the products take: 3 times as long at n = 128, d = 100,352."""


def wide(x: Tensor) -> Tensor:
    """Features at the precision of their Gram product: float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def power_of_two(largest: float, dtype: torch.dtype) -> float:
    """The power of two that brings the largest absolute value of features near one; 1 if that value is zero or not finite."""
    if not isfinite(largest) or largest == 0:
        return 1.0
    bound = EXPONENTS[dtype]
    return 2.0 ** min(max(1 - frexp(largest)[1], -bound), bound)


def ordinary(largest: Tensor, dtype: torch.dtype) -> bool:
    """Whether squares of ``dtype`` are exact enough for distances of which this [...] contains the largest."""
    low, high = ORDINARY[dtype]
    return not largest.numel() or low <= float(largest.amax()) <= high  # in this form NaN fails


def of_any_magnitude(measure: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """The distances measure(*rows), in float64, of float32 or float64 rows of any magnitude.

    The squares of very small or large features under- or overflow. Such rows are multiplied by one power of two, and their distances
    divided by it, both of which are exact.
    """
    d = measure(*rows)
    if ordinary(d, rows[0].dtype):
        return d
    factor = power_of_two(max(float(torch.linalg.vector_norm(x, torch.inf)) for x in rows), rows[0].dtype)
    return measure(*(x * factor for x in rows)) / factor


def hollow(n: int, like: Tensor) -> Tensor:
    """Ones [n, n] with a diagonal of zeros.

    Made by a comparison, because TensorRT has no identity matrix whose size is known only at run time.
    """
    place = torch.arange(n, device=like.device)
    return (place[:, None] != place[None, :]).to(like.dtype)


def blocks(x: Tensor) -> Tensor:
    """Rows [..., n, d] as [..., blocks, n, columns] of at most _BLOCK columns, padded with columns of zeros if d cannot be divided."""
    d = x.shape[-1]
    if not isinstance(d, int) or d <= _BLOCK:  # a width that a traced graph leaves open is the width of a target, and small
        return x.unsqueeze(-3)
    least = -(-d // _BLOCK)
    count = next((count for count in range(least, 4 * least) if d % count == 0), least)
    if d % count:
        x = torch.nn.functional.pad(x, (0, -d % count))
    parts: Tensor = x.unflatten(-1, (count, -1)).transpose(-2, -3)
    return parts


def parts_per_step(count: int, size: int, device: torch.device) -> int:
    """How many of ``count`` parts, of ``size`` bytes together, a step copies: all of them on a GPU, whose memory PyTorch reuses."""
    if device.type != "cpu":
        return count
    return min(count, max(1, _COPIED * torch.get_num_threads() * count // max(1, size)))


def distances(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """D_ij = ||x_i - x_j|| [..., n, n] in ``dtype``, for x [..., n, d] of any floating type.

    The column mean is subtracted first, which cancels most of the Gram product's rounding. Pairs closer than rounding are
    measured by direct difference.
    """
    x = wide(x)
    if torch.compiler.is_compiling():
        return _traced_squares(x - x.mean(-2, keepdim=True)).to(dtype).sqrt()
    return of_any_magnitude(_distances, x).to(dtype)


def _distances(x: Tensor) -> Tensor:
    mean = x.mean(-2, keepdim=True)
    return distances_of_gram(_centred_gram(x, mean), x, mean)


def distances_of_gram(gram: Tensor, x: Tensor, mean: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """`distances` of float32 or float64 rows x [..., n, d], from <x_i - mean, x_j - mean> [..., n, n] and their mean [..., 1, d]."""
    norms = gram.diagonal(dim1=-2, dim2=-1)
    d = _squares(gram, x, x, norms, norms, mean).to(dtype).sqrt_()
    return d.triu(1) + d.triu(1).mT


def cross_distances(x: Tensor, y: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """||x_i - y_j|| [q, m] for x [q, d] and y [m, d], computed as in `distances`."""
    return of_any_magnitude(_cross_distances, wide(x), wide(y)).to(dtype)


def label_distances(rows: Tensor, columns: Tensor, out: Tensor | None = None) -> Tensor:
    """||e_i - e_j|| [..., q, m] in float64 between the one-hot rows of labels ``rows`` [..., q] and ``columns`` [..., m]: 0 or sqrt(2)."""
    if out is None:
        out = torch.empty(*rows.shape, columns.shape[-1], dtype=torch.float64, device=rows.device)
    return torch.ne(rows[..., :, None], columns[..., None, :], out=out).mul_(2**0.5)


def _cross_distances(x: Tensor, y: Tensor) -> Tensor:
    centre = y.mean(0)
    x, y = x - centre, y - centre
    return centred_distances(x, y, x.square().sum(1), y.square().sum(1))


def centred_distances(x: Tensor, y: Tensor, x_norms: Tensor, y_norms: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """||x_i - y_j|| [..., q, m] of float32 or float64 rows x [..., q, d] and y [..., m, d], minus one centre, with their squared norms.

    If x is y, each image is at distance zero from itself. Pairs closer than rounding are measured by direct difference; if there are
    many of them, by a Gram product in float64. A traced graph repairs no pair; it takes such pairs as equal, as in `distances`.
    """
    if torch.compiler.is_compiling():
        norms = x_norms[..., :, None] + y_norms[..., None, :]
        squared = norms - 2 * (blocks(x) @ blocks(y).mT).sum(-3)
        return torch.where(squared > _TRACED_ZERO * norms, squared, 0.0).to(dtype).sqrt()
    return _squares(_gram(x, y), x, y, x_norms, y_norms).to(dtype).sqrt_()


def _traced_squares(x: Tensor) -> Tensor:
    """Squared distances [n, n] of centred rows [n, d] for a graph, which cannot contain a loop over pairs that the data chooses."""
    rows = blocks(x)
    gram = (rows @ rows.mT).sum(-3)
    off_diagonal = hollow(x.shape[-2], x)
    own = (gram * (1 - off_diagonal)).sum(-1)
    norms = (own[..., :, None] + own[..., None, :]) * off_diagonal
    squared = norms - 2 * gram
    upper = torch.where(squared > _TRACED_ZERO * norms, squared, 0.0).triu(1)
    return upper + upper.mT


def _centred_gram(x: Tensor, mean: Tensor) -> Tensor:
    """<x_i - mean, x_j - mean> [..., n, n] of rows [..., n, d] about their mean [..., 1, d], a few blocks of columns at a time."""
    rows, means = blocks(x), blocks(mean)
    step = parts_per_step(rows.shape[-3], rows.nbytes, x.device)
    buffer = torch.empty_like(rows.narrow(-3, 0, step), memory_format=torch.contiguous_format)
    gram = x.new_zeros(*x.shape[:-1], x.shape[-2])
    for part, centre in zip(rows.split(step, -3), means.split(step, -3), strict=True):
        centred = torch.sub(part, centre, out=buffer.narrow(-3, 0, part.shape[-3]))
        gram += (centred @ centred.mT).sum(-3)
    return gram


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_j> [..., q, m] of rows x [..., q, d] and y [..., m, d], a block of columns at a time."""
    if x is y and x.ndim == 2 and x.device.type == "cpu":
        return _symmetric_gram(x)
    return _blockwise_gram(x, y)


def _blockwise_gram(x: Tensor, y: Tensor) -> Tensor:
    rows = blocks(x)
    columns = rows if x is y else blocks(y)
    first, *others = range(rows.shape[-3])
    gram = rows.select(-3, first) @ columns.select(-3, first).mT
    for block in others:
        gram += rows.select(-3, block) @ columns.select(-3, block).mT
    return gram


def _symmetric_gram(x: Tensor) -> Tensor:
    """<x_i, x_j> [n, n] of rows x [n, d]. Each half of the rows is multiplied with the other half once.

    The result is symmetric to the last bit. Not every processor's product of a matrix with itself is.
    """
    if len(x) <= _WHOLE:
        gram = _blockwise_gram(x, x)
        return gram.triu() + gram.triu(1).mT
    upper, lower = x.tensor_split(2)
    gram = x.new_empty(len(x), len(x))
    middle = len(upper)
    for rows, place in ((upper, slice(middle)), (lower, slice(middle, None))):
        gram[place, place] = _symmetric_gram(rows)
    across = _blockwise_gram(upper, lower)
    gram[:middle, middle:], gram[middle:, :middle] = across, across.T
    return gram


def _squares(gram: Tensor, x: Tensor, y: Tensor, x_norms: Tensor, y_norms: Tensor, centre: Tensor | float = 0.0) -> Tensor:
    """||x_i - y_j||^2 [..., q, m] from <x_i, y_j> and squared norms of the rows minus ``centre``.

    The Gram product and the norms are those of centred rows; ``centre`` is what x and y themselves still contain.
    """
    squared = _squared(gram, x_norms, y_norms, x is y)
    near = _near(squared, x_norms, y_norms)
    if x.dtype == torch.float32 and len(near[0]) > _MANY * squared.numel():
        left = x.double().sub_(centre)
        right = left if x is y else y.double().sub_(centre)
        x_norms, y_norms = left.square().sum(-1), right.square().sum(-1)
        squared = _squared(_gram(left, right), x_norms, y_norms, x is y)
        # Float32 rows that are closer than this cannot be distinguished from equal rows.
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
    """|x_i|^2 + |y_j|^2 - 2 <x_i, y_j> [..., q, m]; infinite on the diagonal if x and y are the ``same`` rows."""
    squared = (x_norms[..., :, None] + y_norms[..., None, :]).sub_(gram, alpha=2)
    if same:
        squared.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return squared


def _near(squared: Tensor, x_norms: Tensor, y_norms: Tensor) -> tuple[Tensor, ...]:
    """The indices of pairs whose squared distance [..., q, m] is mostly rounding."""
    share = REPAIR_BELOW[squared.dtype]
    suspect = torch.nonzero(squared.amin(-1) < share * (x_norms + y_norms.amax(-1, keepdim=True)), as_tuple=True)
    *stack, row = suspect
    near, column = torch.nonzero(squared[suspect] < share * (x_norms[suspect][:, None] + y_norms[tuple(stack)]), as_tuple=True)
    return (*(index[near] for index in stack), row[near], column)
