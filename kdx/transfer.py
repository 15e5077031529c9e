"""What passed from teacher to student at one layer: maps and scores, from one Gram product a network.

Geometry of a batch is measured once (`measure`, or `measure_distances` for what scores need where distances are at hand);
scores over any number of batches are ratios of summed inner products (`Pool`). A computation has a student and a base, and a
teacher or none: without one, the maps, scores and contrasts are those of the tables below that do not name it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx import arrays, scores
from kdx.kernels import dispatch, geometry
from kdx.kernels.cuda import Backend
from kdx.kernels.dispatch import Pairs
from kdx.scores import TARGET, Score, Statistic
from kdx.unicam import Maps, Placed, Weighting, check_left, feature_distances_among, target_distances_among, weighted

ROLES = ("teacher", "student", "base")
"""In the order of every stack of matrices, which the target ends."""

_LETTERS = {role: role[0].upper() for role in ROLES}

MAPS: dict[str, tuple[str, str]] = {
    "distilled": ("student", "base"),
    "residual": ("base", "student"),
    "missed": ("teacher", "student"),
    "new": ("student", "teacher"),
}
"""Each map's explained and given network."""


@dataclass(frozen=True)
class Definition:
    """A score: its statistic, of which matrices (roles, or TARGET), and whose images are permuted for the p-value."""

    statistic: Statistic
    matrices: tuple[str, ...]
    moved: str
    """The target's, or the teacher's where there is no target."""


SCORES: dict[str, Definition] = {
    "FSS(S,T)": Definition(scores.correlation, ("student", "teacher"), "teacher"),
    "FSS(B,T)": Definition(scores.correlation, ("base", "teacher"), "teacher"),
    **{f"RS({_LETTERS[x]})": Definition(scores.correlation, (x, TARGET), TARGET) for x in ROLES},
    **{f"RS({_LETTERS[x]}|{_LETTERS[y]})": Definition(scores.semipartial, (x, TARGET, y), TARGET) for x, y in MAPS.values()},
}

CONTRASTS: tuple[tuple[str, str], ...] = (("FSS(S,T)", "FSS(B,T)"), ("RS(S|B)", "RS(B|S)"))
"""Differences that say whether distillation shows: is the student nearer to the teacher, and is what only it has more relevant?"""


def roles_among(present: Collection[str]) -> tuple[str, ...]:
    """The roles present, in the order of ROLES; ValueError where the student or the base is not, or there is no such role."""
    if not {"student", "base"} <= set(present) <= set(ROLES):
        raise ValueError(f"a student, a base and perhaps a teacher are compared, not {', '.join(present) or 'nothing'}")
    return tuple(role for role in ROLES if role in present)


def maps_among(roles: Collection[str]) -> dict[str, tuple[str, str]]:
    """Those of MAPS that these roles make."""
    return {name: pair for name, pair in MAPS.items() if set(pair) <= set(roles)}


def map_score(name: str) -> str:
    """The score RS(X|Y) of a map of X given Y."""
    explained, given = MAPS[name]
    return f"RS({_LETTERS[explained]}|{_LETTERS[given]})"


def scores_among(roles: Collection[str]) -> dict[str, Definition]:
    """Those of SCORES that these roles have."""
    return {name: definition for name, definition in SCORES.items() if set(definition.matrices) <= {*roles, TARGET}}


def contrasts_among(roles: Collection[str]) -> tuple[tuple[str, str], ...]:
    """Those of CONTRASTS whose scores these roles have."""
    return tuple(pair for pair in CONTRASTS if set(pair) <= scores_among(roles).keys())


def moved_among(roles: Collection[str]) -> tuple[str, ...]:
    """The matrices that the permutations of these roles' scores move."""
    return tuple(dict.fromkeys(definition.moved for definition in scores_among(roles).values()))


