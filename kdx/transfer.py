"""What passed from teacher to student at one layer: four maps and nine scores, from one Gram product a network.

Geometry of a batch is measured once (`measure`); scores over any number of batches are ratios of summed inner products
(`Pool`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx import arrays, scores
from kdx.kernels import geometry
from kdx.scores import Score, Statistic
from kdx.unicam import Maps, Weighting, checked, feature_distances_among, target_distances_among, weighted

ROLES = ("teacher", "student", "base")
_TEACHER, _STUDENT, _BASE, _TARGET = range(4)
_LETTERS = "TSB"

MAPS: dict[str, tuple[int, int]] = {
    "distilled": (_STUDENT, _BASE),
    "residual": (_BASE, _STUDENT),
    "missed": (_TEACHER, _STUDENT),
    "new": (_STUDENT, _TEACHER),
}
"""Each map's explained and given network."""


@dataclass(frozen=True)
class _Definition:
    statistic: Statistic
    matrices: tuple[int, ...]
    moved: int
    """The matrix whose images are permuted for the p-value: the target's, or the teacher's where there is no target."""


MOVED = (_TEACHER, _TARGET)
"""The matrices that permutations move."""

SCORES: dict[str, _Definition] = {
    "FSS(S,T)": _Definition(scores.correlation, (_STUDENT, _TEACHER), _TEACHER),
    "FSS(B,T)": _Definition(scores.correlation, (_BASE, _TEACHER), _TEACHER),
    **{f"RS({_LETTERS[x]})": _Definition(scores.correlation, (x, _TARGET), _TARGET) for x in (_TEACHER, _STUDENT, _BASE)},
    **{
        f"RS({_LETTERS[x]}|{_LETTERS[y]})": _Definition(scores.semipartial, (x, _TARGET, y), _TARGET)
        for x, y in ((_STUDENT, _BASE), (_BASE, _STUDENT), (_TEACHER, _STUDENT), (_STUDENT, _TEACHER))
    },
}

CONTRASTS: tuple[tuple[str, str], ...] = (("FSS(S,T)", "FSS(B,T)"), ("RS(S|B)", "RS(B|S)"))
"""Differences that say whether distillation shows: is the student nearer to the teacher, and is what only it has more relevant?"""


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
        d = arrays.measured(geometry.distances(rows), rows, "target")
        return cls(rows, d, geometry.u_centered(d))


@dataclass(frozen=True)
class References:
    """Reference mode at one layer: the features of the reference images a role, and every distance among them."""

    features: Mapping[str, Tensor]
    distances: Tensor
    labels: Tensor
    target: Target

    @classmethod
    def of(cls, features: Mapping[str, Tensor], labels: Tensor) -> References:
        return cls(features, _distances(features), labels, Target.of(labels))


@dataclass(frozen=True)
class Measured:
    """One batch at one layer.

    maps: a `Maps` a name of MAPS. products: inner products [4, 4] of teacher, student, base and target.
    moved: for the permutations of the teacher's and of the target's images, products [p, 4] with all four.
    left_out: products [n, 4, 4] without each image in turn (None below five images).
    """

    maps: dict[str, Maps]
    products: Tensor
    moved: dict[int, Tensor]
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
) -> Measured:
    """Everything kdx says of one layer of one batch, from features [n, C, H, W] of the three roles.

    permutations [p, n]. references: maps in reference mode, where ``labels`` [n] place the batch among the references.
    """
    d = _distances(features)
    matrices = torch.cat([geometry.u_centered(d), target.centred[None]])
    products = geometry.products(matrices)
    with_target = torch.cat([d, target.distances[None]])
    moved = {
        _TEACHER: geometry.permuted_products(matrices, matrices[_TEACHER], permutations),
        _TARGET: scores.permutation_products(matrices, target.distances, target.centred, target.rows, permutations),
    }
    explained, given = (list(side) for side in zip(*MAPS.values(), strict=True))
    if references is None:
        centred, goal = matrices[:3], target.centred
    else:
        assert labels is not None
        known = references.features
        d = torch.stack(
            [
                feature_distances_among(known[role], features[role], references.distances[i], f"{role}'s features")
                for i, role in enumerate(ROLES)
            ]
        )
        centred, goal = (
            geometry.u_centered(d),
            geometry.u_centered(target_distances_among(references.labels, labels, references.target.distances)),
        )
    lap = geometry.laplacian(d[explained], centred[explained], centred[given], goal, objective)
    checked(lap, *(features[role].flatten(1) for role in ROLES))
    maps = {}
    for index, name in enumerate(MAPS):
        role = ROLES[explained[index]]
        behind = None if references is None else references.features[role]
        weights, cams = weighted(features[role], lap.lap[index], weighting, references=behind)
        maps[name] = Maps(cams, weights, float(lap.score[index].mean()))
    left_out = geometry.leave_one_out(with_target) if len(target.rows) > arrays.MIN_IMAGES else None
    return Measured(maps, products, moved, left_out)


