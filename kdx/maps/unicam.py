"""UniCAM maps: where the explained network holds what the given network does not explain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from kdx.choices import ObjectiveName, Weighting
from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array, ArrayT
from kdx.features.target import Target
from kdx.kernels import dispatch, geometry
from kdx.kernels.cuda import Backend
from kdx.kernels.dispatch import ReferenceDistances, TorchBackend, UnicamWeights
from kdx.maps.scaling import scaled
from kdx.roles import TARGET


@dataclass(frozen=True)
class Maps(Generic[ArrayT]):
    """UniCAM of one layer and one pair of networks.

    maps: [n, H, W] >= 0, at feature resolution, before scaling; comparable within one image, not between images.
    weights: [n, C], the mean over h, w of the objective's gradient.
    score: the objective's value (in reference mode its mean over the images).
    """

    maps: ArrayT
    weights: ArrayT
    score: float

    def scaled(self, size: tuple[int, int] | None = None) -> ArrayT:
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
        self.pooled = pooled
        m = self.explained.shape[0]
        arrays.check_images(m)
        arrays.check_same(self.given.shape[0], m, "given features", "explained features")
        rows = {"explained features": self.explained, "given features": self.given}
        self.distances = arrays.checked_distances({name: distance_rows(value, pooled) for name, value in rows.items()}, TorchBackend())
        self.target = Target.of(target, m)
        self.target.distances  # noqa: B018 - refuses a target without geometry here, before any query


def unicam(
    explained: ArrayT,
    given: Array,
    target: Array,
    objective: ObjectiveName | Callable[[Tensor], Tensor] = "relevance",
    weighting: Weighting = "gap",
    *,
    pooled: bool = False,
    reference: ReferenceSet | None = None,
    backend: Backend = "auto",
) -> Maps[ArrayT]:
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
        pair = pair_geometry(
            explained,
            given,
            target,
            objective,
            pooled=pooled,
            reference=reference,
            backend=backend,
            laplacian=weighting == "elementwise",
        )
        weights, maps = pair.maps(weighting)
        return Maps(arrays.like(maps, explained), arrays.like(weights, explained), pair.score)


def check_weighting(weighting: str) -> None:
    if weighting not in ("gap", "elementwise"):
        raise ValueError(f"weighting must be 'gap' or 'elementwise', not {weighting!r}")


@dataclass(frozen=True, eq=False)
class PairGeometry:
    """One explained network's features, and what the geometry of the pair, explained and given, says about them.

    features: [n, C, H, W]. weights [n, C]: the gradient of L with respect to the channels' spatial means, which for pooled features is
    the gradient of the rows X themselves. laplacian: Lap [n, n] with dL/dX = Lap X; in reference mode [n, m+1, m+1], each image behind
    the ``references`` [m, C, H, W]; None if not requested. score: L; in reference mode its mean over the images. pooled: whether
    distances were measured between spatial means. ops: the backend.
    """

    features: Tensor
    weights: Tensor
    laplacian: Tensor | None
    score: float
    ops: TorchBackend
    pooled: bool = False
    references: Tensor | None = None

    @classmethod
    def of(
        cls,
        features: Tensor,
        solution: UnicamWeights,
        index: int,
        ops: TorchBackend,
        *,
        pooled: bool = False,
        references: Tensor | None = None,
    ) -> PairGeometry:
        """The explained network at this index of a solution."""
        laplacian = None if solution.laplacians is None else solution.laplacians[index]
        # A user's objective may reduce the stack, which then has one network, to a scalar.
        score = solution.score[index] if solution.score.ndim else solution.score
        return cls(features, solution.weights[index], laplacian, float(score.mean()), ops, pooled, references)

    def maps(self, weighting: Weighting) -> tuple[Tensor, Tensor]:
        """(channel weights [n, C], maps [n, H, W]). Elementwise weighting of features that are not pooled needs the Laplacian."""
        features, weights = self.features, self.weights
        if self.pooled:  # every position gets 1/(HW) of a spatial mean's gradient, so both weightings agree
            weights = weights / (features.shape[2] * features.shape[3])
        elif weighting == "elementwise":
            maps = geometry.elementwise_cam(features, self._row_gradient())
            return weights.to(maps.dtype), maps
        maps = self.ops.cam(features, weights)
        return weights.to(maps.dtype), maps

    def feature_gradient(self) -> Tensor:
        """dL/dF [n, C, H, W] of the explained features."""
        features, gradient = self.features, self._row_gradient()
        if self.pooled:
            return (gradient / (features.shape[2] * features.shape[3]))[:, :, None, None].expand(features.shape)
        return gradient.reshape(features.shape)

    def _row_gradient(self) -> Tensor:
        """dL/dX [n, d] of the rows X that distances were measured between."""
        assert self.laplacian is not None
        rows = distance_rows(self.features, self.pooled)
        if self.references is None:
            return geometry.gradient(self.laplacian, rows)
        return geometry.query_gradient(self.laplacian, rows, distance_rows(self.references, self.pooled))


def pair_geometry(
    explained: Array,
    given: Array,
    target: Array,
    objective: ObjectiveName | Callable[[Tensor], Tensor],
    *,
    pooled: bool,
    reference: ReferenceSet | None,
    backend: Backend = "auto",
    laplacian: bool = True,
) -> PairGeometry:
    """The n x n part of `unicam`, whose arguments these are. laplacian: whether the result contains it."""
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
    x, y = distance_rows(features, pooled), distance_rows(others, pooled)
    means = [geometry.gap(features)]
    if reference is None:
        arrays.check_images(n)
        goal = Target.of(target, n, device=features.device, backend=ops)
        networks = arrays.checked_distances({"explained features": x, "given features": y}, ops)
        solution = ops.channel_weights(networks.select([0]), networks.select([1]), goal.distances, means, chosen, laplacians=laplacian)
    elif pooled != reference.pooled:
        raise ValueError("pooled differs between the call and its reference set")
    else:
        queries = arrays.tensor(target, TARGET)
        arrays.check_same(len(queries) if queries.ndim else 0, n, "the target", "features")
        among = reference.distances
        solution = ops.query_channel_weights(
            [reference_distances(reference.explained, features, among.raw[0], "explained features", pooled)],
            [reference_distances(reference.given, others, among.raw[1], "given features", pooled)],
            reference.target.reference_distances(queries),
            means,
            [geometry.gap(reference.explained)],
            chosen,
            laplacians=laplacian,
        )
    check_residual(solution.residual_share, x, y)
    references = None if reference is None else reference.explained
    return PairGeometry.of(features, solution, 0, ops, pooled=pooled, references=references)


def check_residual(share: Tensor, *rows: Tensor) -> None:
    """KdxError if ``share`` = ||R||/||D|| is only rounding: the given features explain everything.

    rows: the features that distances were measured between, whose type and width determine the rounding.
    """
    if not bool((share > max(map(arrays.rounding, rows))).all()):  # in this form NaN fails too
        raise KdxError(
            "Nothing is left of the explained features without what the given features explain.",
            "Compare two different networks or layers; identical ones have no residual.",
        )


def distance_rows(features: Tensor, pooled: bool) -> Tensor:
    """The rows [n, d] that distances are measured between."""
    return geometry.gap(features) if pooled else features.flatten(1)


def reference_distances(known: Tensor, queries: Tensor, inside: Tensor, name: str, pooled: bool = False) -> ReferenceDistances:
    """Distances between the reference features [m, C, H, W] (inside [m, m]), and from each query [q, C, H, W] to them."""
    if queries.shape[1:] != known.shape[1:]:
        raise KdxError(
            f"The {name} are {list(queries.shape[1:])} per image, those of the reference set {list(known.shape[1:])}.",
            "Take both from the same layer of the same network.",
        )
    if len(queries) == 0:
        raise KdxError(f"There are no rows of {name}.", "Give at least one query.")
    rows = distance_rows(queries, pooled)
    border = geometry.cross_distances(rows, distance_rows(known, pooled))
    arrays.check_distances(border, rows, name)
    return ReferenceDistances(inside, border)
