"""The published numbers, and the table of tolerances for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = {
    # Both sides in float64: the error comes from the order of sums over at most 1e4 terms, divided by a residual of 0.1.
    "float64": 1e-9,
    # float32 features and Gram products (1e-7), divided by a residual that can be a hundredth of the matrix before projection.
    "float32": 1e-3,
    # Features rounded to 11 and 8 bits; the geometry above them is float32.
    "float16": 2e-2,
    "bfloat16": 1e-1,
}

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CASES = ("square", "wide", "two_class", "embedded", "small")
_DATA = Path(__file__).parent


def load(case: str, file: str = "unicam") -> dict[str, Any]:
    with np.load(_DATA / f"{file}.npz", allow_pickle=False) as content:
        return {name.removeprefix(f"{case}/"): content[name] for name in content.files if name.startswith(f"{case}/")}


def error(result: Any, expected: Any) -> float:
    """The largest absolute error over the largest expected value (over one if all are zero); NaN if either side has a NaN."""
    result, expected = (
        value.double() if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value, dtype=np.float64))
        for value in (result, expected)
    )
    assert result.shape == expected.shape
    return float((result - expected).abs().max() / (expected.abs().max() or 1))


def features(
    seed: int = 0, n: int = 19, shape: tuple[int, ...] = (11, 5, 3), other: tuple[int, ...] = (7, 4, 3), classes: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Odd-sized related features of two networks [n, C, H, W] in float64, and labels to which both are related."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    common = torch.randn(n, 6, generator=generator, dtype=torch.float64) + labels[:, None]

    def draw(size: tuple[int, ...]) -> Tensor:
        mixing = torch.randn(6, int(np.prod(size)), generator=generator, dtype=torch.float64)
        noise = torch.randn(n, int(np.prod(size)), generator=generator, dtype=torch.float64)
        return (common @ mixing + 2 * noise).relu().reshape(n, *size)

    return draw(shape), draw(other), labels