def _distances(features: Mapping[str, Tensor]) -> Tensor:
    """[3, n, n] in the order of ROLES."""
    rows = {role: features[role].flatten(1) for role in ROLES}
    return torch.stack([arrays.measured(geometry.distances(rows[role]), rows[role], f"{role}'s features") for role in ROLES])


@dataclass(frozen=True)
class LayerScores:
    """The nine scores of a layer by name (SCORES), and the differences of CONTRASTS as (value, interval)."""

    scores: dict[str, Score]
    contrasts: dict[str, tuple[float, tuple[float, float]]]


def pool(
    products: Tensor, moved: Mapping[int, Tensor], left_out: Tensor | None, *, n: int, batches: int = 1, confidence: float = 0.95
) -> LayerScores:
    """Scores from inner products [4, 4] summed over batches, the same under permutations (moved) and without each unit (left_out).

    The units of the jackknife are whatever left_out leaves out: batches where there are several, else images.
    """
    found, replicates = {}, {}
    for name, definition in SCORES.items():

        def value(tensor: Tensor, definition: _Definition = definition) -> NDArray[np.float64]:
            index = torch.tensor(definition.matrices)
            return definition.statistic(tensor[..., index[:, None], index]).numpy(force=True)

        replicates[name] = value(left_out) if left_out is not None else np.empty(0)
        permuted = value(scores.permuted(products, definition.moved, moved[definition.moved]))
        found[name] = scores.summary(value(products), replicates[name], permuted, n=n, batches=batches, confidence=confidence)
    contrasts = {}
    for more, less in CONTRASTS:
        difference = found[more].value - found[less].value
        interval = scores.jackknife_interval(difference, replicates[more] - replicates[less], confidence, fisher=False)
        contrasts[f"{more} - {less}"] = (difference, interval)
    return LayerScores(found, contrasts)


class Pool:
    """Scores over batches, one batch added at a time: inner products are summed, and one ratio is taken at the end."""

    def __init__(self) -> None:
        self._products: list[Tensor] = []
        self._moved: dict[int, Tensor] = {}
        self._left_out: Tensor | None = None

    def add(self, products: Tensor, moved: Mapping[int, Tensor], left_out: Tensor | None) -> None:
        """A batch's inner products [4, 4], the same under permutations and without each image, as in `Measured`."""
        self._products.append(products)
        self._moved = {index: rows + self._moved[index] if index in self._moved else rows for index, rows in moved.items()}
        self._left_out = left_out

    def scores(self, *, n: int, confidence: float = 0.95) -> LayerScores:
        """The scores of n images. The jackknife leaves out batches; with one batch alone, its images."""
        each = torch.stack(self._products)
        total = each.sum(0)
        left_out = self._left_out if len(each) == 1 else total - each
        return pool(total, self._moved, left_out, n=n, batches=len(each), confidence=confidence)
