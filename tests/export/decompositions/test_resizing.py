"""Resizing and its derivative against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from kdx.export import decompositions
from tests.export.decompositions.agreement import agree, aten, normal

TARGETS = [(5, 7), (10, 14), (15, 21), (8, 5), (3, 20), (1, 1), (1, 7), (10, 7)]
FACTORS = [(2.0, 2.0), (1.5, 0.7), (3.3, 3.3), (0.4, 2.6), (1.05, 1.1), (1.99, 2.01), (3.0, 4.0)]


@pytest.mark.parametrize(("size", "factors"), [*((size, None) for size in TARGETS), *((None, factors) for factors in FACTORS)])
def test_resizing(size: tuple[int, int] | None, factors: tuple[float, float] | None) -> None:
    """If the factor is not the ratio of the sizes, PyTorch steps by the factor, not by the ratio."""
    agree(aten.upsample_nearest2d.vec, normal(2, 3, 5, 7), size, factors)
    agree(aten.upsample_bilinear2d.vec, normal(2, 3, 5, 7), size, False, factors)
    agree(aten.upsample_bilinear2d.vec, normal(2, 3, 5, 7), size, True, factors)


def test_nearest_steps_by_the_factor_even_if_the_sizes_divide() -> None:
    agree(aten.upsample_nearest2d.vec, normal(2, 3, 3, 3), None, (3.3, 3.3))
    assert decompositions.FORWARD[aten.upsample_nearest2d.vec](normal(1, 1, 3, 3), None, (3.3, 3.3)).shape == (1, 1, 9, 9)


def test_interpolate_calls_the_decomposed_operators_with_these_arguments() -> None:
    """torch.nn.functional passes the factor on, unless it is asked to compute it from the sizes."""
    x = normal(2, 3, 5, 7)
    for again, factors in ((None, (1.5, 1.3)), (True, None)):
        size = None if factors else (7, 9)
        theirs = torch.nn.functional.interpolate(x, scale_factor=(1.5, 1.3), mode="bilinear", recompute_scale_factor=again)
        torch.testing.assert_close(decompositions.FORWARD[aten.upsample_bilinear2d.vec](x, size, False, factors), theirs)
