"""The kernels of centred matrices, permutations and influences, run on the CPU, against the PyTorch geometry."""

from __future__ import annotations

import pytest
import torch

from kdx.kernels import fused, fused_sums, geometry, moments
from tests import oracle
from tests.host import HostLauncher, Order, running
from tests.kernels.inputs import EXACT, matrices


@pytest.mark.parametrize(("count", "n"), [(1, 4), (3, 33)])
def test_centred_matrices_are_those_of_the_geometry(count: int, n: int, order: Order) -> None:
    d = matrices(1, count, n)
    with running(HostLauncher(order)):
        actual = fused_sums.u_centered(d[0], fused.products(d))
    assert oracle.error(actual, geometry.u_centered(d[0])) < EXACT
    assert torch.equal(actual, actual.mT) and not actual.diagonal(dim1=1, dim2=2).any()


@pytest.mark.parametrize(("count", "n", "total", "multiprocessors"), [(1, 4, 1, 3), (3, 33, 19, 1), (9, 40, 10, 40)])
def test_products_under_permutations(count: int, n: int, total: int, multiprocessors: int, order: Order) -> None:
    centred = geometry.u_centered(matrices(1, count, n)[0])
    generator = torch.Generator().manual_seed(0)
    table = torch.stack([torch.arange(n), *(torch.randperm(n, generator=generator) for _ in range(total))])
    with running(HostLauncher(order, multiprocessors=multiprocessors)):
        actual = fused_sums.permuted_products(centred, centred[-1], table)
        none = fused_sums.permuted_products(centred, centred[-1], table[:0])
    assert oracle.error(actual, geometry.permuted_products(centred, centred[-1], table)) < EXACT
    assert oracle.error(actual[0], geometry.products(centred)[-1]) < EXACT  # the identity permutation
    assert none.shape == (0, count)


@pytest.mark.parametrize(("count", "n", "total"), [(1, 4, 1), (3, 33, 18), (9, 40, 7)])
def test_products_under_permutations_of_labels(count: int, n: int, total: int, order: Order) -> None:
    centred = geometry.u_centered(matrices(1, count, n)[0])
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-2, 2, (n,), generator=generator) << 40  # large integers, as labels may have any value
    target = geometry.u_centered(2**0.5 * (labels[:, None] != labels).double())
    table = torch.stack([torch.randperm(n, generator=generator) for _ in range(total)])
    with running(HostLauncher(order)):
        actual = fused_sums.permuted_label_products(centred, labels, table)
    assert oracle.error(actual, geometry.permuted_products(centred, target, table)) < EXACT


@pytest.mark.parametrize(("count", "n"), [(2, 4), (2, 5), (3, 6), (1, 19), (2, 35), pytest.param(5, 40, marks=pytest.mark.slow)])
def test_influences_are_those_of_left_out_images(count: int, n: int, order: Order) -> None:
    centred = geometry.u_centered(matrices(1, count, n)[0])
    with running(HostLauncher(order)):
        actual = fused_sums.influences(centred)
    expected = moments.matrix_influences(centred)
    if expected is None:
        assert actual is None
        return
    assert actual is not None and oracle.error(actual.first, expected.first) < EXACT
    assert (actual.second is None) == (expected.second is None)
    if actual.second is not None and expected.second is not None:
        assert oracle.error(actual.second, expected.second) < EXACT
    for value, other in zip(vars(actual.moments()).values(), vars(expected.moments()).values(), strict=True):
        assert oracle.error(torch.as_tensor(value), torch.as_tensor(other)) < EXACT


def test_wrong_shapes_and_types_are_refused() -> None:
    a = torch.zeros(2, 5, 5, dtype=torch.float64)
    table = torch.zeros(3, 5, dtype=torch.int64)
    for call in (
        lambda: fused_sums.permuted_products(a.float(), a[0], table),
        lambda: fused_sums.permuted_products(a, a[0], table[:, :4]),
        lambda: fused_sums.permuted_products(a, a[0], table.int()),
        lambda: fused_sums.permuted_label_products(a, table[0, :4], table),
        lambda: fused_sums.permuted_label_products(a, table[0].int(), table),
        lambda: fused_sums.influences(a.float()),
        lambda: fused_sums.influences(torch.zeros(1, 257, 257, dtype=torch.float64)),
        lambda: fused_sums.u_centered(a, fused.products(a[None, :1])),
    ):
        with running(), pytest.raises(ValueError, match="must"):
            call()
