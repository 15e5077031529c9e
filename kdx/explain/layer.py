"""Maps and inner products of one layer and one batch: one Gram product per network.

`measure` computes both from features. `measure_distances` computes the inner products alone, from distances that another program has
measured. `kdx.scores.pool` turns inner products, summed over any number of batches, into scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kdx.choices import Weighting
from kdx.explain import fused_layer
from kdx.explain.layer_graphs import LayerGraphs
from kdx.features import arrays
from kdx.features.target import Target
from kdx.kernels import ambient, dispatch, geometry, moments, rounding
from kdx.kernels.cuda import Backend
from kdx.kernels.dispatch import BatchDistances
from kdx.kernels.moments import Moments
from kdx.kernels.positions import PositionGeometry
from kdx.maps.unicam import Maps, PairGeometry, check_residual, distance_rows, reference_distances
from kdx.roles import TARGET, mapped_among, maps_among, pairs_among, permuted_among, roles_among, shares_among
from kdx.scores import uncertainty


@dataclass(frozen=True)
class LayerReferences:
    """Reference mode at one layer: each role's features of the reference images [m, C, H, W], their distances [r, m, m], their target."""

    features: Mapping[str, Tensor]
    distances: Tensor
    target: Target

    @classmethod
    def of(cls, features: Mapping[str, Tensor], labels: Tensor, *, pooled: bool = False) -> LayerReferences:
        return cls(features, _distances(features, _backend(features), pooled).raw, Target.of(labels).checked())


@dataclass(frozen=True)
class LayerMethod:
    """How a layer is measured. objective, weighting, pooled: as in `kdx.unicam`. shares: whether the shares are computed as well."""

    objective: geometry.Objective = geometry.relevance
    weighting: Weighting = "gap"
    pooled: bool = False
    shares: bool = True


@dataclass(frozen=True)
class LayerMeasurement:
    """One batch at one layer, with r roles.

    maps: a `Maps` for each name of `maps_among`. shares: for each (role, matrix) of `shares_among`, the share [2, n, h, w] of every image
    and position in their inner product, with each half of the images as context; everything adds up to the inner product. An explainer
    file gives [1, n, h, w], with all images as one context. Empty where the scores are of other features than the maps, and with pooled
    features.
    products: inner products [r + 1, r + 1] of the roles' matrices and, last, the target's. permuted: for each name of `permuted_among`,
    the inner products [p, r + 1] of its matrix with all of them, under p permutations of its images. moments: the sampling moments of the
    products; None for four images, where three would remain without one.
    """

    maps: dict[str, Maps[Tensor]]
    shares: dict[tuple[str, str], Tensor]
    products: Tensor
    permuted: dict[str, Tensor]
    moments: Moments | None


@dataclass(frozen=True, eq=False)
class PendingMeasurement:
    """A measurement that a GPU may still be computing.

    numbers: the float64 numbers on the device that `result` reads. Copy them to the processor with the other results, and give `result` the
    copy, so that it does not wait. The tensor is empty if the measurement is complete.
    expected: the measurement if the features are as usual. Until `result` has confirmed that, its tensors may be invalid, and the scores
    of its maps are unknown (NaN), unless the measurement is complete.
    """

    numbers: Tensor
    expected: LayerMeasurement
    _result: Callable[[Sequence[float]], LayerMeasurement] | None = None

    @ambient.neutral()
    def result(self, numbers: Tensor | None = None) -> LayerMeasurement:
        """The measurement; its tensors remain on the device. numbers: a copy of ``numbers``, or None to read it here.

        Its tensors are those of ``expected``, unless the features are unusual. Raises the errors of `measure`.
        """
        return self.expected if self._result is None else self._result((self.numbers if numbers is None else numbers).tolist())

    @classmethod
    def complete(cls, measurement: LayerMeasurement) -> Self:
        return cls(measurement.products.new_empty(0), measurement)


