"""The scores of one layer, from inner products summed over batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdx.kernels.moments import Moments
from kdx.roles import ROLES, TARGET, Definition, contrast_name, contrasts_among, roles_among, scores_among
from kdx.scores import uncertainty
from kdx.scores.score import STATISTICS, Contrast, Estimate, Score, Statistic, contrast, estimate, summary


@dataclass(frozen=True)
class LayerScores:
    """The scores of one layer by name (see `kdx.roles.SCORES`), and the contrasts by name (see `kdx.roles.CONTRASTS`)."""

    scores: dict[str, Score]
    contrasts: dict[str, Contrast]


def score_estimates(products: Tensor, roles: Collection[str]) -> dict[str, Estimate]:
    """The value of each score of these roles and its gradient with respect to the inner products [r + 1, r + 1], as for `pooled_scores`."""
    return {name: estimate(statistic, products) for name, statistic in _statistics(roles).items()}


def _statistics(roles: Collection[str]) -> dict[str, Statistic]:
    """Each score as a function of the inner products of all matrices."""
    place = {name: index for index, name in enumerate((*roles_among(roles), TARGET))}
    statistics: dict[str, Statistic] = {}
    for name, definition in scores_among(roles).items():
        index = torch.tensor([place[matrix] for matrix in definition.matrices])

        def statistic(tensor: Tensor, definition: Definition = definition, index: Tensor = index) -> Tensor:
            return STATISTICS[definition.statistic](tensor[..., index[:, None], index])

        statistics[name] = statistic
    return statistics


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
    scores, estimates, statistics = {}, score_estimates(products, roles), _statistics(roles)
    for name, definition in scores_among(roles).items():
        null = statistics[name](uncertainty.with_permuted(products, place[definition.permuted], permuted[definition.permuted]))
        scores[name] = summary(estimates[name], moments, null.numpy(force=True), n=n, batches=batches, confidence=confidence)
    contrasts = {
        contrast_name(more, less): contrast(estimates[more] - estimates[less], moments, n=n, confidence=confidence)
        for more, less in contrasts_among(roles)
    }
    return LayerScores(scores, contrasts)


def _mean_scores(
    products: Tensor, permuted: Sequence[Mapping[str, Tensor]], *, n: int, confidence: float, roles: Collection[str]
) -> LayerScores:
    """The means over b batches of their scores and contrasts, from each batch's products [b, r + 1, r + 1] and permuted products.

    Intervals come from the variation between batches. A permutation permutes the images of every batch.
    """
    place = {name: index for index, name in enumerate((*roles_among(roles), TARGET))}
    count, scores, values = len(products), {}, {}
    for name, definition in scores_among(roles).items():
        index = torch.tensor([place[matrix] for matrix in definition.matrices])
        statistic, turned = STATISTICS[definition.statistic], place[definition.permuted]
        values[name] = statistic(products[:, index[:, None], index])
        null = torch.stack(
            [
                statistic(uncertainty.with_permuted(each, turned, rows[definition.permuted])[..., index[:, None], index])
                for each, rows in zip(products, permuted, strict=True)
            ]
        ).mean(0)
        value, at_least = float(values[name].mean()), int((null >= values[name].mean() - 1e-12).sum())
        ends = _interval_of_mean(values[name], confidence, n)
        p_value = (1 + at_least) / (1 + len(null)) if len(null) else None
        scores[name] = Score(value, ends, p_value, n, count, "unbiased", confidence, len(null))
    contrasts = {}
    for more, less in contrasts_among(roles):
        difference = values[more] - values[less]
        contrasts[contrast_name(more, less)] = Contrast(float(difference.mean()), _interval_of_mean(difference, confidence, n, 2.0))
    return LayerScores(scores, contrasts)


def _interval_of_mean(values: Tensor, confidence: float, n: int, limit: float = 1.0) -> tuple[float, float]:
    """The interval of the mean of independent values [b] in [-limit, limit]."""
    spread = uncertainty.Spread(float(values.var()) / len(values), 0.0, len(values))
    return uncertainty.interval(float(values.mean()), spread, confidence, n=n, limit=limit)


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
    """The scores of a layer over batches that are added one at a time: inner products are summed, and one ratio is taken at the end.

    mean: take the mean of the batches' ratios instead, as the authors' code does. It is biased.
    """

    def __init__(self, roles: Collection[str] = ROLES, *, mean: bool = False) -> None:
        self._roles = roles
        self._mean = mean
        self._products: list[Tensor] = []
        self._permuted: dict[str, Tensor] = {}
        self._moments: list[Moments | None] = []
        self._each: list[Mapping[str, Tensor]] = []

    def add(self, products: Tensor, permuted: Mapping[str, Tensor], moments: Moments | None) -> None:
        """Add the inner products of a batch; the arguments are fields of `kdx.explain.layer.LayerMeasurement`."""
        self._products.append(products)
        self._permuted = {name: rows + self._permuted[name] if name in self._permuted else rows for name, rows in permuted.items()}
        self._moments.append(moments)
        if self._mean:
            self._each.append(permuted)

    @property
    def products(self) -> Tensor:
        """The inner products [r + 1, r + 1], summed over the batches."""
        return torch.stack(self._products).sum(0)

    def scores(self, *, n: int, confidence: float = 0.95) -> LayerScores:
        """The scores of n images, with intervals from `kdx.scores.uncertainty.pooled_moments`."""
        products = torch.stack(self._products)
        if self._mean and len(products) > 1:
            return _mean_scores(products, self._each, n=n, confidence=confidence, roles=self._roles)
        moments = uncertainty.pooled_moments(products, self._moments)
        return pooled_scores(products.sum(0), self._permuted, moments, n=n, batches=len(products), confidence=confidence, roles=self._roles)
