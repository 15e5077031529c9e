"""The difference of two scores of the same images from separate computations, such as the runs of two students.

The parts of the images contribute to both scores. If both computations have the same parts, the contributions of a part can be subtracted,
and the sampling moments of the difference follow as for one score (`kdx.kernels.moments`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from kdx.kernels.moments import Influences
from kdx.scores.pool import score_estimates
from kdx.scores.score import Contrast
from kdx.scores.uncertainty import interval, spread


def score_influences(products: Tensor, influences: Influences, roles: Collection[str]) -> dict[str, Influences]:
    """The contribution of each part of the images to each score of a layer: first [1, u] and second [1, u, u] per score.

    products [r + 1, r + 1], influences [m]: those of the matrices of ``roles`` and, last, of the target.
    """
    result = {}
    for name, estimate in score_estimates(products, roles).items():
        gradient = torch.from_numpy(estimate.gradient).to(influences.first)
        second = None if influences.second is None else torch.einsum("m,muv->uv", gradient, influences.second)[None]
        result[name] = Influences((gradient @ influences.first)[None], second)
    return result


def paired_difference(
    values: tuple[float, float], influences: tuple[Influences, Influences], *, n: int, confidence: float, limit: float = 2.0
) -> Contrast:
    """The difference of two values, the first minus the second, and its confidence interval over images, as in `kdx.scores.score.contrast`.

    influences: those of the same parts of the same n images on each value. limit: the largest absolute difference. The interval does not
    describe other trainings of the networks, and it belongs to this difference alone.
    """
    first, second = influences
    value = values[0] - values[1]
    moments = minus(first, second).moments()
    known = spread(moments, np.ones(1))
    return Contrast(value, interval(value, known and known._replace(slope=0.0), confidence, n=n, limit=limit))


def minus(first: Influences, second: Influences) -> Influences:
    """The influences on a difference."""
    both = first.second is not None and second.second is not None
    return Influences(first.first - second.first, first.second - second.second if both else None)  # type: ignore[operator]


def contrast_influences(scores: Mapping[str, Influences], contrasts: Mapping[str, tuple[str, str]]) -> dict[str, Influences]:
    """The influences on contrasts, each named by its two scores, from the influences on the scores."""
    return {name: minus(scores[more], scores[less]) for name, (more, less) in contrasts.items() if {more, less} <= scores.keys()}
