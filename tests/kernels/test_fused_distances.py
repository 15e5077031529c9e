"""The kernels of distances, run on the CPU, against the definition and the PyTorch geometry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdx.kernels import distances, fused, geometry, reference
from tests import oracle
from tests.host import HostLauncher, Order, running
from tests.kernels.inputs import SINGLE, rows


@pytest.mark.parametrize(("n", "d"), [(4, 1), (5, 7), (19, 130), (33, 7), (111, 130)])
def test_distances_are_the_definition(n: int, d: int, order: Order) -> None:
    x = rows(n, d)
    with running(HostLauncher(order)):
        actual = fused.distances(x)
    expected = reference.distances(x.double())
    assert oracle.error(actual, expected) < SINGLE
    assert actual[1, 2] == 0 and actual.diagonal().abs().max() == 0
    near = expected[0, -1]  # the Gram product alone is only rounding here
    assert float((actual[0, -1] - near).abs() / near) < 1e-6
    assert torch.equal(actual, actual.T)


def test_distances_of_a_stack_of_strided_rows() -> None:
    stack = torch.stack([rows(67, 18, seed) for seed in range(3)])
    strided = stack.repeat_interleave(2, 2)[:, :, ::2]
    assert not strided.is_contiguous()
    with running():
        actual, alone = fused.distances(strided), fused.distances(stack[1])
    assert oracle.error(actual, torch.stack([reference.distances(x.double()) for x in stack])) < SINGLE
    assert oracle.error(actual[1], alone) < SINGLE


@pytest.mark.parametrize(("stacked", "elements"), [(1, 125), (1, 124), (2, 125)])
def test_wide_rows_add_up_in_blocks_of_columns(stacked: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks at once if they are small, else one after another."""
    monkeypatch.setattr(distances, "_BLOCK", 32)
    monkeypatch.setattr(fused, "_ELEMENTS", elements)
    x = torch.stack([rows(5, 130, seed) for seed in range(stacked)])
    with running():
        assert oracle.error(fused.distances(x), torch.stack([reference.distances(r.double()) for r in x])) < SINGLE


@pytest.mark.parametrize(("q", "m", "d"), [(1, 1, 1), (5, 111, 7), (67, 33, 130), (64, 128, 4)])
def test_centred_distances_are_cross_distances(q: int, m: int, d: int, order: Order) -> None:
    both = torch.randn(q + m, d, generator=torch.Generator().manual_seed(0))
    both[q] = both[0]
    x, y = both[:q], both.repeat(1, 2)[q:, :d]
    norms = (x.square().sum(1), y.square().sum(1))
    with running(HostLauncher(order)):
        actual = fused.centred_distances(x, y, *norms)
    assert actual[0, 0] == 0
    assert oracle.error(actual, torch.cdist(x.double(), y.double())) < SINGLE
    assert oracle.error(actual, geometry.centred_distances(x, y, *norms)) < SINGLE


def test_centred_distances_of_rows_from_themselves_are_distances() -> None:
    x = rows(70, 9)
    norms = x.square().sum(1)
    with running():
        assert torch.equal(fused.centred_distances(x, x, norms, norms), fused.distances(x))


def test_nan_is_not_hidden() -> None:
    x = rows(5, 7)
    x[3, 2] = torch.nan
    with running():
        actual = fused.distances(x)
    assert actual[3, [0, 1, 2, 4]].isnan().all() and actual[:3, :3].isfinite().all()


@pytest.mark.parametrize("setting", ["none", "ieee", "tf32"])
def test_gram_products_are_of_full_precision(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch.backends.cuda.matmul
    before, seen, multiply = settings.fp32_precision, [], torch.bmm

    def watched(x: Tensor, y: Tensor) -> Tensor:
        seen.append(settings.fp32_precision)
        return multiply(x, y)

    monkeypatch.setattr(torch, "bmm", watched)
    settings.fp32_precision = setting
    try:
        with running():
            fused.distances(rows(5, 7))
        assert seen in (["ieee"], ["none"]) and settings.fp32_precision == setting
    finally:
        settings.fp32_precision = before