@dataclass(frozen=True)
class Target:
    """The target of a batch: its rows [n, e], their distances and U-centred matrix [n, n]."""

    rows: Tensor
    distances: Tensor
    centred: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Target:
        arrays.check_images(len(labels))
        rows = arrays.target_embedding(labels, len(labels))
        d = geometry.distances(rows)
        return cls(rows, d, _centred(d[None], {"target": rows})[0])


@dataclass(frozen=True)
class References:
    """Reference mode at one layer: the features of the reference images a role, and every distance among them [r, m, m]."""

    features: Mapping[str, Tensor]
    distances: Tensor
    labels: Tensor
    target: Target

    @classmethod
    def of(cls, features: Mapping[str, Tensor], labels: Tensor) -> References:
        distances, _ = _distances(features, _chosen(features))
        return cls(features, distances, labels, Target.of(labels))


@dataclass(frozen=True)
class Measured:
    """One batch at one layer, of r roles.

    maps: a `Maps` a name of MAPS. products: inner products [r + 1, r + 1] of the roles' matrices and, last, the target's.
    moved: a name of `moved_among` -> its inner products [p, r + 1] with all of them, as p permutations move its images.
    left_out: products [n, r + 1, r + 1] without each image in turn (None below five images).
    """

    maps: dict[str, Maps]
    products: Tensor
    moved: dict[str, Tensor]
    left_out: Tensor | None


def measure(
    features: Mapping[str, Tensor],
    target: Target,
    *,
    objective: geometry.Objective = geometry.relevance,
    weighting: Weighting = "gap",
    permutations: Tensor,
    references: References | None = None,
    labels: Tensor | None = None,
    distances: Mapping[str, Tensor] | None = None,
    backend: Backend = "auto",
) -> Measured:
    """Everything kdx says of one layer of one batch, from each role's features [n, C, H, W].

    permutations [p, n]. references: maps in reference mode, where ``labels`` [n] place the batch among the references. distances:
    each role's [n, n] of other features of these images, which the inner products are then of. backend: as in `kdx.unicam`.
    """
    roles, ops = roles_among(features), _chosen(features, backend)
    d, centred = _distances(features, ops)
    maps = _maps(features, d, target, objective, weighting, references, labels, ops)
    if distances is None:
        return Measured(maps, *_products(roles, d, centred, target, permutations))
    return Measured(maps, *measure_distances(distances, target, permutations))


