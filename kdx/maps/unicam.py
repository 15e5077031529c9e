"""UniCAM: maps of the features that one network has and another network does not explain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kdx.choices import ObjectiveName, Weighting
from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array, ArrayT, Labels
from kdx.features.target import Target
from kdx.kernels import ambient, dispatch, geometry, rounding
from kdx.kernels.cuda import Backend
from kdx.kernels.dispatch import ReferenceDistances, TorchBackend, UnicamWeights
from kdx.maps.scalable_maps import ScalableMaps
from kdx.roles import TARGET


@dataclass(frozen=True)
class Maps(ScalableMaps[ArrayT]):
    """UniCAM maps of one layer and one pair of networks. All arrays are of the same kind as the explained features.

    maps: [n, H, W] >= 0, at the resolution of the features, not scaled. Values are comparable between images of one call, and not
    between layers, networks or sets of images. A map is zero everywhere if its weighted channels add up to zero or less at every position.
    weights: the channel weights [n, C], the mean over h, w of the gradient of the objective L. They may be negative. Their unit is that of
    L divided by that of the features: for relevance, features in another unit have the same maps, and weights in the inverse unit.
    ``empty`` is the share of maps that are zero everywhere. A map of nothing but rounding error is zero, and so are its weights.
    score: the objective L; in reference mode its mean over the images.
    """

    maps: ArrayT
    weights: ArrayT
    score: float


class ReferenceSet:
    """A fixed set of m reference images for `unicam`. Each image is placed among them, and not among the others of its call.

    The map of an image then depends on that image and on this set alone. The distances between the references are computed once, here.

    explained, given: the two networks' features of the reference images, [m, C, H, W] or [m, d]; given is None for a call without given
    features. target: their labels [m] or embedding [m, e]. pooled: as in the call of `unicam`. Choose class-balanced images. The features
    of a later call must come from the same layers of the same networks, and its target must be labels with the same meaning, or an
    embedding in the same space.

    Raises KdxError for what `unicam` refuses: m < 4, one class, constant or non-finite features, and numbers of rows that differ.
    """

    @ambient.neutral()
    def __init__(self, explained: Array, given: Array | None, target: Labels, *, pooled: bool = False) -> None:
        self.explained = arrays.feature_map(explained, "explained features of the reference set")
        self.given = None if given is None else arrays.feature_map(given, "given features of the reference set")
        self.pooled = pooled
        m = self.explained.shape[0]
        arrays.check_images(m)
        rows = {"explained features": self.explained}
        if self.given is not None:
            arrays.check_same(self.given.shape[0], m, "given features", "explained features")
            rows["given features"] = self.given
        self.distances = arrays.row_distances({name: distance_rows(value, pooled) for name, value in rows.items()}, TorchBackend())
        self.target = Target.of(target, m, device=self.explained.device).checked()


@ambient.neutral()
def unicam(
    explained: ArrayT,
    given: Array | None,
    target: Labels,
    objective: ObjectiveName | Callable[[Tensor], Tensor] = "relevance",
    weighting: Weighting = "gap",
    *,
    pooled: bool = False,
    reference: ReferenceSet | None = None,
    backend: Backend = "auto",
) -> Maps[ArrayT]:
    """UniCAM maps: where the explained network has features that matter to the target and that the given network does not explain.

    Let A, B and G be the U-centred distance matrices [n, n] of the explained features, the given features and the target, and
    R = A - (<A,B>/<B,B>) B the residual of A. The objective L is

        relevance:    L = <R,G>/sqrt(<R,R><G,G>)
        uniqueness:   L = sum_i max_j R_ij

    or any differentiable function of R, which it receives as a stack [..., n, n]; it returns one value per matrix. With F [n, C, H, W]
    the explained features, the channel weights and maps are

        a_ic = mean over h, w of dL/dF_ichw,        map_i = ReLU(sum_c a_ic F_ic).

    ``given=None`` maps one network alone: nothing is projected, R = A, and the relevance L is RS(X), the distance correlation of features
    and target. With ``elementwise`` weighting each position has its own gradient (HiRes): map_ihw = ReLU(sum_c dL/dF_ichw F_ichw).
    Everything is computed in closed form, without a backward pass and without arrays of n x n x d. Source: Adhane et al., "On Explaining
    Knowledge Distillation: Measuring and Visualising the Knowledge Transfer Process", WACV 2025, arXiv 2412.13943.

    explained, given: features of the same images, [n, C, H, W] or [n, d], float16, bfloat16, float32 or float64, NumPy or PyTorch, on one
    device. The two may differ in channels and size. target: integer labels [n] or an embedding [n, e]. objective, weighting: see above.
    pooled: measure distances between the spatial means of the features instead of the whole features. reference: place each image among
    these images instead of among its batch; any n >= 1 is then allowed. backend: ``torch``, or ``cuda`` for the CUDA kernels; ``auto`` uses
    the kernels for features on a GPU that can run them.

    A map shows where the features that raise L are. It does not show that the network's prediction depends on them. Without
    ``reference``, a map changes with the other images of the batch. With four images and given features all maps of the relevance objective
    are zero.

    Raises KdxError for fewer than four images, a target with one class or one image per class, constant or non-finite features, numbers of
    rows that differ, features that ``given`` explains completely, and the backend ``cuda`` where it cannot run. Raises ValueError for
    an unknown objective, weighting or backend.

    >>> import numpy as np, kdx
    >>> rng = np.random.default_rng(0)
    >>> student, base = rng.normal(size=(8, 6, 3, 3)), rng.normal(size=(8, 5, 3, 3))
    >>> distilled = kdx.unicam(student, base, np.arange(8) % 2)
    >>> distilled.maps.shape, distilled.weights.shape
    ((8, 3, 3), (8, 6))
    """
    check_weighting(weighting)
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
    """Raise ValueError for an unknown weighting."""
    if weighting not in ("gap", "elementwise"):
        raise ValueError(f"weighting must be 'gap' or 'elementwise', not {weighting!r}")


@dataclass(frozen=True, eq=False)
class PairGeometry:
    """The UniCAM gradient of one pair of networks, with the explained features that it is applied to.

    features: [n, C, H, W]. weights [n, C]: Lap times the spatial means of the features. laplacian: the matrix Lap [n, n] with
    dL/dX = Lap X; in reference mode [n, m+1, m+1], where each image is the last row behind the ``references`` [m, C, H, W]; None if not
    requested. score: L; in reference mode its mean over the images. ops: the backend. pooled: whether the rows X, between which distances
    are measured, are spatial means.
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
        """The explained network at this index of a solution, whose means have `rounding.with_probes`."""
        laplacian = None if solution.laplacians is None else solution.laplacians[index]
        # A user's objective returns a scalar, for a stack of one network.
        score = solution.score[index] if solution.score.ndim else solution.score
        weights = rounding.probed(solution.weights[index], features, together=references is None)
        return cls(features, weights, laplacian, float(score.mean()), ops, pooled, references)

    def maps(self, weighting: Weighting) -> tuple[Tensor, Tensor]:
        """(channel weights [n, C], maps [n, H, W]). Elementwise weighting needs the Laplacian, unless the features are pooled."""
        features, weights = self.features, self.weights
        if self.pooled:  # every position gets 1/(HW) of a spatial mean's gradient, so both weightings agree
            weights = weights / (features.shape[2] * features.shape[3])
        elif weighting == "elementwise":
            gradient, exponent = self._row_gradient()
            maps = geometry.times_power(geometry.elementwise_cam(features, gradient), exponent)
            return weights.to(maps.dtype), maps
        # Weights are as large as the features are small, and may not be normal numbers in the type of the features.
        normal, exponents = geometry.split_exponent(weights)
        maps = geometry.times_power(self.ops.cam(features, normal), exponents)
        return weights.to(maps.dtype), maps

    def feature_gradient(self) -> tuple[Tensor, Tensor]:
        """dL/dF [n, C, H, W] of the explained features, as (g, e) with dL/dF = 2^e g, which the type of the features can represent."""
        features, (gradient, exponent) = self.features, self._row_gradient()
        if self.pooled:
            return (gradient / (features.shape[2] * features.shape[3]))[:, :, None, None].expand(features.shape), exponent
        return gradient.reshape(features.shape), exponent

    def _row_gradient(self) -> tuple[Tensor, Tensor]:
        """dL/dX [n, d] of the rows X that distances were measured between, as (g, e) with dL/dX = 2^e g and g independent of X's scale."""
        assert self.laplacian is not None
        rows = distance_rows(self.features, self.pooled)
        # Lap is about 1/|X|^2. With half of its exponent removed, Lap X and the products of Lap X with X are normal numbers.
        exponent = torch.frexp(self.laplacian.abs().amax()).exponent // 2
        laplacian = torch.ldexp(self.laplacian, -exponent)
        if self.references is None:
            return geometry.gradient(laplacian, rows), exponent
        return geometry.query_gradient(laplacian, rows, distance_rows(self.references, self.pooled)), exponent


