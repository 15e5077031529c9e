"""UniCAM maps: where the explained network holds what the given network does not explain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdx.choices import ObjectiveName, Weighting
from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array
from kdx.features.target import target_embedding
from kdx.kernels import dispatch, geometry
from kdx.kernels.cuda import Backend
from kdx.kernels.dispatch import Pairs
from kdx.maps.scaling import scaled


@dataclass(frozen=True)
class Maps:
    """UniCAM of one layer and one pair of networks.

    maps: [n, H, W] >= 0, at feature resolution, before scaling; comparable within one image, not between images.
    weights: [n, C], the mean over h, w of the objective's gradient.
    score: the objective's value (in reference mode its mean over the images).
    """

    maps: Any
    weights: Any
    score: float

    def scaled(self, size: tuple[int, int] | None = None) -> Any:
        """The maps min-max scaled to [0, 1] image by image, resized (bilinear) to ``size`` (H, W) where given."""
        return scaled(self.maps, size)


class ReferenceSet:
    """A fixed set of m images that queries are placed among, so that a map depends on its image and this set alone.

    explained, given: features of the two networks on the reference images, [m, C, H, W] or [m, d];
    target: their labels [m] or embedding [m, e]. Choose them class-balanced. Queries must then come with embeddings in
    the same space, or labels with the same meaning. The references' own distances are computed once, here.
    """

    def __init__(self, explained: Array, given: Array, target: Array, *, pooled: bool = False) -> None:
        self.explained = arrays.feature_map(explained, "explained features of the reference set")
        self.given = arrays.feature_map(given, "given features of the reference set")
        self.target = arrays.tensor(target, "target")
        self.pooled = pooled
        m = self.explained.shape[0]
        arrays.check_images(m)
        arrays.check_same(self.given.shape[0], m, "given features", "explained features")
        x, y = (rows_of(features, pooled) for features in (self.explained, self.given))
        g = target_embedding(target, m)
        self.distances = tuple(
            arrays.measured(geometry.distances(rows), rows, name)
            for rows, name in ((x, "explained features"), (y, "given features"), (g, "target"))
        )


def unicam(
    explained: Array,
    given: Array,
    target: Array,
    objective: ObjectiveName | Callable[[Tensor], Tensor] = "relevance",
    weighting: Weighting = "gap",
    *,
    pooled: bool = False,
    reference: ReferenceSet | None = None,
    backend: Backend = "auto",
) -> Maps:
    """UniCAM maps of ``explained``'s features given ``given``'s, in closed form: no backward pass, nothing of size n x n x d.

    With A, B, G the U-centred distance matrices of the two networks' features and of the target, R = A - <A,B>/<B,B> B:
    the objective is L = <R,G>/sqrt(<R,R><G,G>) (relevance), L = sum_i max_j R_ij (uniqueness), or any differentiable
    function of R [n, n]. Channel weights a_ic = mean_hw dL/dF_ichw, maps ReLU(sum_c a_ic F_ic); ``elementwise`` weights
    each position with its own gradient (HiRes). Source: arXiv 2412.13943.

    explained, given: [n, C, H, W] or [n, d], float16 to float64, NumPy or PyTorch, on one device; channels and sizes may
    differ between the two. target: integer labels [n] or an embedding [n, e]. pooled: measure distances between spatial
    means instead of whole features. reference: place each image among these instead of among its batch mates. backend: ``torch``
    or ``cuda``, the kernels for NVIDIA GPUs; ``auto`` takes the kernels for features on a GPU that can run them.

    A map says where the features sit that raise L; it does not say that the network's prediction depends on them, and
    in a plain batch it changes with the other images.

    Raises KdxError for n < 4, one class, constant or non-finite features, rows that do not match, features that ``given``
    explains wholly, and the backend ``cuda`` where it cannot run.

    >>> import numpy as np, kdx
    >>> rng = np.random.default_rng(0)
    >>> student, base = rng.normal(size=(8, 6, 3, 3)), rng.normal(size=(8, 5, 3, 3))
    >>> distilled = kdx.unicam(student, base, np.arange(8) % 2)
    >>> distilled.maps.shape, distilled.weights.shape
    ((8, 3, 3), (8, 6))
    """
    check_weighting(weighting)
    with torch.no_grad():
        lap = weighting == "elementwise"
        placed = place(explained, given, target, objective, pooled=pooled, reference=reference, backend=backend, lap=lap)
        weights, maps = weighted(placed, weighting)
        return Maps(arrays.like(maps, explained), arrays.like(weights, explained), placed.score)


def check_weighting(weighting: str) -> None:
    if weighting not in ("gap", "elementwise"):
        raise ValueError(f"weighting must be 'gap' or 'elementwise', not {weighting!r}")


@dataclass(frozen=True)
class Placed:
    """An explained network's features [n, C, H, W] in the geometry of their batch, or behind ``references`` [m, C, H, W].

    weights: of its channels [n, C], before those of pooled features are shared out to positions. lap: where it was asked for, the
    gradient dL/dX = lap X among the images [n, n], or [n, m+1, m+1] of each image behind the references. score: L; in reference
    mode its mean over the images. ops: what computes.
    """

    features: Tensor
    weights: Tensor
    lap: Tensor | None
    score: float
    pooled: bool
    references: Tensor | None
    ops: dispatch.TorchBackend

    def gradient(self) -> Tensor:
        """dL/dX [n, d] of the rows X that distances were measured between."""
        assert self.lap is not None
        return _row_gradient(rows_of(self.features, self.pooled), self.lap, self._behind())

    def _behind(self) -> Tensor | None:
        return None if self.references is None else rows_of(self.references, self.pooled)


def place(
    explained: Array,
    given: Array,
    target: Array,
    objective: ObjectiveName | Callable[[Tensor], Tensor],
    *,
    pooled: bool,
    reference: ReferenceSet | None,
    backend: Backend = "auto",
    lap: bool = True,
) -> Placed:
    """The geometry of `unicam`, whose arguments these are: everything that is n x n."""
    features = arrays.feature_map(explained, "explained features")
    others = arrays.feature_map(given, "given features")
    n = features.shape[0]
    arrays.check_same(others.shape[0], n, "given features", "explained features")
    if features.device != others.device:
        raise KdxError(f"The explained features are on {features.device}, the given ones on {others.device}.", "Move both to one device.")
    if not callable(objective) and objective not in geometry.OBJECTIVES:
        raise ValueError(f"objective must be one of {sorted(geometry.OBJECTIVES)} or a function of R, not {objective!r}")
    chosen = geometry.differentiated(objective) if callable(objective) else geometry.OBJECTIVES[objective]
    ops = dispatch.chosen(features, backend)
    x, y = rows_of(features, pooled), rows_of(others, pooled)
    if reference is None:
        arrays.check_images(n)
        g = target_embedding(target, n).to(features.device)
        d, e, h = (
            Pairs(arrays.measured(ops.distances(rows), rows, name))
            for rows, name in ((x, "explained features"), (y, "given features"), (g, "target"))
        )
    elif pooled != reference.pooled:
        raise ValueError("pooled differs between the call and its reference set")
    else:
        inside_x, inside_y, inside_g = reference.distances
        labels = arrays.tensor(target, "target")
        arrays.check_same(len(labels) if labels.ndim else 0, len(features), "the target", "features")
        d = feature_distances_among(reference.explained, features, inside_x, "explained features", pooled)
        e = feature_distances_among(reference.given, others, inside_y, "given features", pooled)
        h = target_distances_among(reference.target, labels, inside_g)
    behind = None if reference is None else reference.explained
    means = None if behind is None else [geometry.gap(behind)]
    found = ops.explained([d], [e], h, [geometry.gap(features)], means, chosen, lap=lap)
    check_left(found.left, x, y)
    return Placed(features, found.weights[0], None if found.lap is None else found.lap[0], float(found.score.mean()), pooled, behind, ops)


def weighted(placed: Placed, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """(channel weights [n, C], maps [n, H, W]) of what was placed; elementwise weighting asks its Lap."""
    features, weights = placed.features, placed.weights
    if placed.pooled:  # a spatial mean hands 1/(HW) of its gradient to every position alike, so both weightings agree
        weights = weights / (features.shape[2] * features.shape[3])
    elif weighting == "elementwise":
        maps = geometry.elementwise_cam(features, placed.gradient())
        return weights.to(maps.dtype), maps
    maps = placed.ops.cam(features, weights)
    return weights.to(maps.dtype), maps


def feature_gradient(placed: Placed) -> Tensor:
    """dL/dF [n, C, H, W] of the explained features."""
    features, rows = placed.features, placed.gradient()
    if placed.pooled:
        return (rows / (features.shape[2] * features.shape[3]))[:, :, None, None].expand(features.shape)
    return rows.reshape(features.shape)


def _row_gradient(rows: Tensor, lap: Tensor, behind: Tensor | None) -> Tensor:
    return geometry.gradient(lap, rows) if behind is None else geometry.query_gradient(lap, rows, behind)


def check_left(left: Tensor, *rows: Tensor) -> None:
    """KdxError where ``left`` = ||R||/||D|| is rounding: the given features explain everything.

    rows: the features that distances were measured between, whose type says what rounding is.
    """
    if not bool((left > max(map(arrays.rounding, rows))).all()):  # so that NaN fails
        raise KdxError(
            "Nothing is left of the explained features without what the given features explain.",
            "Compare two different networks or layers; identical ones have no residual.",
        )


def rows_of(features: Tensor, pooled: bool) -> Tensor:
    """The rows [n, d] that distances are measured between."""
    return geometry.gap(features) if pooled else features.flatten(1)


def feature_distances_among(known: Tensor, queries: Tensor, inside: Tensor, name: str, pooled: bool = False) -> Pairs:
    """Distances of reference features [m, C, H, W] (inside [m, m]) and of each query [q, C, H, W] from them."""
    if queries.shape[1:] != known.shape[1:]:
        raise KdxError(
            f"The {name} are {list(queries.shape[1:])} an image, those of the reference set {list(known.shape[1:])}.",
            "Take both from the same layer of the same network.",
        )
    if len(queries) == 0:
        raise KdxError(f"There are no rows of {name}.", "Give at least one query.")
    rows = rows_of(queries, pooled)
    return _among_finite(inside, geometry.cross_distances(rows, rows_of(known, pooled)), rows, name)


def target_distances_among(known: Tensor, target: Tensor, inside: Tensor) -> Pairs:
    """The same for the targets, labels or embeddings of one kind."""
    if target.ndim == 0 or target.shape[1:] != known.shape[1:]:
        raise KdxError(
            f"The target is {list(target.shape)}, that of the reference set {list(known.shape)}.",
            "Give both as labels, or both as the same embedding.",
        )
    m = len(known)
    rows = target_embedding(torch.cat([known.to(target.device), target]), m + len(target)).to(inside.device)
    return _among_finite(inside, geometry.cross_distances(rows[m:], rows[:m]), rows[m:], "target")


def _among_finite(inside: Tensor, border: Tensor, rows: Tensor, name: str) -> Pairs:
    arrays.check_distances(border, rows, name)
    return Pairs(inside, border)
