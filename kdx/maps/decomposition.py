"""Signed maps that add up to a score: which positions of which images make it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array
from kdx.features.target import target_embedding
from kdx.kernels import decomposition, geometry
from kdx.maps.unicam import check_left


@dataclass(frozen=True)
class Decomposition:
    """A score as a sum over images and positions.

    maps: [n, H, W], signed; their sum over everything is ``score``. explained, other: the two parts whose difference the maps are: the
    share of the explained network and that of the given (or subtracted) network, on one grid; other is None where there is no second
    network. score: the score, as `kdx.rs` or `kdx.fss` computes it from all images at once.
    """

    maps: Any
    explained: Any
    other: Any | None
    score: float

    @property
    def images(self) -> Any:
        """Each image's contribution to the score [n]."""
        return self.maps.sum((1, 2))


def decompose(explained: Array, target: Array, given: Array | None = None, minus: Array | None = None) -> Decomposition:
    """Distribute a score over the positions of the images: exact, signed, and without a gradient.

    With D the distances of the explained features F, G the U-centred matrix of the target, and W_ij = G_ij/D_ij (0 where D_ij = 0),

        c_i(p) = sum_j W_ij |F_i(p) - F_j(p)|^2,        sum_i sum_p c_i(p) = <A,G>,

    so c/(|A||G|) adds up to RS(X) = <A,G>/(|A||G|). The arguments choose the score:

    - ``decompose(x, target)``: RS(X).
    - ``decompose(x, target, given=y)``: RS(X|Y) = <R,G>/(|R||G|) with R = A - beta B, as (c^X - beta c^Y)/(|R||G|). It is positive where
      the relevance of X exceeds that of Y, and negative where it falls short of it.
    - ``decompose(x, target, minus=y)``: RS(X) - RS(Y), as c^X/(|A||G|) - c^Y/(|B||G|).
    - ``decompose(x, features)`` with another network's features [n, C, H, W] as the target: FSS(X, features) over the positions of x.
      Exchange the two for the positions of the other network; ``minus`` gives a difference of two FSS.

    explained, given, minus: features of the same images, [n, C, H, W] or [n, d], float16 to float64, NumPy or PyTorch, on one device.
    Tokens [n, L, C] are positions too: give ``tokens.mT[..., None]``. Where two grids differ, the mass of each is distributed by area over
    a grid that is as fine as both. target: integer labels [n], an embedding [n, e], or features [n, C, H, W].

    How to read a map: a positive c_i(p) means that at position p image i differs more from the images that the target sets apart than
    from those that it puts together; a negative one means the reverse. Each unordered pair of images is divided half to each image. That
    is a choice, as is the formula given=; the totals do not depend on it. A map's total may be negative or near 0, so it is not a
    percentage. Only the numerator is distributed: the norms and beta count as constants, so the share of a position is not the change of
    the score when that position is removed. With ``given`` and ``minus`` a positive position may come from a negative share of the other
    network alone: look at ``explained`` and ``other`` too. Such maps assume that position p of both networks sees the same part of the
    image.

    Raises KdxError for n < 4, constant or non-finite features, rows that do not match, a target with one class, and features that
    ``given`` explains completely. Raises ValueError if both ``given`` and ``minus`` are given.

    >>> import numpy as np, kdx
    >>> rng = np.random.default_rng(0)
    >>> student, base, labels = rng.normal(size=(12, 6, 3, 3)), rng.normal(size=(12, 5, 3, 3)), np.arange(12) % 3
    >>> gain = kdx.decompose(student, labels, minus=base)
    >>> gain.maps.shape, bool(abs(gain.maps.sum() - gain.score) < 1e-9)
    ((12, 3, 3), True)
    """
    if given is not None and minus is not None:
        raise ValueError("give `given` or `minus`, not both")
    with torch.no_grad():
        x = _side(explained, "explained features")
        n = len(x.centred)
        g = _target(target, n).to(x.centred.device)
        norm = geometry.dot(g, g).sqrt()
        share = decomposition.shares(x.features.flatten(2), x.distances, g).reshape(n, *x.features.shape[2:])
        if given is None and minus is None:
            scale = geometry.dot(x.centred, x.centred).sqrt() * norm
            return _result(share / scale, None, geometry.dot(x.centred, g) / scale, explained)
        name = "given features" if given is not None else "subtracted features"
        y = _side(given if given is not None else minus, name)
        arrays.check_same(len(y.centred), n, name, "explained features")
        if y.centred.device != x.centred.device:
            raise KdxError(
                f"The explained features are on {x.centred.device}, the {name} on {y.centred.device}.", "Move both to one device."
            )
        other = decomposition.shares(y.features.flatten(2), y.distances, g).reshape(n, *y.features.shape[2:])
        if given is not None:
            beta = geometry.dot(x.centred, y.centred) / geometry.dot(y.centred, y.centred)
            residual = geometry.residual(x.centred, y.centred)
            left = (geometry.dot(residual, residual) / geometry.dot(x.distances, x.distances)).sqrt()
            check_left(left, x.features.flatten(1), y.features.flatten(1))
            scale = geometry.dot(residual, residual).sqrt() * norm
            return _result(share / scale, beta * other / scale, geometry.dot(residual, g) / scale, explained)
        scales = [geometry.dot(side.centred, side.centred).sqrt() * norm for side in (x, y)]
        score = geometry.dot(x.centred, g) / scales[0] - geometry.dot(y.centred, g) / scales[1]
        return _result(share / scales[0], other / scales[1], score, explained)


@dataclass(frozen=True)
class _Side:
    """A network's features [n, C, H, W] with their distances and U-centred distances [n, n]."""

    features: Tensor
    distances: Tensor
    centred: Tensor


def _side(array: Array | None, name: str) -> _Side:
    assert array is not None
    features = arrays.feature_map(array, name)
    arrays.check_images(len(features))
    rows = features.flatten(1)
    distances = arrays.measured(geometry.distances(rows), rows, name)
    return _Side(features, distances, geometry.u_centered(distances))


def _target(target: Array, n: int) -> Tensor:
    """The target's U-centred matrix [n, n]; another network's features are a target too."""
    if target.ndim == 4:
        side = _side(target, "target features")
        arrays.check_same(len(side.centred), n, "target features", "explained features")
        return side.centred
    rows = target_embedding(target, n)
    return geometry.u_centered(arrays.measured(geometry.distances(rows), rows, "target"))


def _result(share: Tensor, other: Tensor | None, score: Tensor, kind: Array) -> Decomposition:
    if other is not None and share.shape != other.shape:
        size = max(share.shape[1], other.shape[1]), max(share.shape[2], other.shape[2])
        share, other = decomposition.spread(share, *size), decomposition.spread(other, *size)
    maps = share if other is None else share - other
    return Decomposition(
        arrays.like(maps, kind), arrays.like(share, kind), None if other is None else arrays.like(other, kind), float(score)
    )