def pair_geometry(
    explained: Array,
    given: Array | None,
    target: Labels,
    objective: ObjectiveName | Callable[[Tensor], Tensor],
    *,
    pooled: bool,
    reference: ReferenceSet | None,
    backend: Backend = "auto",
    laplacian: bool = True,
) -> PairGeometry:
    """The n x n part of `unicam`, with the same arguments. laplacian: whether the result contains the Laplacian."""
    features = arrays.feature_map(explained, "explained features")
    others = None if given is None else arrays.feature_map(given, "given features")
    if others is not None:
        arrays.check_same(others.shape[0], features.shape[0], "given features", "explained features")
        arrays.check_same_device(others.device, features.device, "given features", "explained features")
    if not callable(objective) and objective not in geometry.OBJECTIVES:
        raise ValueError(f"objective must be one of {sorted(geometry.OBJECTIVES)} or a function of R, not {objective!r}")
    chosen = geometry.differentiated(objective) if callable(objective) else geometry.OBJECTIVES[objective]
    pair = _Pair(features, others, chosen, dispatch.chosen(features, backend), pooled, laplacian)
    solution = pair.among_each_other(target) if reference is None else pair.among_references(target, reference)
    if others is not None:
        check_residual(solution.residual_share, *pair.rows.values())
    references = None if reference is None else reference.explained
    return PairGeometry.of(features, solution, 0, pair.ops, pooled=pooled, references=references)


