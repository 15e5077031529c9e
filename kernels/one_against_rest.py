"""Inner products with the target "one class against the rest", for all classes at once and without an n x n matrix per class.

The distances of this target are G_ij = sqrt(2) (z_i + z_j - 2 z_i z_j), with z_i = 1 for the images of the class and 0 for all others. So

    sum_ij D_ij G_ij = 2 sqrt(2) (V - W),    V = sum of D_ij over i in the class and any j,    W = the same over i and j in the class,

and the row sums of G depend only on the class of the row. `geometry.combined` then gives <A,G> from V, W, the total of D and the number
of images of each class. All are additive over pairs of images. Split by the u random parts of `moments.py`, they also give <A,G> without
any one or two parts, and so its influences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.kernels import geometry, moments
from kdx.kernels.moments import Influences

_ELEMENTS = 1 << 21
"""Elements of an array over classes and pairs of parts in one step."""


@dataclass(frozen=True, eq=False)
class ClassProducts:
    """<A,G_c> of k matrices A and, last, <G_c,G_c>, for the target G_c of each of C classes.

    products [C, k + 1]: normalised as in `geometry.products`; a class of one image has the norm zero. influences: on the products; None
    for fewer than five images.
    """

    products: Tensor
    influences: Influences | None


@dataclass(frozen=True, eq=False)
class ClassSums:
    """Sums over the entries of k symmetric matrices of n images with C classes, split by u consecutive parts of the images.

    sizes [u]: the images of each part. counts [C, u]: those of each class. whole [k, u, u]: the sum over the images i of one part and j of
    the other. mixed [k, C, u, u]: V, with i in the class, made symmetric. inside [k, C, u, u]: W, with i and j in the class.

    The matrices are zero on the diagonal and need not be centred: adding u_i + u_j to every other entry changes no inner product.
    """

    sizes: Sequence[int]
    counts: Tensor
    whole: Tensor
    mixed: Tensor
    inside: Tensor

    @classmethod
    def of_rows(cls, rows: Tensor, inside: Tensor, codes: Tensor, sizes: Sequence[int]) -> ClassSums:
        """From sums over the images j of each part: rows [k, n, u], of each image i with all j, and ``inside`` [k, n, u], with the j of
        its class. codes [n]: the class of each image, as a number from 0."""
        count, parts = int(codes.max()) + 1, len(sizes)
        part = torch.repeat_interleave(torch.arange(parts, device=codes.device), torch.tensor(sizes, device=codes.device))
        place = codes * parts + part
        shape = count, parts
        mixed, within = (
            values.new_zeros(len(values), count * parts, parts).index_add_(1, place, values).unflatten(1, shape)
            for values in (rows, inside)
        )
        counts = rows.new_zeros(count * parts).index_add_(0, place, rows.new_ones(len(place))).unflatten(0, shape)
        return cls(sizes, counts, mixed.sum(1), (mixed + mixed.mT) / 2, within)

    def steps(self) -> Iterator[ClassProducts]:
        """The products of all classes, of as many at a time as memory allows."""
        per_step = max(1, _ELEMENTS // (len(self.whole) * len(self.sizes) ** 2))
        for part in torch.arange(len(self.counts), device=self.counts.device).split(per_step):
            yield ClassSums(self.sizes, self.counts[part], self.whole, self.mixed[:, part], self.inside[:, part]).products()

    def products(self) -> ClassProducts:
        """The products of these classes at once."""
        whole, mixed, inside = (moments.pair_sums(values) for values in (self.whole, self.mixed, self.inside))
        of_class = self.counts.sum(1)
        one = of_class[:, None] - self.counts
        members = of_class, one, one[:, :, None] + one[:, None] - of_class[:, None, None]
        images = moments.part_counts(self.sizes, self.counts)
        values = [_inner_products(*sums) for sums in zip(whole, mixed, inside, members, images, strict=True)]
        if sum(self.sizes) <= moments.FEWEST:
            return ClassProducts(values[0], None)
        second_order = moments.has_second_order(self.sizes)
        return ClassProducts(values[0], Influences.of_values(values[0], values[1], values[2] if second_order else None))


@dataclass(frozen=True, eq=False)
class ClassMatrices:
    """k centred matrices [k, n, n] of few images with the class [n] of each image, as a number from 0. Each image is a part."""

    matrices: Tensor
    codes: Tensor

    def steps(self) -> Iterator[ClassProducts]:
        """The products of all classes, of as many at a time as memory allows."""
        k, n = self.matrices.shape[:2]
        classes = torch.arange(int(self.codes.max()) + 1, device=self.codes.device)
        for part in classes.split(max(1, _ELEMENTS // (k * n**2))):
            z = (self.codes == part[:, None]).to(self.matrices.dtype)
            mixed = (z[:, :, None] + z[:, None]) / 2 * self.matrices[:, None]
            inside = z[:, :, None] * z[:, None] * self.matrices[:, None]
            yield ClassSums([1] * n, z, self.matrices, mixed, inside).products()


def _inner_products(whole: Tensor, mixed: Tensor, inside: Tensor, members: Tensor, n: int | Tensor) -> Tensor:
    """<A,G> of k matrices and <G,G>, [C, k + 1, ...], from the sums [k, ...] and [k, C, ...] over n [...] images, ``members`` [C, ...] of
    which are in the class."""
    others, totals = n - members, whole[:, None]
    total = 2 * members * others
    # The row sum of G is ``others`` for a member, and ``members`` for every other image.
    rows = members * totals + (others - members) * mixed
    cross = geometry.combined(2 * (mixed - inside), rows, total * totals, n)
    norm = geometry.combined(total, members * others * n, total.square(), n)
    return torch.cat([2**0.5 * cross, 2 * norm[None]]).transpose(0, 1)
