"""Spatial means of features, and maps from features and channel weights, by kernels; a wrong call is a ValueError."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from torch import Tensor

from kdx.kernels import cuda
from kdx.kernels.launches import THREADS, check, launch, warps
from kdx.kernels.rounding import PROBES, relative_rounding, sampling_step

_BLOCKS = 10
"""Blocks of the cam kernel per multiprocessor: about twice as many as run at once."""

_SHORT, _SHORT_ROWS = 64, 16
"""The means kernel: the largest number of positions of a short row, and the short rows per warp."""

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def means(features: Tensor) -> Tensor:
    """Float64 spatial means [n, C] of float32, float16 or bfloat16 features [n, C, H, W]: `geometry.gap`. Reads the features once."""
    return _means(features, None)


def means_with_probes(features: Tensor, drawn: Tensor) -> Tensor:
    """`rounding.with_probes` [n, C + 8] of the `means` of features [n, C, H, W], from normal numbers ``drawn`` [n, 8] in float64."""
    return _means(features, drawn)


def add_probes(means: Tensor, features: Tensor, drawn: Tensor) -> Tensor:
    """`means_with_probes`, where the first C columns of ``means`` [n, C + 8] are known: writes the others."""
    return _means(features, drawn, means)


def _means(features: Tensor, drawn: Tensor | None, known: Tensor | None = None) -> Tensor:
    check(features.ndim == 4 and features.dtype in _NAMES, "features must be float32, float16 or bfloat16 [n, C, H, W]")
    check(drawn is None or (drawn.shape == (len(features), PROBES) and drawn.dtype == torch.float64), "drawn must be float64 [n, 8]")
    features = features.contiguous()
    images, channels, height, width = features.shape
    rows, positions = images * channels, height * width
    columns = channels if drawn is None else channels + PROBES
    result = torch.empty(images, columns, dtype=torch.float64, device=features.device) if known is None else known
    is_short = positions <= _SHORT
    step = _SHORT_ROWS * positions if is_short else positions
    sizes = (16,) if is_short else (16, 8)
    pack = next((size for size in sizes if features.data_ptr() % size == 0 and step * features.element_size() % size == 0), 0)
    blocks = 0 if known is not None else warps(-(-rows // _SHORT_ROWS) if is_short else rows)
    numbers = (np.int64(rows), positions, channels, pack, columns, blocks, sampling_step(channels))
    grid = (blocks + (0 if drawn is None else images), 1, 1)
    launch(features, "means", f"means_{_NAMES[features.dtype]}", grid, features, *numbers, drawn, result)
    return result


def cam(features: Tensor, channel_weights: Tensor) -> Tensor:
    """Float32 maps ReLU(sum_c a_ic F_ic) [n, H, W] of float32, float16 or bfloat16 features [n, C, H, W] and weights [n, C].

    Reads the features once. As `geometry.cam`.
    """
    finished = torch.zeros(len(features), dtype=torch.int32, device=features.device)
    return _cam(features, channel_weights.float().contiguous(), None, finished)


@dataclass(frozen=True)
class ScaledWeights:
    """Channel weights of S maps for `scaled_cam`.

    normal [S, n, C] float32 and exponents [S, n]: the weights are normal 2^exponents, with the largest of each image near one. plain
    [S, n, C]: the weights in float32. real [S, n]: 1 where any weight of an image is larger than its rounding, else 0, float64. finished
    [S, n]: zeros, which `scaled_cam` overwrites.
    """

    normal: Tensor
    exponents: Tensor
    plain: Tensor
    real: Tensor
    finished: Tensor


def scaled_weights(weights: Tensor, dtype: torch.dtype, positions: int) -> ScaledWeights:
    """The channel weights [S, n, C + 8] of means with probes, for features of this type and number of positions."""
    check(weights.ndim == 3 and weights.dtype == torch.float64, "weights must be float64 [S, n, C + 8]")
    maps, n, columns = weights.shape
    channels = columns - PROBES
    normal, plain = (torch.empty(maps, n, channels, dtype=torch.float32, device=weights.device) for _ in range(2))
    exponents, finished = (torch.empty(maps, n, dtype=torch.int32, device=weights.device) for _ in range(2))
    real = weights.new_empty(maps, n)
    sizes = (channels, PROBES, relative_rounding(dtype, positions))
    launch(weights, "cam", "cam_weights", (n, maps, 1), weights.contiguous(), *sizes, normal, plain, exponents, real, finished)
    return ScaledWeights(normal, exponents, plain, real, finished)


def scaled_cam(features: Tensor, weights: ScaledWeights, number: int) -> Tensor:
    """`cam` [n, H, W] of features and the weights of the map with this number. Each number can be used only once."""
    return _cam(features, weights.normal[number], weights.exponents[number], weights.finished[number])


def _cam(features: Tensor, channel_weights: Tensor, exponents: Tensor | None, finished: Tensor) -> Tensor:
    check(features.ndim == 4 and features.dtype in _NAMES, "features must be float32, float16 or bfloat16 [n, C, H, W]")
    check(channel_weights.shape == features.shape[:2], "weights must be [n, C]")
    features = features.contiguous()
    n, channels, height, width = features.shape
    plan = _plan(features, _BLOCKS * cuda.launcher(features.device).multiprocessors)
    partial = torch.empty(n, plan.splits, height, width, dtype=torch.float32, device=features.device)
    maps = torch.empty(n, height, width, dtype=torch.float32, device=features.device)
    shape = (channels, height, width, plan.period, plan.lanes, plan.periods_per_block, plan.wide)
    grid = (n, plan.slices, plan.splits)
    results = (exponents, partial, finished, maps)
    launch(features, "cam", f"cam_{_NAMES[features.dtype]}", grid, features, channel_weights, *shape, *results)
    return maps


@dataclass(frozen=True)
class _Plan:
    """The division of an image among blocks, as described in cam.cu. period and lanes count packs."""

    wide: bool
    period: int
    lanes: int
    slices: int
    periods_per_block: int
    splits: int


def _plan(features: Tensor, blocks: int) -> _Plan:
    n, channels, height, width = features.shape
    positions, pack = height * width, 16 // features.element_size()
    period = positions // gcd(positions, pack)
    aligned = features.data_ptr() % 16 == 0 and channels * positions % pack == 0
    wide = aligned and positions >= pack and (period <= THREADS or positions % pack == 0)
    if not wide:
        pack, period = 1, positions
    lanes = min(period, THREADS)
    slices = -(-period // lanes)
    periods = -(-channels * positions // (pack * period))
    # At most this many blocks, and at least four packs per thread.
    splits = max(1, min(blocks // (n * slices), periods // (4 * (THREADS // lanes))))
    periods_per_block = -(-periods // splits)
    return _Plan(wide, period, lanes, slices, periods_per_block, -(-periods // periods_per_block))
