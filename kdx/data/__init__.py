"""Data references, splits, batches and decoding."""
