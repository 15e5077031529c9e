"""Decompositions of operators into operators whose derivatives ONNX and TensorRT have.

Each function computes what PyTorch's operator computes, so that autograd can differentiate it into a graph that every runtime
executes. Statistics are computed in float32 at least. A max-pool's gradient goes to the first largest entry of a window, as
PyTorch's does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions

from kdx.export.decompositions import convolution, normalisation, pooling, rearrangement, resizing
from kdx.export.decompositions.attention import attention

aten = torch.ops.aten

FORWARD: dict[Any, Callable[..., Any]] = {
    aten.view.default: torch.reshape,  # a decomposition may leave other strides than its operator
    aten._native_batch_norm_legit_no_training.default: normalisation.batch_norm,
    aten.layer_norm.default: normalisation.layer_norm,
    aten.rms_norm.default: normalisation.rms_norm,
    aten.group_norm.default: normalisation.group_norm,
    aten.scaled_dot_product_attention.default: attention,
    aten.max_pool1d.default: pooling.max_pool_1d,
    aten.max_pool2d.default: pooling.max_pool,
    aten.avg_pool1d.default: pooling.avg_pool_1d,
    aten.avg_pool2d.default: pooling.avg_pool,
    aten.adaptive_avg_pool1d.default: pooling.adaptive_avg_pool_1d,
    aten.adaptive_avg_pool2d.default: pooling.adaptive_avg_pool,
    aten.adaptive_max_pool2d.default: pooling.adaptive_max_pool,
    aten.upsample_nearest2d.vec: resizing.nearest,
    aten.upsample_bilinear2d.vec: resizing.bilinear,
    aten.pad.default: rearrangement.pad,
    aten.copy.default: rearrangement.copy,
    aten.unfold.default: rearrangement.unfold,
}
"""Operator of a forward program -> its decomposition, which autograd differentiates."""

BACKWARD: dict[Any, Callable[..., Any]] = {
    **get_decompositions(
        [
            aten._softmax_backward_data,
            aten._log_softmax_backward_data,
            aten.elu_backward,
            aten.gelu_backward,
            aten.glu_backward,
            aten.hardsigmoid_backward,
            aten.hardswish_backward,
            aten.hardtanh_backward,
            aten.leaky_relu_backward,
            aten.mish_backward,
            aten.sigmoid_backward,
            aten.silu_backward,
            aten.softplus_backward,
            aten.tanh_backward,
            aten.threshold_backward,
        ]
    ),
    aten.convolution_backward.default: convolution.convolution_backward,
    aten.slice_backward.default: rearrangement.slice_backward,
    aten.select_backward.default: rearrangement.select_backward,
}
"""Derivative that autograd records -> its decomposition."""