def _maps(
    features: Mapping[str, Tensor],
    d: Tensor,
    target: Target,
    objective: geometry.Objective,
    weighting: Weighting,
    references: References | None,
    labels: Tensor | None,
    ops: dispatch.Torch,
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
    """The inner products of `Measured`, (products, moved, left_out), from each role's distances [n, n], without features.

    Raises KdxError for distances that are not finite, for ones that are all equal, and where one network's explain all of another's.
    """
    roles = roles_among(distances)
    for role in roles:
        arrays.check_same(len(distances[role]), len(target.rows), f"the {role}'s distances", "the target")
    d = torch.stack([distances[role].to(target.distances) for role in roles])
    centred = _centred(d, {f"{role}'s features": distances[role] for role in roles})
    explained, given = ([roles.index(role) for role in side] for side in zip(*maps_among(roles).values(), strict=True))
    left = geometry.laplacian(d[explained], centred[explained], centred[given], target.centred).left
    check_left(left, *distances.values())
    return _products(roles, d, centred, target, permutations)


def _products(
    roles: Sequence[str], d: Tensor, centred: Tensor, target: Target, permutations: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """`measure_distances` of distances d and their U-centred matrices, both [r, n, n] in the order of ``roles``."""
    matrices = torch.cat([centred, target.centred[None]])
    moved = {
        name: scores.permutation_products(matrices, target.distances, target.centred, target.rows, permutations)
        if name == TARGET
        else geometry.permuted_products(matrices, centred[roles.index(name)], permutations)
        for name in moved_among(roles)
    }
    left_out = geometry.leave_one_out(torch.cat([d, target.distances[None]])) if len(target.rows) > arrays.MIN_IMAGES else None
    return geometry.products(matrices), moved, left_out


def _chosen(features: Mapping[str, Tensor], backend: Backend = "auto") -> dispatch.Torch:
    return dispatch.chosen(features["student"], backend)


def _distances(features: Mapping[str, Tensor], ops: dispatch.Torch) -> tuple[Tensor, Tensor]:
    """Distances and U-centred distances, both [r, n, n] in the order of ROLES, checked."""
    rows = {f"{role}'s features": features[role].flatten(1) for role in roles_among(features)}
    d = torch.stack([ops.distances(x) for x in rows.values()])
    return d, _centred(d, rows)


def _centred(d: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """U-centred distances d [k, n, n] between the rows [n, ...] of each name, after the checks of `arrays.measured`."""
    for each, (name, x) in zip(d, rows.items(), strict=True):
        arrays.check_distances(each, x, name)
    centred = geometry.u_centered(d)
    sizes = zip(geometry.dot(centred, centred).tolist(), geometry.dot(d, d).tolist(), strict=True)
    for (left, whole), (name, x) in zip(sizes, rows.items(), strict=True):
        arrays.check_varied(left, whole, arrays.rounding(x), name)
    return centred


@dataclass(frozen=True)
class LayerScores:
    """The scores of a layer by name (SCORES), and the differences of CONTRASTS as (value, interval)."""

    scores: dict[str, Score]
    contrasts: dict[str, tuple[float, tuple[float, float]]]


def pool(
    products: Tensor,
    moved: Mapping[str, Tensor],
    left_out: Tensor | None,
    *,
    n: int,
    batches: int = 1,
    confidence: float = 0.95,
    roles: Collection[str] = ROLES,
) -> LayerScores:
    """Scores from inner products summed over batches, the same under permutations (moved) and without each unit (left_out).

    All as in `Measured`, of ``roles``. The units of the jackknife are whatever left_out leaves out: batches where there are
    several, else images.
    """
    place = {name: index for index, name in enumerate((*roles_among(roles), TARGET))}
    found, replicates = {}, {}
    for name, definition in scores_among(roles).items():
        index = torch.tensor([place[matrix] for matrix in definition.matrices])

        def value(tensor: Tensor, definition: Definition = definition, index: Tensor = index) -> NDArray[np.float64]:
            return definition.statistic(tensor[..., index[:, None], index]).numpy(force=True)

        replicates[name] = value(left_out) if left_out is not None else np.empty(0)
        permuted = value(scores.permuted(products, place[definition.moved], moved[definition.moved]))
        found[name] = scores.summary(value(products), replicates[name], permuted, n=n, batches=batches, confidence=confidence)
    contrasts = {}
    for more, less in contrasts_among(roles):
        difference = found[more].value - found[less].value
        interval = scores.jackknife_interval(difference, replicates[more] - replicates[less], confidence, fisher=False)
        contrasts[f"{more} - {less}"] = (difference, interval)
    return LayerScores(found, contrasts)


class Pool:
    """Scores over batches, one batch added at a time: inner products are summed, and one ratio is taken at the end."""

    def __init__(self, roles: Collection[str] = ROLES) -> None:
        self._roles = roles
        self._products: list[Tensor] = []
        self._moved: dict[str, Tensor] = {}
        self._left_out: Tensor | None = None

    def add(self, products: Tensor, moved: Mapping[str, Tensor], left_out: Tensor | None) -> None:
        """A batch's inner products, the same under permutations and without each image, as in `Measured`."""
        self._products.append(products)
        self._moved = {name: rows + self._moved[name] if name in self._moved else rows for name, rows in moved.items()}
        self._left_out = left_out

    def scores(self, *, n: int, confidence: float = 0.95) -> LayerScores:
        """The scores of n images. The jackknife leaves out batches; with one batch alone, its images."""
        each = torch.stack(self._products)
        total = each.sum(0)
        left_out = self._left_out if len(each) == 1 else total - each
        return pool(total, self._moved, left_out, n=n, batches=len(each), confidence=confidence, roles=self._roles)
