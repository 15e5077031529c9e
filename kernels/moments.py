"""The sampling moments of inner products: how much they would vary over other samples of images.

The n images are divided into u equal *parts*, which are single images if there are few. P is an inner product of k centred matrices, as
in `geometry.products`; P_(i) is the same without part i, and P_(ij) without parts i and j. Two quantities describe P as a function of
the parts, up to second order (Efron and Stein, "The jackknife estimate of variance", Annals of Statistics 9, 1981):

    influence      L_i  = (u - 1) (P - P_(i))
    interaction    Q_ij = u P - (u - 1) (P_(i) + P_(j)) + (u - 2) P_(ij)        i != j

The delete-one jackknife estimates the variance of P as sum L_i^2/(u (u - 1)). An inner product is a U-statistic with the variance
s_1 + s_2 + ..., the parts of first and second order, of which the jackknife estimates s_1 + 2 s_2. Near a score of zero s_1 vanishes, and
the estimate is twice the variance. sum_{i<j} Q_ij^2/(u (u - 1)) estimates s_2, which is subtracted.

No matrix is centred again: P_(i) and P_(ij) follow from the sums of `geometry.combined` by subtraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.kernels import geometry
from kdx.kernels.distances import hollow

PARTS = 32
"""The number of parts, if the parts are not single images."""

SINGLE_IMAGES = 256
"""Up to this many images, each image is a part."""

FEWEST = 4
"""Inner products of centred matrices need at least this many images."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Second and third moments of the m = k(k+1)/2 inner products of k matrices, in the order of `upper`.

    parts: the number u of parts. variance [m, m]: the jackknife's sum_i L_i L_i/(u (u - 1)). interaction [m, m]: the part of it to
    subtract, sum_{i<j} Q_ij Q_ij/(u (u - 1)). slope [m, m, m]: sum_i L_i L_i L_i + 2 sum_ij L_i Q_ij L_j, over u^2 (u - 1). For a
    combination c of the inner products, slope(c, c, c)/variance(c, c) is the derivative of their variance by their expectation.

    Moments of independent images add up: those of a sum of inner products over batches are the sum of the batches' moments.
    """

    parts: int
    variance: Tensor
    interaction: Tensor
    slope: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.parts + other.parts,
            self.variance + other.variance,
            self.interaction + other.interaction,
            self.slope + other.slope,
        )

    def scaled(self, factor: float) -> Moments:
        """The moments of the inner products times a factor."""
        return Moments(self.parts, factor**2 * self.variance, factor**2 * self.interaction, factor**3 * self.slope)


@dataclass(frozen=True, eq=False)
class Influences:
    """What the u parts contribute to each of m inner products, from which their moments follow; any number of leading dimensions.

    first [..., m, u]: L_i, with a mean of zero. second [..., m, u, u]: Q_ij, with a mean of zero and a zero diagonal; None where the
    inner products do not depend on two parts together, or where too few images would remain without two parts.

    Both are linear in the inner products, so those of a combination of inner products are the same combination of them.
    """

    first: Tensor
    second: Tensor | None

    @classmethod
    def of_values(cls, whole: Tensor, one: Tensor, two: Tensor | None) -> Influences:
        """From inner products [..., m] of all images, [..., m, u] without each part, and [..., m, u, u] without every two parts."""
        parts = one.shape[-1]
        first = (parts - 1) * (whole[..., None] - one)
        first = first - first.mean(-1, keepdim=True)
        if two is None:
            return cls(first, None)
        both = one[..., :, None] + one[..., None, :]
        return cls(first, _off_diagonal(parts * whole[..., None, None] - (parts - 1) * both + (parts - 2) * two))

    @property
    def parts(self) -> int:
        return self.first.shape[-1]

    def scaled(self, factor: float) -> Influences:
        """The influences on the inner products times a factor."""
        return Influences(factor * self.first, None if self.second is None else factor * self.second)

    def moments(self) -> Moments:
        """The moments of inner products without leading dimensions."""
        influences, interactions, parts = self.first, self.second, self.parts
        scale = parts * (parts - 1)
        variance = influences @ influences.T / scale
        slope = torch.einsum("ai,bi,ci->abc", influences, influences, influences)
        if interactions is None:
            return Moments(parts, variance, torch.zeros_like(variance), slope / (parts * scale))
        slope += 2 * ((influences @ interactions) @ influences.T).transpose(0, 1)
        flat = interactions.flatten(1)
        return Moments(parts, variance, flat @ flat.T / (2 * scale), slope / (parts * scale))


def upper(k: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The rows and columns of the inner products <X_a, X_b>, a <= b, of k matrices."""
    rows, columns = torch.triu_indices(k, k, device=device)
    return rows, columns


def of_batches(products: Tensor) -> Moments:
    """The moments of the sum of inner products [batches, k, k] of two or more batches, from the variation between the batches."""
    batches, k = products.shape[:2]
    values = products[:, *upper(k, products.device)].T
    return Influences(batches * (values - values.mean(1, keepdim=True)), None).moments()


def of_matrices(matrices: Tensor, biased: bool = False) -> Moments | None:
    """The moments of the inner products of centred matrices [k, n, n]; None for fewer than five images. See `matrix_influences`."""
    known = matrix_influences(matrices, biased)
    return None if known is None else known.moments()


