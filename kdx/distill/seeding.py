"""Repeatable training: random numbers from a seed, and deterministic algorithms. The caller's random state does not change."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_settings: Any = torch.utils.deterministic  # PyTorch has no types for it


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, run a block with deterministic algorithms, so that a training that was stopped ends with the same weights.

    On a CPU the algorithms are deterministic anyway. Where PyTorch has no deterministic algorithm for an operation on a GPU, it warns and
    uses one that is not deterministic.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch does not consider matrix products deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, fill = torch.backends.cudnn.benchmark, _settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A benchmark may select another algorithm in the next process.
    torch.backends.cudnn.benchmark = False
    _settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        _settings.fill_uninitialized_memory = fill


@contextmanager
def seeded(device: torch.device, seed: int, *stream: int) -> Iterator[None]:
    """Inside the block, the random numbers of PyTorch, NumPy's global generator and Python follow from (seed, stream).

    Afterwards these generators are as they were before.
    """
    number = int.from_bytes(hashlib.sha256(" ".join(map(str, (seed, *stream))).encode()).digest()[:7])
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - networks of other packages may use it
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(number)
            random.seed(number)
            np.random.seed(number % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def random_state(device: torch.device, generator: np.random.Generator) -> dict[str, Any]:
    """The states of ``generator`` and of all generators that `seeded` controls, as values that a file of weights may contain."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "generator": json.dumps(generator.bit_generator.state),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def set_random_state(device: torch.device, generator: np.random.Generator, state: dict[str, Any]) -> None:
    """Put the generators back into a state of `random_state`."""
    generator.bit_generator.state = json.loads(state["generator"])
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
