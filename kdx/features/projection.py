"""Random projections, which preserve distances approximately: of channels for maps, and of whole images for distances alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdx.kernels.distances import wide


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
    matrix = torch.from_numpy(_generator(seed, role, layer).normal(0, project**-0.5, (channels, project)).astype(np.float32)).to(
        features.device
    )
    return torch.einsum("nchw,ck->nkhw", features.float(), matrix)


@dataclass(frozen=True, eq=False)
class Sketch:
    """A random projection of rows [n, d] to K = ``size`` numbers, in O(d) operations per row:

        y_k = sum_i s_i x_i over the i with h(i) = k,    h(i) = (i + r_b) mod K    for the i of block b = floor(i/K)

    with random signs s_i and a random shift r_b of each block of K consecutive values. Two values of different blocks are added to the
    same number with probability 1/K, and two of the same block never are, so that

        E <y, y'> = <x, x'>    and    Var |y|^2 = 2/K (|x|^4 - sum_b |x_b|^4)    where x_b are the values of block b.

    A squared distance has the expected value of the unprojected one and a relative standard deviation of at most sqrt(2/K) for all
    features, and a distance has one of about 1/sqrt(2K). This is the count sketch of Charikar, Chen and Farach-Colton ("Finding frequent
    items in data streams", ICALP 2002), with shifts in place of an independent hash of each value, for which the same variance holds.

    signs [d]: 1 or -1, float32. shifts [ceil(d/K)]: from 0 to K - 1.
    """

    signs: Tensor
    shifts: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, width: int, size: int, seed: int, role: str, layer: str) -> Sketch:
        """The sketch of rows of ``width`` values. Each role and layer has its own, which follows from the seed."""
        generator = _generator(seed, role, layer)
        signs = torch.from_numpy(generator.integers(0, 2, width).astype(np.float32) * 2 - 1)
        return cls(signs, tuple(generator.integers(0, size, -(-width // size)).tolist()), size)

    def __call__(self, rows: Tensor) -> Tensor:
        """The sketches [n, K] of rows [n, d], in float32 at least."""
        rows = wide(rows)
        signs, result = self.signs.to(rows), rows.new_zeros(len(rows), self.size)
        for shift, part, own in zip(self.shifts, rows.split(self.size, 1), signs.split(self.size), strict=True):
            straight = min(part.shape[1], self.size - shift)  # the other values wrap to the beginning
            result[:, shift : shift + straight].addcmul_(part[:, :straight], own[:straight])
            result[:, : part.shape[1] - straight].addcmul_(part[:, straight:], own[straight:])
        return result


def _generator(seed: int, role: str, layer: str) -> np.random.Generator:
    """The random numbers of a role's projection at a layer."""
    digest = hashlib.sha256(f"{role}/{layer}".encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([seed, *digest[:8]])