def begin(
    features: Mapping[str, Tensor],
    target: Target,
    permutations: Tensor,
    method: LayerMethod = LayerMethod(),
    *,
    references: LayerReferences | None = None,
    distances: Mapping[str, BatchDistances] | None = None,
    backend: Backend = "auto",
    graphs: LayerGraphs | None = None,
) -> PendingMeasurement:
    """`measure` without waiting for a GPU, if the kernels can compute everything that is requested.

    graphs: the captured computations of batches of the same shapes, each of which is one launch; None to launch each kernel.
    The features stay in memory until the result is read. Raises what `measure` raises if it has to be computed at once.
    """
    ops, name = _backend(features, backend), dispatch.kernel_objective(method.objective)

    def at_once() -> LayerMeasurement:
        return _measure(features, target, permutations, method, references, distances, ops)

    is_plain = method.weighting == "gap" and references is None and distances is None and not method.pooled
    if not (isinstance(ops, dispatch.CudaBackend) and name is not None and is_plain and fused_layer.applies(features)):
        return PendingMeasurement.complete(at_once())
    graphs = LayerGraphs() if graphs is None else graphs
    labels = target.values if target.values.dtype == torch.int64 and target.values.ndim == 1 else None
    computed = graphs.measure(features, target.distances.raw, labels, name, permutations, shares=method.shares)

    def measurement(scores: Mapping[str, float]) -> LayerMeasurement:
        maps = {name: Maps(values, weights, scores[name]) for name, (values, weights) in computed.maps.items()}
        return LayerMeasurement(maps, computed.shares, computed.products, computed.permuted, computed.moments)

    def checked(numbers: Sequence[float]) -> LayerMeasurement:
        scores = computed.scores(numbers)
        return at_once() if scores is None else measurement(scores)

    return PendingMeasurement(computed.numbers, measurement(dict.fromkeys(computed.maps, math.nan)), checked)


def measure(
    features: Mapping[str, Tensor],
    target: Target,
    permutations: Tensor,
    method: LayerMethod = LayerMethod(),
    *,
    references: LayerReferences | None = None,
    distances: Mapping[str, BatchDistances] | None = None,
    backend: Backend = "auto",
) -> LayerMeasurement:
    """The maps and inner products of one layer and one batch, from each role's features [n, C, H, W].

    permutations: [p, n]. references: if given, the maps are those of reference mode; they must have been made with the same ``pooled``.
    distances: if given, the inner products are those of these distances, between each role's other features of the same images.
    backend: as in `kdx.unicam`.
    """
    return begin(features, target, permutations, method, references=references, distances=distances, backend=backend).result()


def _measure(
    features: Mapping[str, Tensor],
    target: Target,
    permutations: Tensor,
    method: LayerMethod,
    references: LayerReferences | None,
    distances: Mapping[str, BatchDistances] | None,
    ops: dispatch.TorchBackend,
) -> LayerMeasurement:
    """`measure`, step by step: each check waits for its numbers."""
    roles = roles_among(features)
    parts: dict[tuple[str, str], Tensor] = {}
    # The shares would be those of other scores than ``distances`` have, and distances between means have none.
    if not method.shares or method.pooled or distances is not None:
        among = _distances(features, ops, method.pooled)
    else:
        positions = {role: ops.positions(features[role].flatten(2)) for role in roles}
        rows = {f"{role}'s features": features[role].flatten(1) for role in roles}
        among = arrays.checked_distances(torch.stack([positions[role].distances for role in roles]), rows)
        parts = _shares(features, positions, among, target)
    maps = _maps(features, among, target, method, references, ops)
    if distances is not None:
        among = _stack([distances[role] for role in roles])
        _check_residuals(roles, among, target)
    return LayerMeasurement(maps, parts, *_products(roles, among, target, permutations))


def _maps(
    features: Mapping[str, Tensor],
    distances: BatchDistances,
    target: Target,
    method: LayerMethod,
    references: LayerReferences | None,
    ops: dispatch.TorchBackend,
) -> dict[str, Maps[Tensor]]:
    """The maps of `measure`, from features and the distances [r, n, n] between them."""
    roles = roles_among(features)
    among = maps_among(roles)
    explained = [role for role, _ in among.values()]
    given = [role for _, role in among.values() if role is not None]  # no map, or every map, is given another network
    means = {role: rounding.with_probes(ops.means(features[role]), features[role]) for role in roles}
    explained_means = [means[role] for role in explained]
    laplacians = method.weighting == "elementwise" and not method.pooled
    if references is None:
        solution = ops.channel_weights(
            distances.select([roles.index(role) for role in explained]),
            distances.select([roles.index(role) for role in given]) if given else None,
            target.distances,
            explained_means,
            method.objective,
            laplacians=laplacians,
        )
    else:
        known = references.features
        pairs = {
            role: reference_distances(known[role], features[role], references.distances[i], f"{role}'s features", method.pooled)
            for i, role in enumerate(roles)
        }
        reference_means = {role: rounding.with_probes(ops.means(known[role]), known[role], seed=1) for role in roles}
        solution = ops.query_channel_weights(
            [pairs[role] for role in explained],
            [pairs[role] for role in given] or None,
            references.target.reference_distances(target.values),
            explained_means,
            [reference_means[role] for role in explained],
            method.objective,
            laplacians=laplacians,
        )
    if given:
        check_residual(solution.residual_share, *(distance_rows(features[role], method.pooled) for role in roles))
    maps = {}
    for index, (name, role) in enumerate(zip(among, explained, strict=True)):
        known_features = None if references is None else references.features[role]
        pair = PairGeometry.of(features[role], solution, index, ops, pooled=method.pooled, references=known_features)
        weights, values = pair.maps(method.weighting)
        maps[name] = Maps(values, weights, pair.score)
    return maps


