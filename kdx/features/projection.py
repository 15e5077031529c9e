"""Random projections of channels, which preserve distances approximately."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def projected_channels(channels: int, project: int) -> int:
    """The number of channels after a projection to ``project`` channels; 0 stands for no projection, and fewer channels are kept."""
    return min(channels, project) if project else channels


def projected(features: Tensor, project: int, seed: int, role: str, layer: str) -> Tensor:
    """Features [n, C, h, w] projected to K = ``project`` channels: sum_c F_ic(p) P_ck, with normal P_ck of variance 1/K.

    The same matrix is applied at every position, so squared distances at a position, and between whole images, keep their expected value
    (Johnson and Lindenstrauss 1984). The relative standard deviation of a squared distance is sqrt(2/K) if all differences of the two
    images are along one direction of channels, and less if they are along several. Features of K channels or fewer are returned as they
    are. Each role and layer has its own matrix, which follows from the seed.
    """
    channels = features.shape[1]
    if not project or channels <= project:
        return features
    digest = hashlib.sha256(f"{role}/{layer}".encode("utf-8", "surrogatepass")).digest()
    generator = np.random.default_rng([seed, *digest[:8]])
    matrix = torch.from_numpy(generator.normal(0, project**-0.5, (channels, project)).astype(np.float32)).to(features.device)
    return torch.einsum("nchw,ck->nkhw", features.float(), matrix)