@dataclass(frozen=True, eq=False)
class _Pair:
    """Features [n, C, H, W] of the same images, of one network or of two, and what is computed from them. laplacian: whether it is
    requested."""

    explained: Tensor
    given: Tensor | None
    objective: geometry.Objective
    ops: TorchBackend
    pooled: bool
    laplacian: bool

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """The rows of each network, between which distances are measured."""
        features = {"explained features": self.explained, "given features": self.given}
        return {name: distance_rows(values, self.pooled) for name, values in features.items() if values is not None}

    def among_each_other(self, target: Labels) -> UnicamWeights:
        """The weights of images among the other images of the batch."""
        n = len(self.explained)
        arrays.check_images(n)
        goal = Target.of(target, n, device=self.explained.device, backend=self.ops)
        networks = arrays.row_distances(self.rows, self.ops)
        means = [rounding.with_probes(self.ops.means(self.explained), self.explained)]
        return self.ops.channel_weights(
            networks.select([0]),
            None if self.given is None else networks.select([1]),
            goal.distances,
            means,
            self.objective,
            laplacians=self.laplacian,
        )

    def among_references(self, target: Labels, reference: ReferenceSet) -> UnicamWeights:
        """The weights of each image among the reference images."""
        if self.pooled != reference.pooled:
            raise ValueError("pooled differs between the call and its reference set")
        if (self.given is None) != (reference.given is None):
            raise ValueError("either the call or its reference set has given features, and the other has none")
        queries = arrays.tensor(reference.target.names.target(target), TARGET)
        arrays.check_same(len(queries) if queries.ndim else 0, len(self.explained), "labels or class embeddings", "features")
        among, given = reference.distances, None
        if self.given is not None and reference.given is not None:
            given = [reference_distances(reference.given, self.given, among.raw[1], "given features", self.pooled)]
        return self.ops.query_channel_weights(
            [reference_distances(reference.explained, self.explained, among.raw[0], "explained features", self.pooled)],
            given,
            reference.target.reference_distances(queries),
            [rounding.with_probes(self.ops.means(self.explained), self.explained)],
            [rounding.with_probes(self.ops.means(reference.explained), reference.explained, seed=1)],
            self.objective,
            laplacians=self.laplacian,
        )


def check_residual(share: Tensor, *rows: Tensor, rounding: float = 0.0) -> None:
    """Raise KdxError if ``share`` = ||R||/||D|| is only rounding error: then the given features explain the explained ones completely.

    rows: the features that distances were measured between; their type and width determine the rounding. rounding: it, if it is known.
    """
    if not bool((share > max((rounding, *map(arrays.rounding, rows)))).all()):  # in this form NaN fails too
        raise KdxError(
            "Nothing is left of the explained features: the given features explain them completely.",
            "Compare two different networks or layers; identical networks have no residual.",
        )


def distance_rows(features: Tensor, pooled: bool) -> Tensor:
    """The rows [n, d] between which distances are measured."""
    return geometry.gap(features) if pooled else features.flatten(1)


def reference_distances(known: Tensor, queries: Tensor, inside: Tensor, name: str, pooled: bool = False) -> ReferenceDistances:
    """The distances of reference mode: ``inside`` [m, m] between the features ``known`` [m, C, H, W], and from each query to them."""
    if queries.shape[1:] != known.shape[1:]:
        raise KdxError(
            f"The {name} have shape {list(queries.shape[1:])} per image, and those of the reference set have {list(known.shape[1:])}.",
            "Take both from the same layer of the same network.",
        )
    if len(queries) == 0:
        raise KdxError(f"There are no rows of {name}.", "Give at least one query.")
    rows = distance_rows(queries, pooled)
    border = geometry.cross_distances(rows, distance_rows(known, pooled))
    arrays.check_distances(border, rows, name)
    return ReferenceDistances(inside, border)