def matrix_influences(matrices: Tensor, biased: bool = False) -> Influences | None:
    """The influences on the inner products of centred matrices [k, n, n]; None for fewer than five images.

    The matrices are those of `geometry.u_centered`, or of `geometry.double_centered` if ``biased``. Normalised as in `geometry.products`.
    """
    n = matrices.shape[-1]
    if n <= FEWEST:
        return None
    scale = n / (n - 3) if biased else 1.0  # `geometry.products` normalises both kinds of matrices alike
    if n <= SINGLE_IMAGES:
        return influences(matrices[:, None] * matrices[None], matrices, [1] * n, biased).scaled(scale)
    # The parts are random, but the same in each call: images that are stored together may be alike.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(matrices.device)
    matrices, sizes = matrices[:, order][:, :, order], part_sizes(n)
    rows = _summed(matrices, sizes).mT
    pairs = torch.stack([_summed(_summed(a * matrices, sizes).mT, sizes).mT for a in matrices])
    return influences(pairs, rows, sizes, biased).scaled(scale)


def part_sizes(n: int, parts: int | None = None) -> list[int]:
    """The number of images in each of ``parts`` equal parts of n images, by default `PARTS`, or in n parts if n is smaller."""
    parts = min(PARTS if parts is None else parts, n)
    return [(part + 1) * n // parts - part * n // parts for part in range(parts)]


def influences(
    pairs: Tensor, rows: Tensor, sizes: Sequence[int], biased: bool = False, which: tuple[Tensor, Tensor] | None = None
) -> Influences:
    """The influences from sums over the u consecutive parts of n images, ``sizes`` [u], of k symmetric matrices D.

    pairs [k, k, u, u]: sum of D_ij E_ij over the images i of one part and j of the other, for every two matrices D and E. rows [k, n, u]:
    sum_j D_ij over the images j of each part. The matrices need not be centred. which: the numbers a [m] and b [m] of the matrices of each
    inner product <X_a, X_b>, by default those of `upper`.
    """
    _, n, parts = rows.shape
    first, second = upper(len(rows), rows.device) if which is None else which
    pairs, totals = pairs[first, second], pair_sums(_summed(rows, sizes))
    counts = part_counts(sizes, rows)
    second_order = has_second_order(sizes)
    results = []
    for part in torch.arange(len(pairs), device=rows.device).split(geometry.per_step(n * parts, rows.device)):
        a, b = first[part], second[part]
        sums = zip(pair_sums(pairs[part]), _row_sums(rows[a], rows[b], sizes), totals, counts, strict=True)
        whole, one, two = (geometry.combined(pair, row, total[a] * total[b], count, biased) for pair, row, total, count in sums)
        results.append(Influences.of_values(whole, one, two if second_order else None))
    interactions = [result.second for result in results if result.second is not None]
    return Influences(torch.cat([result.first for result in results]), torch.cat(interactions) if interactions else None)


def part_counts(sizes: Sequence[int], like: Tensor) -> tuple[int | Tensor, ...]:
    """The number of all images, without each part [u], and without every two parts [u, u]."""
    n = sum(sizes)
    left = torch.tensor([n - size for size in sizes], dtype=like.dtype, device=like.device)
    return n, left, left[:, None] + left - n


def has_second_order(sizes: Sequence[int]) -> bool:
    """Whether enough images remain without any two parts."""
    return sum(sizes) - 2 * max(sizes) >= FEWEST


def _off_diagonal(values: Tensor) -> Tensor:
    """Values [..., u, u] minus the mean of each matrix, both without the diagonal, which becomes zero."""
    off = hollow(values.shape[-1], values)
    values = torch.where(off > 0, values, 0.0)
    return (values - values.sum((-2, -1), keepdim=True) / off.sum()) * off


def pair_sums(pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of symmetric pairs [..., u, u] over all parts [...], without each part [..., u], and without every two parts [..., u, u]."""
    whole = pairs.sum((-2, -1))
    one = whole[..., None] - 2 * pairs.sum(-1) + pairs.diagonal(dim1=-2, dim2=-1)
    return whole, one, one[..., :, None] + one[..., None, :] - whole[..., None, None] + 2 * pairs


def _row_sums(rows: Tensor, others: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i r_i s_i, with r and s the row sums of two matrices: of all images, without each part, and without every two parts.

    rows, others [m, n, u]: of m pairs of matrices, as in `of_parts`. Without parts u and v, image i has the row sum r_i - R_iu - R_iv,
    and the images of u and v themselves do not count.
    """
    r, s = rows.sum(2, keepdim=True), others.sum(2, keepdim=True)
    cross = rows.mT @ others
    part = torch.repeat_interleave(torch.arange(len(sizes), device=rows.device), torch.tensor(sizes, device=rows.device))
    part = part[:, None].expand(len(rows), -1, 1)
    r_one, s_one = r - rows.gather(2, part), s - others.gather(2, part)  # row sums without the image's own part
    own = _summed(r_one * s_one, sizes)[:, :, 0]
    whole = (r * s).sum((1, 2))
    loss = (r.mT @ others + s.mT @ rows)[:, 0] - cross.diagonal(dim1=1, dim2=2) + own
    mixed = cross + _summed(r_one * others + s_one * rows - rows * others, sizes)
    one = whole[:, None] - loss
    return whole, one, one[:, :, None] - loss[:, None] + mixed + mixed.mT


def _summed(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows [m, n, ...] summed over consecutive parts [m, u, ...]."""
    if len(sizes) == rows.shape[1]:
        return rows
    return torch.stack([part.sum(1) for part in rows.split(list(sizes), 1)], 1)
