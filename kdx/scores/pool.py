"""The scores of one layer, from inner products summed over batches."""

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
    """The scores of one layer by name (see `kdx.roles.SCORES`), and the contrasts by name (see `kdx.roles.CONTRASTS`)."""

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
    """Scores and contrasts from inner products summed over batches.

    products [r + 1, r + 1]: of the matrices of ``roles`` and, last, of the target. permuted: for each name of `permuted_among`, the
    products [p, r + 1] under permutations of that matrix's images. left_out [units, r + 1, r + 1]: the products without each unit of the
    jackknife: a batch if there are several, else an image; None if there are too few images.
    """
    place = {name: index for index, name in enumerate((*roles_among(roles), TARGET))}
    scores, replicates = {}, {}
    for name, definition in scores_among(roles).items():
        index = torch.tensor([place[matrix] for matrix in definition.matrices])

        def value(tensor: Tensor, definition: Definition = definition, index: Tensor = index) -> NDArray[np.float64]:
            return STATISTICS[definition.statistic](tensor[..., index[:, None], index]).numpy(force=True)

        replicates[name] = value(left_out) if left_out is not None else np.empty(0)
        null = value(uncertainty.with_permuted(products, place[definition.permuted], permuted[definition.permuted]))
        scores[name] = summary(value(products), replicates[name], null, n=n, batches=batches, confidence=confidence)
    contrasts = {}
    for more, less in contrasts_among(roles):
        difference = scores[more].value - scores[less].value
        interval = uncertainty.jackknife_interval(difference, replicates[more] - replicates[less], confidence, fisher=False)
        contrasts[contrast_name(more, less)] = Contrast(difference, interval)
    return LayerScores(scores, contrasts)


class Pool:
    """The scores of a layer over batches that are added one at a time: inner products are summed, and one ratio is taken at the end."""

    def __init__(self, roles: Collection[str] = ROLES) -> None:
        self._roles = roles
        self._products: list[Tensor] = []
        self._permuted: dict[str, Tensor] = {}
        self._left_out: Tensor | None = None

    def add(self, products: Tensor, permuted: Mapping[str, Tensor], left_out: Tensor | None) -> None:
        """Add the inner products of a batch; the arguments are fields of `kdx.explain.layer.LayerMeasurement`."""
        self._products.append(products)
        self._permuted = {name: rows + self._permuted[name] if name in self._permuted else rows for name, rows in permuted.items()}
        self._left_out = left_out

    @property
    def products(self) -> Tensor:
        """The inner products [r + 1, r + 1], summed over the batches."""
        return torch.stack(self._products).sum(0)

    def scores(self, *, n: int, confidence: float = 0.95) -> LayerScores:
        """The scores of n images. The jackknife leaves out one batch at a time, or one image if there is a single batch."""
        products = torch.stack(self._products)
        total = products.sum(0)
        left_out = self._left_out if len(products) == 1 else total - products
        return pooled_scores(total, self._permuted, left_out, n=n, batches=len(products), confidence=confidence, roles=self._roles)
