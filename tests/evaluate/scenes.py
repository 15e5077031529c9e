"""Images with a known patch, networks that read it, and maps of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZE = (20, 24)
PATCH = slice(2, 7), slice(14, 20)
N = 6


def images(n: int = N, seed: int = 0) -> Tensor:
    """Dim noise with a bright, textured patch."""
    pixels = 0.3 * torch.rand(n, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    pixels[:, :, *PATCH] += 0.6
    return pixels


def patch_map(n: int = N) -> Tensor:
    maps = torch.zeros(n, *SIZE)
    maps[:, *PATCH] = 1
    return maps


def uniform_map(n: int = N) -> Tensor:
    return torch.full((n, *SIZE), 0.7)


def centre_map(n: int = N) -> Tensor:
    y, x = (torch.linspace(-1, 1, size) for size in SIZE)
    return (-(y[:, None] ** 2) - x**2).exp().expand(n, *SIZE)


class PatchReader(nn.Module):
    """Logits [n, 2] that depend on the mean of the patch alone: class 1 if it is bright."""

    def forward(self, pixels: Tensor) -> Tensor:
        bright = 12 * (pixels[:, :, *PATCH].mean((1, 2, 3)) - 0.5)
        return torch.stack([torch.zeros_like(bright), bright], 1)


class Constant(nn.Module):
    """Logits [n, 2] of zero."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.new_zeros(len(pixels), 2)
