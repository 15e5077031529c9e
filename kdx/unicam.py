"""UniCAM maps: where the explained network holds what the given network does not explain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kdx import arrays
from kdx.arrays import Array
from kdx.errors import KdxError
from kdx.kernels import geometry
from kdx.kernels.geometry import Laplacian

Weighting = Literal["gap", "elementwise"]
ObjectiveName = Literal["relevance", "uniqueness"]


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


class Reference:
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
        x, y = (_rows(features, pooled) for features in (self.explained, self.given))
        g = arrays.target_embedding(target, m)
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
    reference: Reference | None = None,
) -> Maps:
    """UniCAM maps of ``explained``'s features given ``given``'s, in closed form: no backward pass, nothing of size n x n x d.

    With A, B, G the U-centred distance matrices of the two networks' features and of the target, R = A - <A,B>/<B,B> B:
    the objective is L = <R,G>/sqrt(<R,R><G,G>) (relevance), L = sum_i max_j R_ij (uniqueness), or any differentiable
    function of R [n, n]. Channel weights a_ic = mean_hw dL/dF_ichw, maps ReLU(sum_c a_ic F_ic); ``elementwise`` weights
    each position with its own gradient (HiRes). Source: arXiv 2412.13943.

    explained, given: [n, C, H, W] or [n, d], float16 to float64, NumPy or PyTorch, on one device; channels and sizes may
    differ between the two. target: integer labels [n] or an embedding [n, e]. pooled: measure distances between spatial
    means instead of whole features. reference: place each image among these instead of among its batch mates.

    A map says where the features sit that raise L; it does not say that the network's prediction depends on them, and
    in a plain batch it changes with the other images.

    Raises KdxError for n < 4, one class, constant or non-finite features, rows that do not match, and features that
    ``given`` explains wholly.

    >>> import numpy as np, kdx
    >>> rng = np.random.default_rng(0)
    >>> student, base = rng.normal(size=(8, 6, 3, 3)), rng.normal(size=(8, 5, 3, 3))
    >>> distilled = kdx.unicam(student, base, np.arange(8) % 2)
    >>> distilled.maps.shape, distilled.weights.shape
    ((8, 3, 3), (8, 6))
    """
    check_weighting(weighting)
    with torch.no_grad():
        placed = place(explained, given, target, objective, pooled=pooled, reference=reference)
        weights, maps = weighted(placed.features, placed.lap.lap, weighting, pooled=pooled, references=placed.references)
        return Maps(arrays.like(maps, explained), arrays.like(weights, explained), placed.score)


def scaled(maps: Array, size: tuple[int, int] | None = None) -> Any:
    """Maps [n, H, W] min-max scaled to [0, 1] image by image, then resized (bilinear) to ``size`` (H, W) where given."""
    found = geometry.scaled(arrays.tensor(maps, "maps"))
    if size is not None:
        found = torch.nn.functional.interpolate(found[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return arrays.like(found, maps)


def check_weighting(weighting: str) -> None:
    if weighting not in ("gap", "elementwise"):
        raise ValueError(f"weighting must be 'gap' or 'elementwise', not {weighting!r}")


@dataclass(frozen=True)
class Placed:
    """Explained features [n, C, H, W] with Lap of an objective among them, or [n, m+1, m+1] each behind ``references`` [m, C, H, W]."""

    features: Tensor
    lap: Laplacian
    references: Tensor | None

    @property
    def score(self) -> float:
        """L; in reference mode its mean over the images."""
        return float(self.lap.score.mean())


def place(
    explained: Array,
    given: Array,
    target: Array,
    objective: ObjectiveName | Callable[[Tensor], Tensor],
    *,
    pooled: bool,
    reference: Reference | None,
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
    if reference is not None:
        if pooled != reference.pooled:
            raise ValueError("pooled differs between the call and its reference set")
        return _among(reference, features, others, target, chosen)
    arrays.check_images(n)
    x, y = _rows(features, pooled), _rows(others, pooled)
    g = arrays.target_embedding(target, n).to(features.device)
    d, e, h = (
        arrays.measured(geometry.distances(rows), rows, name)
        for rows, name in ((x, "explained features"), (y, "given features"), (g, "target"))
    )
    lap = geometry.laplacian(d, geometry.u_centered(d), geometry.u_centered(e), geometry.u_centered(h), chosen)
    return Placed(features, checked(lap, x, y), None)


def weighted(
    features: Tensor, lap: Tensor, weighting: Weighting, *, pooled: bool = False, references: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(channel weights [n, C], maps [n, H, W]) of features [n, C, H, W] under lap [n, n], or [n, m+1, m+1] behind references."""

    weights = _row_gradient(geometry.gap, features, lap, references)
    if pooled:  # a spatial mean hands 1/(HW) of its gradient to every position alike, so both weightings agree
        weights = weights / (features.shape[2] * features.shape[3])
    elif weighting == "elementwise":
        maps = geometry.elementwise_cam(features, _row_gradient(_flat, features, lap, references))
        return weights.to(maps.dtype), maps
    maps = geometry.cam(features, weights)
    return weights.to(maps.dtype), maps


