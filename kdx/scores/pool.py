"""The scores of one layer, from inner products summed over batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdx.kernels.moments import Moments
from kdx.roles import ROLES, TARGET, Definition, contrast_name, contrasts_among, roles_among, scores_among
from kdx.scores import uncertainty
from kdx.scores.score import STATISTICS, Contrast, Score, contrast, estimate, summary


@dataclass(frozen=True)
class LayerScores:
    """The scores of one layer by name (see `kdx.roles.SCORES`), and the contrasts by name (see `kdx.roles.CONTRASTS`)."""

    scores: dict[str, Score]
    contrasts: dict[str, Contrast]


def pooled_scores(
    products: Tensor,
    permuted: Mapping[str, Tensor],
    moments: Moments | None,
    *,
    n: int,
    batches: int = 1,
    confidence: float = 0.95,
    roles: Collection[str] = ROLES,
) -> LayerScores:
    """Scores and contrasts of n images from inner products summed over batches.

    products [r + 1, r + 1]: of the matrices of ``roles`` and, last, of the target. permuted: for each name of `permuted_among`, the
    products [p, r + 1] under permutations of that matrix's images. moments: of the products; None if there are too few images.
    """
    place = {name: index for index, name in enumerate((*roles_among(roles), TARGET))}
    scores, estimates = {}, {}
    for name, definition in scores_among(roles).items():
        index = torch.tensor([place[matrix] for matrix in definition.matrices])

        def statistic(tensor: Tensor, definition: Definition = definition, index: Tensor = index) -> Tensor:
            return STATISTICS[definition.statistic](tensor[..., index[:, None], index])

        estimates[name] = estimate(statistic, products)
        null = statistic(uncertainty.with_permuted(products, place[definition.permuted], permuted[definition.permuted]))
        scores[name] = summary(estimates[name], moments, null.numpy(force=True), n=n, batches=batches, confidence=confidence)
    contrasts = {
        contrast_name(more, less): contrast(estimates[more] - estimates[less], moments, n=n, confidence=confidence)
        for more, less in contrasts_among(roles)
    }
    return LayerScores(scores, contrasts)


def adjusted(layers: Mapping[str, LayerScores]) -> dict[str, LayerScores]:
    """The same layers with ``p_adjusted`` in every score: Holm's method over the p-values of the same score at all layers."""
    names = dict.fromkeys(name for layer in layers.values() for name in layer.scores)
    changed: dict[str, dict[str, Score]] = {layer: dict(scores.scores) for layer, scores in layers.items()}
    for name in names:
        tested = [layer for layer, scores in changed.items() if name in scores and scores[name].p_value is not None]
        p_values = [p for p in (changed[layer][name].p_value for layer in tested) if p is not None]
        for layer, p_adjusted in zip(tested, uncertainty.holm(p_values), strict=True):
            changed[layer][name] = replace(changed[layer][name], p_adjusted=p_adjusted)
    return {layer: LayerScores(changed[layer], scores.contrasts) for layer, scores in layers.items()}


class Pool:
    """The scores of a layer over batches that are added one at a time: inner products are summed, and one ratio is taken at the end."""

    def __init__(self, roles: Collection[str] = ROLES) -> None:
        self._roles = roles
        self._products: list[Tensor] = []
        self._permuted: dict[str, Tensor] = {}
        self._moments: list[Moments | None] = []

    def add(self, products: Tensor, permuted: Mapping[str, Tensor], moments: Moments | None) -> None:
        """Add the inner products of a batch; the arguments are fields of `kdx.explain.layer.LayerMeasurement`."""
        self._products.append(products)
        self._permuted = {name: rows + self._permuted[name] if name in self._permuted else rows for name, rows in permuted.items()}
        self._moments.append(moments)

    @property
    def products(self) -> Tensor:
        """The inner products [r + 1, r + 1], summed over the batches."""
        return torch.stack(self._products).sum(0)

    def scores(self, *, n: int, confidence: float = 0.95) -> LayerScores:
        """The scores of n images, with intervals from `kdx.scores.uncertainty.pooled_moments`."""
        products = torch.stack(self._products)
        moments = uncertainty.pooled_moments(products, self._moments)
        return pooled_scores(products.sum(0), self._permuted, moments, n=n, batches=len(products), confidence=confidence, roles=self._roles)
