"""The second sweep over N images: what the maps of one network need of all pairs, tile by tile.

For two tiles of images, the products K_p,ij = <F_i(p), F_j(p)> of every position take as many operations as the one Gram product of whole
images. With them (and q_i(p) = K_p,ii, r = W 1)

    a share                 c_i(p) = sum_j W_ij |F_i(p) - F_j(p)|^2 = r_i q_i(p) + (W q)_i(p) - 2 sum_j W_ij K_p,ij
    an elementwise map      sum_c (Lap F)_ic(p) F_ic(p)             = r_i q_i(p) - sum_j W_ij K_p,ij     (plus terms of the centre)
    channel weights         a_i                                     = r_i f_i - (W f)_i,   f the spatial means

each cost a pass over K, which is in the processor's cache, or less. A tile serves its rows and its columns, since W is symmetric. The sums
over the images of either half of the set are kept apart, so that maps with either half as context can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdx.kernels import geometry, rounding
from kdx.kernels.decomposition import ELEMENTS, PairWeights
from kdx.kernels.set_geometry import SetGeometry
from kdx.kernels.set_unicam import SetGradient
from kdx.kernels.tiles import FeatureDistances, RowBuffer

_CACHED, _LAUNCHED = 1 << 19, 1 << 25
"""Products of positions that one step computes: on a CPU they fit into its cache, and on a GPU they outweigh the time of their launches."""


@dataclass(frozen=True, eq=False)
class SetFeatures:
    """One network's features of n images, read on demand, in the order of a `SetGeometry`.

    Rows are [positions, channels]: shape is (P, C). norms [n, P]: q about the centre. centre_products [n, P]: <F_i(p) - centre(p),
    centre(p)>. means [n, C + k]: the spatial means minus that of the centre, and the probes of `kdx.kernels.rounding`. These three are
    float64.
    """

    matrix: FeatureDistances
    order: Tensor
    shape: tuple[int, int]
    norms: Tensor
    centre_products: Tensor
    means: Tensor

    @classmethod
    def of(cls, matrix: FeatureDistances, geometry_: SetGeometry, channels: int) -> SetFeatures:
        positions, device = matrix.rows.shape[1] // channels, matrix.rows.device
        norms, centre_products = (torch.empty(geometry_.n, positions, dtype=torch.float64, device=device) for _ in range(2))
        means = torch.empty(geometry_.n, channels + rounding.PROBES, dtype=torch.float64, device=device)
        features = cls(matrix, geometry_.order, (positions, channels), norms, centre_products, means)
        buffer = RowBuffer()
        for number, place in enumerate(geometry_.places):
            block = features.read(place, buffer)
            norms[place] = block.square().sum(2)
            centre_products[place] = torch.einsum("npc,pc->np", block, features.centre)
            sizes = rounding.entry_sizes(block.mT, features.centre.mT)  # those of the features, which rounding is relative to
            means[place] = rounding.with_probes_of(block.mean(1, dtype=torch.float64), sizes, seed=number)
        return features

    @property
    def centre(self) -> Tensor:
        """[P, C]."""
        return self.matrix.centre.view(self.shape)

    def read(self, index: slice, buffer: RowBuffer) -> Tensor:
        """The features [r, P, C] of these images, float32 at least, minus the centre. They are in the buffer until its next use."""
        return buffer.centred(self.matrix, self.order[index]).view(-1, *self.shape)

    def uncentred(self, index: slice) -> Tensor:
        """The features [r, P, C] of these images."""
        return geometry.wide(self.matrix.rows.read(self.order[index])).view(-1, *self.shape)


@dataclass(frozen=True, eq=False)
class SetSums:
    """What the second sweep sums for one network, with the images of either half of the set as context, in float64.

    shares [m, 2, n, P], of m matrices. weights [g, 2, n, C]: the channel weights of g gradients, zero if all are only rounding; while
    they are summed, with probes. elementwise [g, 2, n, P]: their elementwise maps before the ReLU, or [0, 2, n, P] if they were not
    requested.
    """

    shares: Tensor
    weights: Tensor
    elementwise: Tensor

    def without_probes(self, features: SetFeatures) -> SetSums:
        """The sums after the last tile."""
        dtype, (positions, channels) = features.matrix.rows.dtype, features.shape
        weights = [rounding.probed_set(gradient, dtype, positions) for gradient in self.weights]
        return replace(self, weights=torch.stack(weights) if weights else self.weights[..., :channels])


def second_sweep(
    geometry_: SetGeometry,
    network: int,
    features: SetFeatures,
    matrices: Sequence[int],
    gradients: Sequence[SetGradient],
    *,
    elementwise: bool,
    step: Callable[[], None] = lambda: None,
) -> SetSums:
    """The sums over all pairs for the network with this number, with these matrices, and for these gradients of its features.

    step: called after each tile.
    """
    sweep = _Sweep(geometry_, features, elementwise, geometry_.n)
    sums = sweep.zeros(len(matrices), len(gradients))
    row_buffer, column_buffer = RowBuffer(), RowBuffer()
    left = -1, torch.empty(0)
    for a, b in geometry_.pairs:
        if left[0] != a:
            left = a, features.read(geometry_.places[a], row_buffer)
        own = left[1]
        other = own if a == b else features.read(geometry_.places[b], column_buffer)
        centred = [geometry_.centred(number, a, b) for number in range(len(geometry_.matrices))]
        tile = _Tile(geometry_.places[a], geometry_.places[b], geometry_.distances(network, a, b), own, other)
        sweep.add(sums, tile, centred, matrices, gradients, both=a != b)
        step()
    return sums.without_probes(features)


def permuted_sums(
    geometry_: SetGeometry,
    network: int,
    features: SetFeatures,
    matrices: Sequence[int],
    gradients: Sequence[SetGradient],
    *,
    permuted: int,
    images: int,
    elementwise: bool,
) -> SetSums:
    """The sums for the first ``images`` images, under the first permutation of the matrix number ``permuted``."""
    sweep = _Sweep(geometry_, features, elementwise, images)
    sums = sweep.zeros(len(matrices), len(gradients))
    row_buffer, column_buffer = RowBuffer(), RowBuffer()
    for a, first in enumerate(geometry_.places):
        own = slice(first.start, min(first.stop, images))
        if own.start >= own.stop:
            break
        rows, block = slice(0, own.stop - own.start), features.read(own, row_buffer)
        for b, place in enumerate(geometry_.places):
            centred = [
                (geometry_.turned(number, a, b, 0) if number == permuted else geometry_.centred(number, a, b))[rows]
                for number in range(len(geometry_.matrices))
            ]
            tile = _Tile(own, place, geometry_.distances(network, a, b)[rows], block, features.read(place, column_buffer))
            sweep.add(sums, tile, centred, matrices, gradients, both=False)
    return sums.without_probes(features)


@dataclass(frozen=True, eq=False)
class _Tile:
    """A tile: the places of its rows and columns, their distances [l, r], and their features [l, P, C] and [r, P, C]."""

    rows: slice
    columns: slice
    distances: Tensor
    own: Tensor
    other: Tensor


class _Sweep:
    """Adds tiles to the sums of the first ``images`` images."""

    def __init__(self, geometry_: SetGeometry, features: SetFeatures, elementwise: bool, images: int) -> None:
        self._features, self._elementwise, self._images = features, elementwise, images
        self._norms = features.norms.sum(1)
        self._middle = min((place.stop for place in geometry_.places), key=lambda end: abs(2 * end - geometry_.n))

    def zeros(self, matrices: int, gradients: int) -> SetSums:
        positions, channels = self._features.shape[0], self._features.means.shape[1]

        def zeros(count: int, width: int) -> Tensor:
            return torch.zeros(count, 2, self._images, width, dtype=torch.float64, device=self._norms.device)

        return SetSums(
            zeros(matrices, positions),
            zeros(gradients, channels),
            zeros(gradients if self._elementwise else 0, positions),
        )

    def add(
        self,
        sums: SetSums,
        tile: _Tile,
        centred: Sequence[Tensor],
        matrices: Sequence[int],
        gradients: Sequence[SetGradient],
        *,
        both: bool,
    ) -> None:
        """Add a tile to the sums of its rows and, if ``both``, of its columns. centred: the tile of every U-centred matrix."""
        slopes = [gradient.tile(centred, tile.rows, tile.columns) for gradient in gradients]
        for number, slope in enumerate(slopes):
            self._add_channel_weights(sums.weights[number], tile, geometry.pair_weights(slope, tile.distances), both)
        stack = [centred[number] for number in matrices] + (slopes if self._elementwise else [])
        if not stack:
            return
        dtype = tile.own.dtype
        pairs = PairWeights.of(tile.distances, torch.stack(stack), self._norms[tile.rows], self._norms[tile.columns], dtype)
        own, other = (x.to(pairs.dtype) for x in (tile.own, tile.other))
        by_row, by_column = position_sums(pairs.weights.to(pairs.dtype), own, other)
        count = len(matrices)
        sides = [(tile.rows, tile.columns, pairs.weights, by_row)]
        if both:
            sides.append((tile.columns, tile.rows, pairs.weights.mT, by_column))
        for rows, columns, weights, products in sides:
            self._add_shares(sums.shares, rows, columns, weights[:count], products[:count])
            self._add_elementwise(sums.elementwise, rows, columns, weights[count:], products[count:])
        self._add_close(sums, tile, pairs, count, own, other, both)

    def _halves(self, columns: slice) -> int:
        """The half of the set that contains these images. Tiles are not divided, so the halves meet at the boundary nearest to n/2."""
        return int(columns.start >= self._middle)

    def _add_channel_weights(self, result: Tensor, tile: _Tile, weights: Tensor, both: bool) -> None:
        """Add r_i f_i - (W f)_i to ``result`` [2, n, C + k]."""
        means = self._features.means
        sides = [(tile.rows, tile.columns, weights)] + ([(tile.columns, tile.rows, weights.mT)] if both else [])
        for rows, columns, w in sides:
            result[self._halves(columns), rows] += w.sum(1, keepdim=True) * means[rows] - w @ means[columns]

    def _add_shares(self, result: Tensor, rows: slice, columns: slice, weights: Tensor, products: Tensor) -> None:
        norms = self._features.norms
        result[:, self._halves(columns), rows] += weights.sum(2)[:, :, None] * norms[rows] + weights @ norms[columns] - 2 * products

    def _add_elementwise(self, result: Tensor, rows: slice, columns: slice, weights: Tensor, products: Tensor) -> None:
        if not len(weights):
            return
        norms, centre = self._features.norms, self._features.centre_products
        own = weights.sum(2)[:, :, None] * (norms[rows] + centre[rows])
        result[:, self._halves(columns), rows] += own - weights @ centre[columns] - products

    def _add_close(self, sums: SetSums, tile: _Tile, pairs: PairWeights, count: int, own: Tensor, other: Tensor, both: bool) -> None:
        """Add the close pairs by direct differences."""
        step = max(1, ELEMENTS // own[0].numel())
        centre = self._features.centre.to(own.dtype)
        for start in range(0, len(pairs.close[0]), step):
            i, j = (index[start : start + step] for index in pairs.close)
            weights = pairs.direct[:, start : start + step, None]
            difference = own[i] - other[j]
            squared = difference.square().sum(2, dtype=torch.float64)
            for rows, columns, index, sign, block in (
                (tile.rows, tile.columns, i, 1, own[i]),
                (tile.columns, tile.rows, j, -1, other[j]),
            )[: 1 + both]:
                half = self._halves(columns)
                sums.shares[:, half, rows].index_add_(1, index, weights[:count] * squared)
                if len(weights) > count:
                    slope = sign * (difference * (block + centre)).sum(2, dtype=torch.float64)
                    sums.elementwise[:, half, rows].index_add_(1, index, weights[count:] * slope)


def position_sums(weights: Tensor, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j W_ij K_p,ij [m, l, P] and sum_i W_ij K_p,ij [m, r, P] in float64, with K_p,ij = <own_i(p), other_j(p)>.

    weights W [m, l, r]. own [l, P, C] and other [r, P, C].
    """
    count, rows, columns = weights.shape
    positions = own.shape[1]
    by_row = torch.empty(count, rows, positions, dtype=torch.float64, device=own.device)
    by_column = torch.empty(count, columns, positions, dtype=torch.float64, device=own.device)
    at_once = _CACHED if own.device.type == "cpu" else _LAUNCHED
    step = max(1, min(positions, at_once // (rows * columns)))
    products = own.new_empty(step, rows, columns)
    weighted = torch.empty_like(products)
    for start in range(0, positions, step):
        part = slice(start, min(start + step, positions))
        size = part.stop - part.start
        k = torch.bmm(own[:, part].transpose(0, 1), other[:, part].permute(1, 2, 0), out=products[:size])
        for number in range(count):
            product = torch.mul(k, weights[number], out=weighted[:size])
            by_row[number, :, part] = product.sum(2).T
            by_column[number, :, part] = product.sum(1).T
    return by_row, by_column
