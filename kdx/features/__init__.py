"""Features of images: arrays, rows on disk, and the target."""

from kdx.features.target_rows import prototypes, soft_labels

__all__ = ["prototypes", "soft_labels"]
