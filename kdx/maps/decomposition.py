"""Signed maps that add up to a score and show which positions of which images contribute to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.features import arrays
from kdx.features.arrays import Array, ArrayT, Labels
from kdx.features.target import Target
from kdx.kernels import ambient, decomposition, dispatch, geometry
from kdx.kernels.cuda import Backend
from kdx.kernels.dispatch import BatchDistances, TorchBackend
from kdx.kernels.positions import PositionGeometry
from kdx.maps.drawing import Sheet
from kdx.maps.figures import Drawable, contact_sheet, single_kind
from kdx.maps.scaling import at_size
from kdx.maps.unicam import check_residual


@dataclass(frozen=True)
class Decomposition(Drawable, Generic[ArrayT]):
    """A score as a sum over images and positions.

    maps: [n, H, W], signed; their sum over everything is ``score``. explained, other: the two parts whose difference the maps are, that is,
    the share of the explained network and that of the given (or subtracted) network, on one grid; other is None without a second
    network. score: the score, as `kdx.rs` or `kdx.fss` computes it from all images at once. stability [n]: the correlation between an
    image's two maps that have either half of the images as context, NaN where a map is constant; `kdx.Explainer` computes it, and
    `kdx.decompose` does not.
    """

    maps: ArrayT
    explained: ArrayT
    other: ArrayT | None
    score: float
    stability: ArrayT | None = None

    @property
    def images(self) -> ArrayT:
        """Each image's contribution to the score [n]."""
        contributions: ArrayT = self.maps.sum((1, 2))
        return contributions

    def at_size(self, size: tuple[int, int]) -> ArrayT:
        """The maps resized (bilinear) to ``size`` (H, W), each then divided by its largest absolute value, which becomes 1.

        Signs are kept, and a map of zeros stays zero. Maps at this scale no longer add up to the score.
        """
        return at_size(self.maps, size, signed=True)

    def _count(self) -> int:
        return len(self.maps)

    def _sheet(self, images: list[NDArray[np.uint8]] | None, index: list[int], kinds: Sequence[str] | None) -> Sheet:
        single_kind(kinds)
        return contact_sheet(self.maps, images, index, signed=True)


