"""The images that a training reads: splits, cached in memory where they fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdx.data.dataset import Dataset, Indices
from kdx.data.images import check_unreadable, load_images

CACHE_BYTES = 1_000_000_000
"""A split whose decoded pixels (uint8) take fewer bytes stays in memory. A larger one is decoded again in every epoch."""


class SplitImages:
    """The images of a split: decoded once and cached where they fit into ``CACHE_BYTES``, otherwise decoded when they are read.

    limit: the share of images that may be unreadable. Beyond it, KdxError is raised when they are decoded, as by `kdx explain`.
    """

    def __init__(self, dataset: Dataset, indices: Indices, size: tuple[int, int], limit: float) -> None:
        self.dataset, self.indices, self.size, self.limit = dataset, indices, size, limit
        self._planned = len(indices)
        self.unreadable: dict[str, str] = {}
        """The reason for each unreadable image, by its id."""
        self.pixels: Tensor | None = None
        """The cache, uint8 [n, 3, H, W]."""
        if len(indices) * size[0] * size[1] * 3 < CACHE_BYTES:
            parts = [load_images(dataset, part, size) for part in np.array_split(indices, len(indices) // 512 + 1)]
            self.pixels = torch.cat([images.levels for images in parts])
            self.indices = np.concatenate([images.kept for images in parts])
            self._record([image for images in parts for image in images.unreadable])

    def _record(self, unreadable: Sequence[tuple[str, str]]) -> None:
        self.unreadable |= dict(unreadable)
        check_unreadable(list(self.unreadable.items()), self._planned, self.limit)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, positions: Indices) -> tuple[Tensor, Tensor, Indices]:
        """Images [n, 3, H, W] in [0, 1], labels [n], and the positions [n] of these. An image that cannot be read is left out."""
        if self.pixels is not None:
            labels = torch.from_numpy(self.dataset.labels[self.indices[positions]])
            return self.pixels[torch.from_numpy(positions)].float().div(255), labels, positions
        images = load_images(self.dataset, self.indices[positions], self.size)
        self._record(images.unreadable)
        kept = positions[np.isin(self.indices[positions], images.kept)]
        return images.pixels, torch.from_numpy(self.dataset.labels[images.kept]), kept

    def first(self, count: int) -> tuple[Tensor, Tensor, Indices]:
        """`read` of the first ``count`` images that can be read, or of fewer if there are not as many."""
        parts, readable = [], 0
        for start in range(0, len(self), count):
            parts.append(self.read(np.arange(start, min(start + count, len(self)))))
            readable += len(parts[-1][2])
            if readable >= count:
                break
        pixels, labels, positions = zip(*parts, strict=True)
        return torch.cat(pixels)[:count], torch.cat(labels)[:count], np.concatenate(positions)[:count]
