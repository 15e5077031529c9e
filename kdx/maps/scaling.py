"""Maps scaled to [0, 1] and resized."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kdx.features import arrays
from kdx.features.arrays import ArrayT
from kdx.kernels import geometry


def scaled(maps: ArrayT, size: tuple[int, int] | None = None) -> ArrayT:
    """Maps [n, H, W] min-max scaled to [0, 1] image by image, then resized (bilinear) to ``size`` (H, W) where given."""
    found = geometry.scaled(arrays.tensor(maps, "maps"))
    if size is not None:
        found = torch.nn.functional.interpolate(found[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return arrays.like(found, maps)


def resized(map_: NDArray[np.floating], height: int, width: int) -> NDArray[np.float64]:
    """Bilinear resize of one map ``[h, w]`` to ``[height, width]``, pixel centres aligned, edges held; stays within the map's range."""
    values = np.asarray(map_, dtype=np.float64)
    # Gathered and not multiplied by a matrix: for arrays this small the linear algebra's threads cost more than its sums.
    for axis, out in enumerate((height, width)):
        below, above, part = _taps(values.shape[axis], out)
        part = part[:, None] if axis == 0 else part
        values = (1 - part) * np.take(values, below, axis) + part * np.take(values, above, axis)
    return values


def _taps(size: int, out: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """For each place of a resized axis: its two neighbours, and the second one's part."""
    place = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    below = np.floor(place).astype(np.intp)
    return below, np.minimum(below + 1, size - 1), place - below
