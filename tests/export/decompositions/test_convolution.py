"""The derivative of convolutions against PyTorch's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kdx.export import decompositions
from tests.export.decompositions.agreement import KERNELS, SIZES, STRIDES, aten, normal, product


def test_the_input_gradient_of_convolutions() -> None:
    """Includes strides that do not reach the image's end, padding wider than the kernel, groups, and even kernels."""
    tried = 0
    choices: dict[str, Sequence[Any]] = {
        "size": SIZES,
        "kernel": [*KERNELS, (7, 2)],
        "stride": STRIDES[1:],
        "padding": [(0, 0), (1, 1), (0, 2), (4, 3)],
    }
    for case in product(2, 150, **choices, dilation=[(1, 1), (2, 1), (2, 3)], groups=[1, 2, 4]):
        (h, w), (kh, kw), groups, dilation, padding = (case[key] for key in ("size", "kernel", "groups", "dilation", "padding"))
        if dilation[0] * (kh - 1) < h + 2 * padding[0] and dilation[1] * (kw - 1) < w + 2 * padding[1]:
            weight = normal(8, 4 // groups, kh, kw, seed=1)
            convolution_gradients(normal(2, 4, h, w), weight, case["stride"], padding, dilation, False, [0, 0], groups)
            tried += 1
    assert tried > 50


def test_the_input_gradient_of_transposed_convolutions() -> None:
    """Output padding may reach the stride if the dilation is larger."""
    tried = 0
    choices: dict[str, Sequence[Any]] = {
        "kernel": [(1, 1), (3, 3), (4, 2)],
        "stride": STRIDES[1:],
        "padding": [(0, 0), (1, 0)],
        "extra": [(0, 0), (1, 0), (1, 2)],
    }
    for case in product(3, 100, **choices, dilation=[(1, 1), (2, 3)], groups=[1, 2]):
        kernel, stride, padding, extra, dilation, groups = case.values()
        if all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
            weight = normal(4, 6 // groups, *kernel, seed=1)
            convolution_gradients(normal(2, 4, 5, 6), weight, stride, padding, dilation, True, extra, groups)
            tried += 1
    assert tried > 30


@pytest.mark.parametrize("shape", [(2, 4, 11), (2, 4, 7, 5, 6)])
def test_the_input_gradient_of_convolutions_along_one_and_three_axes(shape: tuple[int, ...]) -> None:
    axes = len(shape) - 2
    for stride, groups in itertools.product([1, 2, 3], [1, 2]):
        weight = normal(6, 4 // groups, *[3, 2, 3][:axes], seed=1)
        convolution_gradients(normal(*shape), weight, [stride] * axes, [1] * axes, [1] * axes, False, [0] * axes, groups)


def convolution_gradients(x: Tensor, weight: Tensor, *geometry: Any) -> None:
    gradient = normal(*aten.convolution.default(x, weight, None, *geometry).shape, seed=5)
    args = gradient, x, weight, None, *geometry, [True, False, False]
    ours, none, nothing = decompositions.BACKWARD[aten.convolution_backward.default](*args)
    assert none is nothing is None
    torch.testing.assert_close(ours, aten.convolution_backward.default(*args)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("output_mask", [(True, True, False), (False, False, True)])
def test_a_convolution_whose_weights_depend_on_the_image_is_not_decomposed(output_mask: tuple[bool, ...]) -> None:
    x, weight = normal(1, 2, 5, 5), normal(3, 2, 3, 3)
    args = (normal(1, 3, 3, 3), x, weight, [3], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, output_mask)
    assert decompositions.BACKWARD[aten.convolution_backward.default](*args) is NotImplemented
