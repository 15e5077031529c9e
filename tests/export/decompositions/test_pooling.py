"""Pooling and its derivative against PyTorch's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from tests.export.decompositions.agreement import ADDED, KERNELS, SIZES, STRIDES, agree, aten, normal, product, whole


def fits(size: Sequence[int], kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int] = (1, 1)) -> bool:
    """Whether PyTorch accepts the padding (at most half the kernel) and at least one window fits."""
    return all(2 * p <= k and d * (k - 1) < n + 2 * p for n, k, p, d in zip(size, kernel, padding, dilation, strict=True))


def test_max_pooling() -> None:
    """The first largest entry of a window gets its gradient; padding never does."""
    tried = 0
    choices: dict[str, Sequence[Any]] = {"size": SIZES, "kernel": KERNELS, "stride": STRIDES, "padding": [(0, 0), (1, 1), (0, 1), (2, 2)]}
    for case in product(0, 400, **choices, dilation=[(1, 1), (2, 1), (2, 3)], ceil_mode=[False, True]):
        size, kernel, padding = case.pop("size"), case["kernel"], case["padding"]
        if fits(size, kernel, padding, case["dilation"]):
            for x in (whole(2, 3, *size), normal(1, 2, *size) - 3):
                agree(aten.max_pool2d.default, x, *case.values(), tolerance=ADDED)
            tried += 1
    assert tried > 100


def test_average_pooling() -> None:
    """Includes windows that reach beyond the padding in ceil_mode, and so have fewer entries than the kernel."""
    tried = 0
    choices: dict[str, Sequence[Any]] = {"size": SIZES, "kernel": KERNELS, "stride": STRIDES, "padding": [(0, 0), (1, 1), (0, 1), (2, 2)]}
    for case in product(1, 400, **choices, ceil_mode=[False, True], include=[True, False], divisor=[None, 5, -2]):
        size = case.pop("size")
        if fits(size, case["kernel"], case["padding"]):
            agree(aten.avg_pool2d.default, normal(2, 3, *size), *case.values())
            tried += 1
    assert tried > 100


def test_pooling_along_one_axis() -> None:
    for stride, padding, ceil_mode in itertools.product([(), (1,), (3,)], [(0,), (1,)], [False, True]):
        agree(aten.max_pool1d.default, whole(2, 3, 11), (3,), stride, padding, (2,), ceil_mode, tolerance=ADDED)
        agree(aten.avg_pool1d.default, normal(2, 3, 11), (4,), stride, padding, ceil_mode, False)
        agree(aten.avg_pool1d.default, normal(2, 3, 11), (4,), stride, padding, ceil_mode)


def test_pooling_accepts_single_numbers_and_defaults() -> None:
    agree(aten.max_pool2d.default, whole(2, 3, 8, 9), [3], tolerance=ADDED)
    agree(aten.max_pool2d.default, whole(2, 3, 8, 9), [3], [2], [1], [1], True, tolerance=ADDED)
    agree(aten.avg_pool2d.default, normal(2, 3, 8, 9), [3])
    agree(aten.avg_pool2d.default, normal(2, 3, 8, 9), [3], [2], [1])


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (3, 3), (2, 5), (5, 4), (1, 9), (14, 10)])
def test_adaptive_average_pooling(size: tuple[int, int]) -> None:
    """Sizes that divide the image's size, that do not, and that are larger."""
    agree(aten.adaptive_avg_pool2d.default, normal(2, 3, 7, 9), size)
    agree(aten.adaptive_avg_pool1d.default, normal(2, 3, 9), size[1:])


@pytest.mark.parametrize("size", [(1, 1), (6, 9), (3, 3), (2, 1), (4, 5)])
def test_adaptive_max_pooling(size: tuple[int, int]) -> None:
    agree(aten.adaptive_max_pool2d.default, whole(2, 3, 6, 9), size, tolerance=ADDED)
    agree(aten.adaptive_max_pool2d.default, normal(2, 3, 6, 9) - 3, size, tolerance=ADDED)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [((900, 900), (900, 900), (0, 0)), ((3, 900), (2, 900), (1, 0))])
def test_windows_that_are_much_larger_than_the_image(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
    """As in the EfficientNet of transformers, whose last pooling has a window as large as the number of channels."""
    agree(aten.avg_pool2d.default, normal(2, 3, 12, 10), kernel, stride, padding, True, True, None)


def test_a_window_of_a_maximum_that_reaches_beyond_the_image() -> None:
    agree(aten.max_pool2d.default, whole(2, 3, 12, 10), (13, 3), (13, 13), (6, 1), (1, 1), True, tolerance=ADDED)
