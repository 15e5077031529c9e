"""Min-max scaling and resizing of maps."""

from __future__ import annotations

from torch.nn.functional import interpolate

from kdx.features import arrays
from kdx.features.arrays import ArrayT
from kdx.kernels import geometry


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
