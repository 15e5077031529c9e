"""Data references, splits, batches, and decoding with prefetching."""