def feature_gradient(placed: Placed, *, pooled: bool) -> Tensor:
    """dL/dF [n, C, H, W] of the explained features."""
    features = placed.features
    rows = _row_gradient(geometry.gap if pooled else _flat, features, placed.lap.lap, placed.references)
    if pooled:
        return (rows / (features.shape[2] * features.shape[3]))[:, :, None, None].expand(features.shape)
    return rows.reshape(features.shape)


def _row_gradient(rows: Callable[[Tensor], Tensor], features: Tensor, lap: Tensor, references: Tensor | None) -> Tensor:
    """dL/d(rows of the features) [n, k]."""
    if references is None:
        return geometry.gradient(lap, rows(features))
    return geometry.query_gradient(lap, rows(features), rows(references))


def checked(lap: Laplacian, *rows: Tensor) -> Laplacian:
    """``lap`` where more than rounding is left to explain; KdxError where the given features explain everything.

    rows: the features that distances were measured between, whose type says what rounding is.
    """
    if not bool((lap.left > max(map(arrays.rounding, rows))).all()):  # so that NaN fails
        raise KdxError(
            "The explained features hold nothing that the given features do not explain.",
            "Compare two different networks or layers; identical ones have no residual.",
        )
    return lap


def _flat(features: Tensor) -> Tensor:
    return features.flatten(1)


def _rows(features: Tensor, pooled: bool) -> Tensor:
    return geometry.gap(features) if pooled else _flat(features)


def _among(reference: Reference, features: Tensor, others: Tensor, target: Array, objective: geometry.Objective) -> Placed:
    """Each query [q, ...] behind the reference set, as the last of m + 1 images: only the last row of Lap is needed."""
    inside_x, inside_y, inside_g = reference.distances
    d = feature_distances_among(reference.explained, features, inside_x, "explained features", reference.pooled)
    e = feature_distances_among(reference.given, others, inside_y, "given features", reference.pooled)
    labels = arrays.tensor(target, "target")
    arrays.check_same(len(labels) if labels.ndim else 0, len(features), "the target", "features")
    h = target_distances_among(reference.target, labels, inside_g)
    lap = geometry.laplacian(d, geometry.u_centered(d), geometry.u_centered(e), geometry.u_centered(h), objective)
    checked(lap, _rows(features, reference.pooled), _rows(others, reference.pooled))
    return Placed(features, lap, reference.explained)


def feature_distances_among(known: Tensor, queries: Tensor, inside: Tensor, name: str, pooled: bool = False) -> Tensor:
    """Distances [q, m+1, m+1] of reference features [m, C, H, W] (inside [m, m]) and each query [q, C, H, W] behind them."""
    if queries.shape[1:] != known.shape[1:]:
        raise KdxError(
            f"The {name} are {list(queries.shape[1:])} an image, those of the reference set {list(known.shape[1:])}.",
            "Take both from the same layer of the same network.",
        )
    if len(queries) == 0:
        raise KdxError(f"There are no rows of {name}.", "Give at least one query.")
    rows = _rows(queries, pooled)
    return _among_finite(inside, geometry.cross_distances(rows, _rows(known, pooled)), rows, name)


def target_distances_among(known: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """The same for the targets, labels or embeddings of one kind."""
    if target.ndim == 0 or target.shape[1:] != known.shape[1:]:
        raise KdxError(
            f"The target is {list(target.shape)}, that of the reference set {list(known.shape)}.",
            "Give both as labels, or both as the same embedding.",
        )
    m = len(known)
    rows = arrays.target_embedding(torch.cat([known.to(target.device), target]), m + len(target)).to(inside.device)
    return _among_finite(inside, geometry.cross_distances(rows[m:], rows[:m]), rows[m:], "target")


def _among_finite(inside: Tensor, border: Tensor, rows: Tensor, name: str) -> Tensor:
    arrays.check_distances(border, rows, name)
    return geometry.bordered(inside, border)
