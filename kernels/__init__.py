"""The numerical core: distance geometry and UniCAM. Knows nothing of models or files."""
