"""Min-max scaling and resizing of maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from torch.nn.functional import interpolate

from kdx.features import arrays
from kdx.features.arrays import ArrayT
from kdx.kernels import geometry


@dataclass(frozen=True)
class ScalableMaps(Generic[ArrayT]):
    """Maps [n, H, W] of n images, not scaled."""

    maps: ArrayT

    @property
    def empty(self) -> float:
        """The share of the maps that are zero everywhere, in [0, 1]; NaN for no maps.

        Nothing raises the objective at any position of such an image, or what raises it is not larger than the rounding of its own
        computation. A scaled empty map is zero too.
        """
        values = arrays.tensor(self.maps, "maps").flatten(1)
        return float((values == 0).all(1).double().mean())

    def scaled(self, size: tuple[int, int] | None = None) -> ArrayT:
        """The maps, each min-max scaled to [0, 1], then resized (bilinear) to ``size`` (H, W) if given. A constant map becomes zero."""
        return scaled(self.maps, size)


def scaled(maps: ArrayT, size: tuple[int, int] | None = None) -> ArrayT:
    """Maps [n, H, W] min-max scaled to [0, 1] one by one, then resized to ``size`` (H, W) if given. A constant map becomes zero."""
    values = arrays.like(geometry.scaled(arrays.tensor(maps, "maps")), maps)
    return values if size is None else resized(values, size)


def resized(maps: ArrayT, size: tuple[int, int]) -> ArrayT:
    """Maps [n, H, W] resized to ``size`` (H, W): bilinear, with aligned pixel centres. Values stay within each map's range."""
    values = arrays.tensor(maps, "maps")
    return arrays.like(interpolate(values[:, None], size=size, mode="bilinear", align_corners=False)[:, 0], maps)
