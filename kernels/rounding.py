"""Maps that contain only the rounding error of their own computation, which scaling to [0, 1] would show as a real map."""

from __future__ import annotations

import torch
from torch import Tensor

from kdx.kernels import geometry

PROBES = 8
"""Columns of normal numbers that follow the channels through a product, to measure what it makes of rounding errors."""

_SAMPLED = 32
"""About this many channels show how large the entries of a feature are."""


_SUM = 64
"""The relative error of a mean or of a normalisation in units of eps: its sums and its differences lose a few digits each."""


def class_maps(features: Tensor, gradient: Tensor, elementwise: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(channel weights [n, C] in float64, maps [n, H, W]) of features and their gradient [n, C, H, W], computed in ``dtype``.

    A channel weight is a mean of gradients, and an elementwise map is a sum over channels. They are compared with the magnitudes that
    were added, which are larger than the result where they cancel. If no weight of an image is larger than the rounding of its mean, the
    weights and the map are zero; so is an elementwise map if no position is larger than the rounding of its sum.
    """
    eps, wide_eps = (torch.finfo(kind).eps for kind in (dtype, torch.promote_types(dtype, torch.float32)))
    weights, magnitudes = geometry.gap(gradient), geometry.gap(gradient.abs())
    real = (weights.abs() > (4 * eps + _SUM * wide_eps) * magnitudes).any(1)
    weights = torch.where(real[:, None], weights, 0.0)
    if elementwise:
        maps = geometry.elementwise_cam(features, gradient.flatten(1))
        sums = geometry.elementwise_cam(features.abs(), gradient.abs().flatten(1))
        real = (maps > (eps / 4 + 16 * wide_eps) * sums).flatten(1).any(1)
        return weights, torch.where(real[:, None, None], maps, 0.0)
    normal, exponents = geometry.split_exponent(weights)
    return weights, geometry.times_power(geometry.cam(features, normal), exponents)


def with_probes(means: Tensor, features: Tensor, seed: int = 0) -> Tensor:
    """The spatial means [n, C] of features [n, C, H, W], and probes [n, C + k] that are as large as the entries of the features.

    Channel weights are a linear function of the means. The same function of the probes, times the relative rounding of the features, is
    the rounding error of the weights. seed: of the probes, another one for the features of a reference set.
    """
    return with_probes_of(means, entry_sizes(features), seed)


def with_probes_of(means: Tensor, sizes: Tensor, seed: int) -> Tensor:
    """`with_probes` of features whose entries have these `entry_sizes` [n]."""
    return torch.cat([means, sizes[:, None] * drawn(len(sizes), seed).to(means.device)], 1)


def drawn(count: int, seed: int) -> Tensor:
    """The normal numbers [n, k] of probes, float64."""
    return torch.randn(count, PROBES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampling_step(channels: int) -> int:
    """One of this many channels is read for the `entry_sizes`."""
    return max(1, channels // _SAMPLED)


def entry_sizes(features: Tensor, centre: Tensor | None = None) -> Tensor:
    """The mean absolute value [n], over some channels, of the features [n, C, ...] plus the centre [C, ...]."""
    step = sampling_step(features.shape[1])
    sample = features[:, ::step] if centre is None else features[:, ::step] + centre[::step]
    sample = sample.flatten(1)
    dtype = torch.promote_types(features.dtype, torch.float32)
    sums: Tensor = sample.abs().sum(1, dtype=dtype)  # no squares, which could underflow
    return sums.double() / sample.shape[1]


def probed(weights: Tensor, features: Tensor, *, together: bool) -> Tensor:
    """The channel weights [n, C] of the result of `with_probes`: zero for an image all of whose weights are only rounding.

    together: whether this must hold for all images. Near-duplicates in a batch magnify rounding without making the weights wrong.
    """
    real = exceed_rounding(weights, features.dtype, features[0, 0].numel())
    return torch.where((real.any() if together else real)[..., None], weights[:, :-PROBES], 0.0)


def probed_set(weights: Tensor, dtype: torch.dtype, positions: int) -> Tensor:
    """The channel weights [2, n, C] of a set, from those of `with_probes` with either half as context: zero if all are only rounding.

    dtype, positions: of the features.
    """
    real = exceed_rounding(weights.sum(0), dtype, positions).any()
    return torch.where(real, weights[..., :-PROBES], 0.0)


def exceed_rounding(weights: Tensor, dtype: torch.dtype, positions: int) -> Tensor:
    """Whether any channel weight of an image, [n], is larger than its rounding, which the probes behind the weights [n, C + k] show."""
    weights, probes = weights[:, :-PROBES], weights[:, -PROBES:]
    real: Tensor = weights.abs().amax(1) > relative_rounding(dtype, positions) * probes.square().mean(1).sqrt()
    return real


def relative_rounding(dtype: torch.dtype, positions: int) -> float:
    """The relative rounding of spatial means of features. The entries' own rounding averages out."""
    eps, wide_eps = (torch.finfo(kind).eps for kind in (dtype, torch.promote_types(dtype, torch.float32)))
    return float(eps / positions**0.5 + _SUM * wide_eps)
