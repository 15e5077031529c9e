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
        """The maps, each min-max scaled to [0, 1], then resized (bilinear) to ``size`` (H, W) if given. A constant map becomes zero.

        The resize lowers the peaks: the largest value of a resized map is at most 1, and often below it. `at_size` restores it.
        """
        return scaled(self.maps, size)

    def at_size(self, size: tuple[int, int]) -> ArrayT:
        """The maps resized (bilinear) to ``size`` (H, W), each then min-max scaled: its lowest value is 0, and its peak is exactly 1.

        A constant map becomes zero. This is the scale that CAM libraries use for display. It does not keep the strength of a map: the peak
        of a weak map is 1 too.
        """
        return at_size(self.maps, size)


def scaled(maps: ArrayT, size: tuple[int, int] | None = None) -> ArrayT:
    """Maps [n, H, W] min-max scaled to [0, 1] one by one, then resized to ``size`` (H, W) if given. A constant map becomes zero."""
    values = arrays.like(geometry.scaled(arrays.tensor(maps, "maps")), maps)
    return values if size is None else resized(values, size)


def at_size(maps: ArrayT, size: tuple[int, int], *, signed: bool = False) -> ArrayT:
    """Maps [n, H, W] resized to ``size`` and scaled one by one: min-max to [0, 1], or if ``signed`` by the largest absolute value.

    Maps are scaled before the resize as well, so that very small ones keep their digits. A constant (if signed: zero) map becomes zero.
    """
    scale = geometry.symmetric if signed else geometry.scaled
    values = resized(scale(arrays.tensor(maps, "maps")), size)
    return arrays.like(scale(values), maps)


def resized(maps: ArrayT, size: tuple[int, int]) -> ArrayT:
    """Maps [n, H, W] resized to ``size`` (H, W): bilinear, with aligned pixel centres. Values stay within each map's range."""
    values = arrays.tensor(maps, "maps")
    return arrays.like(interpolate(values[:, None], size=size, mode="bilinear", align_corners=False)[:, 0], maps)
