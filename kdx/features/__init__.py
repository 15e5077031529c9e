"""Features of images: arrays, rows on disk, and the target."""
