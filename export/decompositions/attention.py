"""Attention as two matrix products and a softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdx.kernels.geometry import wide


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * Q K^T + mask) V per head, with the operator's own parameters; dropout does nothing in eval mode."""
    if enable_gqa:  # several query heads share one key head
        key, value = (tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], -3) for tensor in (key, value))
    mask = attn_mask
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    scores = wide(query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ wide(key).transpose(-2, -1)
    if mask is None or mask.is_floating_point():
        weights = (scores if mask is None else scores + mask).softmax(-1)
    else:  # a query whose keys are all masked gets zeros
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0.0)
    return weights.to(value.dtype) @ value