def _shares(
    features: Mapping[str, Tensor], positions: Mapping[str, PositionGeometry], distances: BatchDistances, target: Target
) -> dict[tuple[str, str], Tensor]:
    """The shares of `LayerMeasurement`, from features, the geometry of their positions, and the distances [r, n, n] between them."""
    roles = roles_among(features)
    centred = {**dict(zip(roles, distances.centred, strict=True)), TARGET: target.distances.centred}
    n = len(target.values)
    result = {}
    for role in mapped_among(roles):
        names = [matrix for share_role, matrix in shares_among(roles) if share_role == role]
        contexts = [slice(0, n, 2), slice(1, n, 2)]
        values = positions[role].shares(torch.stack([centred[name] for name in names]), contexts)
        for name, value in zip(names, values.unbind(1), strict=True):
            result[role, name] = (value / (n * (n - 3))).unflatten(2, features[role].shape[2:])
    return result


def measure_distances(
    distances: Mapping[str, Tensor], target: Target, permutations: Tensor
) -> tuple[Tensor, dict[str, Tensor], Moments | None]:
    """The inner products of a `LayerMeasurement`, (products, permuted, moments), from each role's distances [n, n], without features.

    Raises KdxError for distances that are not finite, for distances that are all equal, and if one network's distances explain all of
    another's.
    """
    roles = roles_among(distances)
    for role in roles:
        arrays.check_same(len(distances[role]), len(target.values), f"the {role}'s distances", "labels or class embeddings")
    d = torch.stack([distances[role].to(target.distances.raw) for role in roles])
    among = arrays.checked_distances(d, {f"{role}'s features": distances[role] for role in roles})
    _check_residuals(roles, among, target, *distances.values())
    return _products(roles, among, target, permutations)


def _check_residuals(roles: Sequence[str], distances: BatchDistances, target: Target, *rows: Tensor) -> None:
    """`check_residual` for each map of two networks, from distances [r, n, n] alone."""
    pairs = pairs_among(roles)
    if not pairs:
        return
    explained, given = ([roles.index(role) for role in side] for side in zip(*pairs.values(), strict=True))
    d, e = distances.select(explained), distances.select(given)
    check_residual(geometry.laplacian(d.raw, d.centred, e.centred, target.distances.centred).left, *(rows or distances.raw))


def _products(
    roles: Sequence[str], distances: BatchDistances, target: Target, permutations: Tensor
) -> tuple[Tensor, dict[str, Tensor], Moments | None]:
    """(products, permuted, moments) of a `LayerMeasurement`, from distances [r, n, n] in the order of ``roles``."""
    matrices = torch.cat([distances.centred, target.distances.centred[None]])
    permuted = {
        name: uncertainty.permuted_target_products(matrices, target, permutations)
        if name == TARGET
        else geometry.permuted_products(matrices, distances.centred[roles.index(name)], permutations)
        for name in permuted_among(roles)
    }
    return geometry.products(matrices), permuted, moments.of_matrices(matrices)


def _backend(features: Mapping[str, Tensor], backend: Backend = "auto") -> dispatch.TorchBackend:
    return dispatch.chosen(features["student"], backend)


def _distances(features: Mapping[str, Tensor], ops: dispatch.TorchBackend, pooled: bool) -> BatchDistances:
    """The distances [r, n, n] between each role's features, in the order of MEASURED, checked."""
    return arrays.row_distances({f"{role}'s features": distance_rows(features[role], pooled) for role in roles_among(features)}, ops)


def _stack(distances: Sequence[BatchDistances]) -> BatchDistances:
    return BatchDistances(torch.stack([d.raw for d in distances]), torch.stack([d.centred for d in distances]))
