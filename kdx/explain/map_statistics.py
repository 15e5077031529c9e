"""What is known about each map besides its values: its total, its strength and its stability, and the strength of maps by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MapStatistics:
    """Statistics of one kind of map at one layer, for n images.

    total [n]: the sum over the positions; for a map that adds up to a score, the image's contribution to it. strength [n]: the mean
    absolute value over the positions. stability [n]: the correlation between the image's two maps that have either half of the set as
    context; NaN where a map is constant.
    """

    total: Tensor
    strength: Tensor
    stability: Tensor

    @classmethod
    def joined(cls, parts: Sequence[MapStatistics]) -> MapStatistics:
        """The statistics of the images of all parts."""
        columns = ([getattr(part, name) for part in parts] for name in ("total", "strength", "stability"))
        return cls(*map(torch.cat, columns))

    def at(self, index: Tensor) -> MapStatistics:
        """The statistics of the images ``index``, in this order."""
        return MapStatistics(self.total[index], self.strength[index], self.stability[index])

    @property
    def relative_strength(self) -> Tensor:
        """The strength on a scale that all images of the layer share: 1 is their mean. All zeros if every map is empty."""
        mean = self.strength.mean()
        return self.strength / mean if mean > 0 else torch.zeros_like(self.strength)

    @property
    def empty(self) -> float:
        """The share of maps that are zero everywhere."""
        return float((self.strength == 0).double().mean())


@dataclass(frozen=True)
class NullStrength:
    """The strength of maps under a permuted target: their median and 95% quantile."""

    median: float
    high: float

    @classmethod
    def of(cls, strength: Tensor) -> NullStrength:
        median, high = strength.double().quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        return cls(median, high)


def mean_strength(maps: Tensor) -> Tensor:
    """The mean absolute value [n] in float64 of maps [n, h, w]."""
    return maps.double().abs().mean((1, 2))


def stability(maps: Tensor, others: Tensor) -> Tensor:
    """The correlation over positions [n] of maps [n, h, w] and other maps of the same images; NaN where a map is constant."""
    a, b = (m.double().flatten(1) for m in (maps, others))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
