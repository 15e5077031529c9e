"""Export PyTorch networks to files that other runtimes execute."""
