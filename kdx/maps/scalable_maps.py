"""Maps that are never negative, with their scaling and their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic

import numpy as np
from numpy.typing import NDArray

from kdx.features import arrays
from kdx.features.arrays import ArrayT
from kdx.maps.drawing import Sheet
from kdx.maps.figures import Drawable, contact_sheet, single_kind
from kdx.maps.scaling import at_size, scaled


@dataclass(frozen=True)
class ScalableMaps(Drawable, Generic[ArrayT]):
    """Maps [n, H, W] >= 0 of n images, not scaled. They draw themselves: see `kdx.Drawable`."""

    maps: ArrayT

    _comparable: ClassVar[bool] = True  # whether values of different images are

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

    def _count(self) -> int:
        return len(self.maps)

    def _sheet(self, images: list[NDArray[np.uint8]] | None, index: list[int], kinds: Sequence[str] | None) -> Sheet:
        single_kind(kinds)
        return contact_sheet(self.maps, images, index, signed=False, comparable=self._comparable)
