"""The scaling and resizing of maps, written from the definition: slow, one position at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def slow_scale(map_: NDArray[Any]) -> NDArray[np.float64]:
    low, high = float(map_.min()), float(map_.max())
    return np.array([[(float(x) - low) / (high - low) if high > low else 0.0 for x in line] for line in map_])


def slow_resize(map_: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Bilinear interpolation with aligned pixel centres and repeated edges."""
    out = np.empty((height, width))
    h, w = map_.shape
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            total = 0.0
            for p in {math.floor(y), math.ceil(y)}:
                for q in {math.floor(x), math.ceil(x)}:
                    weight = max(0.0, 1 - abs(y - p)) * max(0.0, 1 - abs(x - q))
                    total += weight * map_[p, q]
            out[i, j] = total
    return out
