"""What passed from teacher to student at one layer: maps and scores, from one Gram product a network.

Geometry of a batch is measured once (`measure`, or `measure_distances` for what scores need where distances are at hand);
scores over any number of batches are ratios of summed inner products (`Pool`). A computation has a student and a base, and a
teacher or none: without one, the maps, scores and contrasts are those of the tables below that do not name it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.choices import Weighting
from kdx.features import arrays
from kdx.features.arrays import checked_centred
from kdx.features.target import Target
from kdx.kernels import dispatch, geometry
from kdx.kernels.cuda import Backend
from kdx.kernels.dispatch import Pairs
from kdx.maps.unicam import Maps, Placed, check_left, feature_distances_among, target_distances_among, weighted
from kdx.roles import TARGET, maps_among, permuted_among, roles_among
from kdx.scores import uncertainty


@dataclass(frozen=True)
class LayerReferences:
    """Reference mode at one layer: the features of the reference images a role, and every distance among them [r, m, m]."""

    features: Mapping[str, Tensor]
    distances: Tensor
    labels: Tensor
    target: Target

    @classmethod
    def of(cls, features: Mapping[str, Tensor], labels: Tensor) -> LayerReferences:
        distances, _ = _distances(features, _chosen(features))
        return cls(features, distances, labels, Target.of(labels))


@dataclass(frozen=True)
class LayerMeasurement:
    """One batch at one layer, of r roles.

    maps: a `Maps` a name of MAPS. products: inner products [r + 1, r + 1] of the roles' matrices and, last, the target's.
    permuted: a name of `permuted_among` -> its inner products [p, r + 1] with all of them, as p permutations move its images.
    left_out: products [n, r + 1, r + 1] without each image in turn (None below five images).
    """

    maps: dict[str, Maps]
    products: Tensor
    permuted: dict[str, Tensor]
    left_out: Tensor | None


def measure(
    features: Mapping[str, Tensor],
    target: Target,
    *,
    objective: geometry.Objective = geometry.relevance,
    weighting: Weighting = "gap",
    permutations: Tensor,
    references: LayerReferences | None = None,
    labels: Tensor | None = None,
    distances: Mapping[str, Tensor] | None = None,
    backend: Backend = "auto",
) -> LayerMeasurement:
    """Everything kdx says of one layer of one batch, from each role's features [n, C, H, W].

    permutations [p, n]. references: maps in reference mode, where ``labels`` [n] place the batch among the references. distances:
    each role's [n, n] of other features of these images, which the inner products are then of. backend: as in `kdx.unicam`.
    """
    roles, ops = roles_among(features), _chosen(features, backend)
    d, centred = _distances(features, ops)
    maps = _maps(features, d, target, objective, weighting, references, labels, ops)
    if distances is None:
        return LayerMeasurement(maps, *_products(roles, d, centred, target, permutations))
    return LayerMeasurement(maps, *measure_distances(distances, target, permutations))


def _maps(
    features: Mapping[str, Tensor],
    d: Tensor,
    target: Target,
    objective: geometry.Objective,
    weighting: Weighting,
    references: LayerReferences | None,
    labels: Tensor | None,
    ops: dispatch.TorchBackend,
) -> dict[str, Maps]:
    """The maps of `measure`, from features and the distances d [r, n, n] between them."""
    roles = roles_among(features)
    means = {role: geometry.gap(features[role]) for role in roles}
    if references is None:
        pairs = {role: Pairs(each) for role, each in zip(roles, d, strict=True)}
        goal, behind = Pairs(target.distances), None
    else:
        assert labels is not None
        known = references.features
        pairs = {
            role: feature_distances_among(known[role], features[role], references.distances[i], f"{role}'s features")
            for i, role in enumerate(roles)
        }
        goal = target_distances_among(references.labels, labels, references.target.distances)
        behind = {role: geometry.gap(known[role]) for role in roles}
    among = maps_among(roles)
    explained, given = zip(*among.values(), strict=True)
    found = ops.explained(
        [pairs[role] for role in explained],
        [pairs[role] for role in given],
        goal,
        [means[role] for role in explained],
        None if behind is None else [behind[role] for role in explained],
        objective,
        lap=weighting == "elementwise",
    )
    check_left(found.left, *(features[role].flatten(1) for role in roles))
    maps = {}
    for index, (name, role) in enumerate(zip(among, explained, strict=True)):
        placed = Placed(
            features[role],
            found.weights[index],
            None if found.lap is None else found.lap[index],
            float(found.score[index].mean()),
            False,
            None if references is None else references.features[role],
            ops,
        )
        weights, cams = weighted(placed, weighting)
        maps[name] = Maps(cams, weights, placed.score)
    return maps


def measure_distances(
    distances: Mapping[str, Tensor], target: Target, permutations: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """The inner products of `Measured`, (products, permuted, left_out), from each role's distances [n, n], without features.

    Raises KdxError for distances that are not finite, for ones that are all equal, and where one network's explain all of another's.
    """
    roles = roles_among(distances)
    for role in roles:
        arrays.check_same(len(distances[role]), len(target.rows), f"the {role}'s distances", "the target")
    d = torch.stack([distances[role].to(target.distances) for role in roles])
    centred = checked_centred(d, {f"{role}'s features": distances[role] for role in roles})
    explained, given = ([roles.index(role) for role in side] for side in zip(*maps_among(roles).values(), strict=True))
    left = geometry.laplacian(d[explained], centred[explained], centred[given], target.centred).left
    check_left(left, *distances.values())
    return _products(roles, d, centred, target, permutations)


def _products(
    roles: Sequence[str], d: Tensor, centred: Tensor, target: Target, permutations: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """`measure_distances` of distances d and their U-centred matrices, both [r, n, n] in the order of ``roles``."""
    matrices = torch.cat([centred, target.centred[None]])
    permuted = {
        name: uncertainty.permutation_products(matrices, target.distances, target.centred, target.rows, permutations)
        if name == TARGET
        else geometry.permuted_products(matrices, centred[roles.index(name)], permutations)
        for name in permuted_among(roles)
    }
    left_out = geometry.leave_one_out(torch.cat([d, target.distances[None]])) if len(target.rows) > arrays.MIN_IMAGES else None
    return geometry.products(matrices), permuted, left_out


def _chosen(features: Mapping[str, Tensor], backend: Backend = "auto") -> dispatch.TorchBackend:
    return dispatch.chosen(features["student"], backend)


def _distances(features: Mapping[str, Tensor], ops: dispatch.TorchBackend) -> tuple[Tensor, Tensor]:
    """Distances and U-centred distances, both [r, n, n] in the order of ROLES, checked."""
    rows = {f"{role}'s features": features[role].flatten(1) for role in roles_among(features)}
    d = torch.stack([ops.distances(x) for x in rows.values()])
    return d, checked_centred(d, rows)
