"""Normalisations and their derivatives against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdx.export import decompositions
from tests.export.decompositions.agreement import HALF, agree, aten, normal, passed


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 4, 5, 7)])
def test_normalisations(affine: bool, shape: tuple[int, ...]) -> None:
    x = normal(*shape) * 3 + 2
    channel = (normal(4, seed=1), normal(4, seed=2)) if affine else (None, None)
    mean, var = normal(4, seed=3).detach(), normal(4, seed=4).square()
    ours, theirs = (
        [passed(lambda x, run=run: run(x, *channel, mean, var, 0.1, 1e-3), [x])][0]
        for run in (
            decompositions.FORWARD[aten._native_batch_norm_legit_no_training.default],
            aten._native_batch_norm_legit_no_training.default,
        )
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    agree(aten.group_norm.default, x, 2, *channel, 1e-3)
    for dims in range(1, len(shape)):
        last = shape[-dims:]
        weights = (normal(*last, seed=1), normal(*last, seed=2)) if affine else (None, None)
        agree(aten.layer_norm.default, x, last, *weights, 1e-3, tolerance=1e-11)
        agree(aten.rms_norm.default, x, last, weights[0], 1e-3, tolerance=1e-11)
        agree(aten.rms_norm.default, x, last, weights[0], tolerance=1e-11)


@pytest.mark.parametrize("dtype", HALF)
def test_statistics_of_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    """The squares of these numbers exceed the largest float16, and their sums need more than the eight bits of bfloat16."""
    x = normal(3, 4, 6, 50, dtype=dtype) * 300
    weight, bias = (normal(50, seed=seed, dtype=dtype) for seed in (1, 2))
    channel = [normal(4, seed=seed, dtype=dtype) for seed in (3, 4)]
    for operator, args in (
        (aten.layer_norm.default, (x, (50,), weight, bias)),
        (aten.rms_norm.default, (x, (50,), weight)),
        (aten.group_norm.default, (x, 2, *channel)),
    ):
        ours = decompositions.FORWARD[operator](*args)
        exact = operator(*(arg.double() if isinstance(arg, Tensor) else arg for arg in args))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=HALF[dtype] * float(exact.abs().max()))
