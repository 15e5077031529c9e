"""Small networks of patches whose tokens are in any order, with extra tokens anywhere, and in any layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHANNELS = 12
PATCH = 4


class Patches(nn.Module):
    """Patches, mixed by attention, in the layout ``axes``; the logits are the mean over positions.

    order: of the tokens, as a permutation of the patches. extra: the places of extra tokens. axes: nLC, LnC, nCL, nHWC or nCHW.
    """

    def __init__(self, grid: tuple[int, int], order: Sequence[int] | None = None, extra: Sequence[int] = (), axes: str = "nLC") -> None:
        super().__init__()
        torch.manual_seed(0)
        count = grid[0] * grid[1]
        self.grid, self.axes = grid, axes
        self.patch = nn.Conv2d(3, CHANNELS, PATCH, PATCH)
        self.attention = nn.MultiheadAttention(CHANNELS, 3, batch_first=True)
        self.extra = nn.Parameter(torch.randn(1, len(extra), CHANNELS))
        rest = iter(range(count) if order is None else order)
        after = iter(range(count, count + len(extra)))
        self.places = [next(after) if place in extra else next(rest) for place in range(count + len(extra))]
        self.layer = nn.Identity()
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = torch.cat([self.patch(images).flatten(2).transpose(1, 2), self.extra.expand(images.shape[0], -1, -1)], 1)[:, self.places]
        tokens = tokens + 0.5 * self.attention(tokens, tokens, tokens)[0]
        if "H" in self.axes:
            tokens = tokens.unflatten(1, self.grid)
        forms = {"nLC": (0, 1, 2), "LnC": (1, 0, 2), "nCL": (0, 2, 1), "nHWC": (0, 1, 2, 3), "nCHW": (0, 3, 1, 2)}
        out = self.layer(tokens.permute(forms[self.axes]))
        dims = [axis for axis, letter in enumerate(self.axes) if letter in "LHW"]
        logits: Tensor = self.head(out.mean(dims))
        return logits

    def expected(self, images: Tensor) -> Tensor:
        """The feature map [n, C, H, W] by definition: the mixed token of each patch, at its patch."""
        count = self.grid[0] * self.grid[1]
        tokens = torch.cat([self.patch(images).flatten(2).transpose(1, 2), self.extra.expand(images.shape[0], -1, -1)], 1)
        tokens = tokens + 0.5 * self.attention(tokens, tokens, tokens)[0]  # attention does not depend on the order of the tokens
        feature: Tensor = tokens[:, :count].transpose(1, 2).unflatten(2, self.grid)
        return feature


class Windowed(nn.Module):
    """Windows of 2 x 2 patches: as rows [n windows, 4, C], and as an axis [n, windows, 4, C]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, PATCH, PATCH)
        self.inside, self.windows, self.head = nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 4)

    def partitioned(self, images: Tensor) -> Tensor:
        feature = self.patch(images).permute(0, 2, 3, 1)
        windows: Tensor = feature.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        return windows

    def forward(self, images: Tensor) -> Tensor:
        rows = self.inside(self.partitioned(images))
        logits: Tensor = self.head(self.windows(rows.reshape(images.shape[0], -1, 4, 8)).mean((1, 2)))
        return logits