@ambient.neutral()
def decompose(
    explained: ArrayT, target: Labels, given: Array | None = None, minus: Array | None = None, *, backend: Backend = "auto"
) -> Decomposition[ArrayT]:
    """Distribute a score over the positions of the images: exact, signed, and without a gradient.

    With D the distances of the explained features F, G the U-centred matrix of the target, and W_ij = G_ij/D_ij (0 where D_ij = 0),

        c_i(p) = sum_j W_ij |F_i(p) - F_j(p)|^2,        sum_i sum_p c_i(p) = <A,G>,

    so c/(|A||G|) adds up to RS(X) = <A,G>/(|A||G|). The arguments choose the score:

    - ``decompose(x, target)``: RS(X).
    - ``decompose(x, target, given=y)``: RS(X|Y) = <R,G>/(|R||G|) with R = A - beta B, as (c^X - beta c^Y)/(|R||G|). It is positive where
      the share of X exceeds beta times that of Y, and negative where it is below.
    - ``decompose(x, target, minus=y)``: RS(X) - RS(Y), as c^X/(|A||G|) - c^Y/(|B||G|).
    - ``decompose(x, features)`` with another network's features [n, C, H, W] as the target: FSS(X, features) over the positions of x.
      Exchange the two for the positions of the other network; ``minus`` gives a difference of two FSS.

    explained, given, minus: features of the same images, [n, C, H, W] or [n, d], float16 to float64, NumPy or PyTorch, on one device.
    Tokens [n, L, C] are positions too: give ``tokens.mT[..., None]``. Where two grids differ, the mass of each is distributed by area over
    a grid that is as fine as both. target: integer labels [n], an embedding [n, e], or features [n, C, H, W].
    backend: as in `kdx.unicam`.

    How to read a map: a positive c_i(p) means that at position p image i differs more from the images that the target sets apart than
    from those that it puts together; a negative value means the reverse. Each unordered pair of images is divided equally between its two
    images. That is a choice, and so is the formula for ``given``; the sum over all images and positions does not depend on it. A map's
    total may be negative or near 0, so a share is not a percentage. Only the numerator is distributed: the norms and beta count as
    constants, so the share of a position is not the change of the score when that position is removed. With ``given`` and ``minus``, a
    positive value may come from a negative share of the other network alone: look at ``explained`` and ``other`` too. Such maps assume
    that position p of both networks sees the same part of the image.

    Raises KdxError for n < 4, constant or non-finite features, rows that do not match, a target with one class, and features that
    ``given`` explains completely, and for the backend ``cuda`` where it cannot run. Raises ValueError if both ``given`` and ``minus`` are
    given, and for an unknown backend.

    >>> import numpy as np, kdx
    >>> rng = np.random.default_rng(0)
    >>> student, base, labels = rng.normal(size=(12, 6, 3, 3)), rng.normal(size=(12, 5, 3, 3)), np.arange(12) % 3
    >>> gain = kdx.decompose(student, labels, minus=base)
    >>> gain.maps.shape, bool(abs(gain.maps.sum() - gain.score) < 1e-9)
    ((12, 3, 3), True)
    """
    if given is not None and minus is not None:
        raise ValueError("give `given` or `minus`, not both")
    features = arrays.feature_map(explained, "explained features")
    ops = dispatch.chosen(features, backend)
    x = _network(features, "explained features", ops)
    n, device = len(x.features), x.features.device
    g = _target_matrix(target, n, device, ops)
    norm = geometry.dot(g, g).sqrt()
    share = x.shares(g)
    second, name = (given, "given features") if given is not None else (minus, "subtracted features")
    if second is None:
        scale = _norm(x.distances.centred) * norm
        return _decomposition(share / scale, None, geometry.correlation(x.distances.centred, g), explained)
    y = _network(second, name, ops)
    arrays.check_same(len(y.features), n, name, "explained features")
    arrays.check_same_device(y.features.device, device, name, "explained features")
    a, b = x.distances.centred, y.distances.centred
    if given is not None:
        beta = geometry.dot(a, b) / geometry.dot(b, b)
        residual = geometry.residual(a, b)
        check_residual(_norm(residual) / _norm(x.distances.raw), x.features.flatten(1), y.features.flatten(1))
        scale = _norm(residual) * norm
        return _decomposition(share / scale, beta * y.shares(g) / scale, geometry.correlation(residual, g), explained)
    scales = _norm(a) * norm, _norm(b) * norm
    score = geometry.correlation(a, g) - geometry.correlation(b, g)
    return _decomposition(share / scales[0], y.shares(g) / scales[1], score, explained)


@dataclass(frozen=True)
class _Network:
    """A network's features [n, C, H, W], the geometry of their positions, and their distances [n, n]."""

    features: Tensor
    positions: PositionGeometry
    distances: BatchDistances

    def shares(self, matrix: Tensor) -> Tensor:
        """`kdx.kernels.decomposition.shares` on the grid of the features: [n, H, W]."""
        n, _, height, width = self.features.shape
        return self.positions.shares(matrix[None], [slice(0, n)]).reshape(n, height, width)


def _network(array: Array, name: str, ops: TorchBackend) -> _Network:
    features = arrays.feature_map(array, name)
    arrays.check_images(len(features))
    positions = ops.positions(features.flatten(2))
    return _Network(features, positions, arrays.checked_distances(positions.distances[None], {name: features.flatten(1)})[0])


def _target_matrix(target: Labels, n: int, device: torch.device, ops: TorchBackend) -> Tensor:
    """The U-centred matrix [n, n] of labels, of an embedding, or of another network's features."""
    if not isinstance(target, Tensor | np.ndarray) or target.ndim != 4:
        return Target.of(target, n, device=device, backend=ops).distances.centred
    features = arrays.feature_map(target, "target features")
    arrays.check_images(len(features))
    arrays.check_same(len(features), n, "target features", "explained features")
    return arrays.row_distances({"target features": features.flatten(1)}, ops)[0].centred.to(device)


def _norm(matrix: Tensor) -> Tensor:
    return geometry.dot(matrix, matrix).sqrt()


def _decomposition(share: Tensor, other: Tensor | None, score: Tensor, kind: ArrayT) -> Decomposition[ArrayT]:
    if other is not None and share.shape != other.shape:
        size = max(share.shape[1], other.shape[1]), max(share.shape[2], other.shape[2])
        share, other = decomposition.spread(share, *size), decomposition.spread(other, *size)
    maps = share if other is None else share - other
    return Decomposition(
        arrays.like(maps, kind), arrays.like(share, kind), None if other is None else arrays.like(other, kind), float(score)
    )
