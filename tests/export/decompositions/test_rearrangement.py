"""Padding, copies, windows, and the derivatives of slices against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from kdx.export import decompositions
from tests.export.decompositions.agreement import agree, aten, normal, passed


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2, 0, 1), (3, 0, 2, 4), (0, 0, 0, 0), (2, 1)])
def test_padding(mode: str, padding: tuple[int, ...]) -> None:
    x = normal(2, 3, 5, 6) if len(padding) == 4 else normal(2, 3, 6)
    agree(aten.pad.default, x, padding, mode)


def test_negative_padding_is_not_decomposed() -> None:
    agree(aten.pad.default, normal(2, 3, 5, 6), (-1, 2, 1, -2))
    agree(aten.pad.default, normal(2, 3, 5, 6), (-1, 2, 1, -2), "replicate")


def test_copies_and_views() -> None:
    source = normal(3, 1, 5, seed=1)
    (gradient,) = passed(lambda x: decompositions.FORWARD[aten.copy.default](torch.zeros(2, 3, 4, 5, dtype=torch.float64), x), [source])[1:]
    assert torch.equal(decompositions.FORWARD[aten.copy.default](torch.zeros(2, 3, 4, 5), source), source.float().expand(2, 3, 4, 5))
    torch.testing.assert_close(gradient, normal(2, 3, 4, 5, 1, seed=7)[..., 0].sum((0, 2))[:, None])
    agree(aten.view.default, normal(2, 3, 4).contiguous(), (6, -1))
    assert torch.equal(
        decompositions.FORWARD[aten.view.default](normal(2, 3, 4).transpose(1, 2), (6, 4)), normal(2, 3, 4).transpose(1, 2).reshape(6, 4)
    )


@pytest.mark.parametrize(("size", "step"), [(3, 1), (3, 2), (2, 5), (9, 1), (4, 4)])
def test_windows_along_one_dimension(size: int, step: int) -> None:
    agree(aten.unfold.default, normal(2, 9, 4), 1, size, step)
    agree(aten.unfold.default, normal(2, 4, 9), -1, size, step)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize(
    ("start", "end", "step"),
    [(0, 9, 1), (2, 7, 1), (-5, -1, 1), (3, 2**63 - 1, 1), (0, 9, 2), (1, 9, 3), (-7, 100, 4), (4, 4, 1), (8, 9, 5), (-100, 3, 2)],
)
def test_the_gradient_of_slices(dim: int, start: int, end: int, step: int) -> None:
    x = normal(9, 9, 9)
    gradient = normal(*aten.slice.Tensor(x, dim, start, end, step).shape, seed=1)
    args = gradient, list(x.shape), dim, start, end, step
    assert torch.equal(decompositions.BACKWARD[aten.slice_backward.default](*args), aten.slice_backward.default(*args))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("index", [0, 1, 2, -1, -3])
def test_the_gradient_of_selections(dim: int, index: int) -> None:
    x = normal(3, 4, 5)
    gradient = normal(*x.select(dim, index).shape, seed=1)
    args = gradient, list(x.shape), dim, index
    assert torch.equal(decompositions.BACKWARD[aten.select_backward.default](*args), aten.select_backward.default(*args))
