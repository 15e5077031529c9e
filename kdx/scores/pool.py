"""Scores of one layer from inner products that are summed over batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.roles import ROLES, TARGET, Definition, contrast_name, contrasts_among, roles_among, scores_among
from kdx.scores import uncertainty
from kdx.scores.score import STATISTICS, Contrast, Score, summary


@dataclass(frozen=True)
class LayerScores:
    """The scores of a layer by name (SCORES), and the differences of CONTRASTS as (value, interval)."""

    scores: dict[str, Score]
    contrasts: dict[str, Contrast]


def pooled_scores(
    products: Tensor,
    permuted: Mapping[str, Tensor],
    left_out: Tensor | None,
    *,
    n: int,
    batches: int = 1,
    confidence: float = 0.95,
    roles: Collection[str] = ROLES,
) -> LayerScores:
    """Scores from inner products summed over batches, the same under permutations (permuted) and without each unit (left_out).

    All as in `Measured`, of ``roles``. The units of the jackknife are whatever left_out leaves out: batches where there are
    several, else images.
    """
    place = {name: index for index, name in enumerate((*roles_among(roles), TARGET))}
    found, replicates = {}, {}
    for name, definition in scores_among(roles).items():
        index = torch.tensor([place[matrix] for matrix in definition.matrices])

        def value(tensor: Tensor, definition: Definition = definition, index: Tensor = index) -> NDArray[np.float64]:
            return STATISTICS[definition.statistic](tensor[..., index[:, None], index]).numpy(force=True)

        replicates[name] = value(left_out) if left_out is not None else np.empty(0)
        null = value(uncertainty.with_permuted(products, place[definition.permuted], permuted[definition.permuted]))
        found[name] = summary(value(products), replicates[name], null, n=n, batches=batches, confidence=confidence)
    contrasts = {}
    for more, less in contrasts_among(roles):
        difference = found[more].value - found[less].value
        interval = uncertainty.jackknife_interval(difference, replicates[more] - replicates[less], confidence, fisher=False)
        contrasts[contrast_name(more, less)] = Contrast(difference, interval)
    return LayerScores(found, contrasts)


class Pool:
    """Scores over batches, one batch added at a time: inner products are summed, and one ratio is taken at the end."""

    def __init__(self, roles: Collection[str] = ROLES) -> None:
        self._roles = roles
        self._products: list[Tensor] = []
        self._permuted: dict[str, Tensor] = {}
        self._left_out: Tensor | None = None

    def add(self, products: Tensor, permuted: Mapping[str, Tensor], left_out: Tensor | None) -> None:
        """A batch's inner products, the same under permutations and without each image, as in `Measured`."""
        self._products.append(products)
        self._permuted = {name: rows + self._permuted[name] if name in self._permuted else rows for name, rows in permuted.items()}
        self._left_out = left_out

    def scores(self, *, n: int, confidence: float = 0.95) -> LayerScores:
        """The scores of n images. The jackknife leaves out batches; with one batch alone, its images."""
        each = torch.stack(self._products)
        total = each.sum(0)
        left_out = self._left_out if len(each) == 1 else total - each
        return pooled_scores(total, self._permuted, left_out, n=n, batches=len(each), confidence=confidence, roles=self._roles)
