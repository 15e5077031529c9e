"""Attention and its derivative against PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdx.export import decompositions
from tests.export.decompositions.agreement import HALF, agree, aten, normal


def attend(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> None:
    agree(aten.scaled_dot_product_attention.default, q, k, v, **kwargs)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(scale: float | None) -> None:
    q, k, v = normal(2, 4, 5, 3), normal(2, 4, 7, 3, seed=1), normal(2, 4, 7, 6, seed=2)
    seen = normal(2, 1, 5, 7, seed=3) > 0
    attend(q, k, v, scale=scale)
    attend(q, k, v, scale=scale, is_causal=True)
    attend(q, k, v, attn_mask=normal(5, 7, seed=4), scale=scale)
    attend(q, k, v, attn_mask=seen, scale=scale)
    attend(q, normal(2, 2, 7, 3, seed=5), normal(2, 2, 7, 6, seed=6), scale=scale, enable_gqa=True)


def test_a_query_whose_keys_are_all_masked_gets_zeros() -> None:
    seen = torch.ones(5, 7, dtype=torch.bool)
    seen[2] = False
    q, k, v = normal(2, 4, 5, 3), normal(2, 4, 7, 3, seed=1), normal(2, 4, 7, 6, seed=2)
    attend(q, k, v, attn_mask=seen)
    assert not decompositions.FORWARD[aten.scaled_dot_product_attention.default](q, k, v, seen)[:, :, 2].any()


@pytest.mark.parametrize("dtype", HALF)
def test_attention_in_half_precision(dtype: torch.dtype) -> None:
    q, k, v = (normal(2, 3, 9, 16, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    ours = decompositions.FORWARD[aten.scaled_dot_product_attention.default](q * 8, k * 8, v)
    exact = aten.scaled_dot_product_attention.default((q * 8).double(), (k * 8).double(), v.double())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=HALF[dtype] * float(exact.abs().max()))
