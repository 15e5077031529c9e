"""Random numbers that follow from a seed and leave the caller's generators untouched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(device: torch.device, seed: int, stream: int) -> Iterator[None]:
    """Inside the block, PyTorch's random numbers follow from (seed, stream). Afterwards its generators are as they were before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:7]))
        yield
