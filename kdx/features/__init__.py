"""Features: arrays in and out, rows on disk, and targets."""
