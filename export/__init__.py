"""PyTorch networks -> files that other runtimes execute."""
