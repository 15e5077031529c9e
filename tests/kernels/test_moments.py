"""The moments of inner products against their definition, which centres the matrices again without each part of the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

from kdx.kernels import geometry, moments
from tests import oracle


def distances(n: int) -> Tensor:
    x, y, labels = oracle.features(n=n, classes=3)
    rows = (x.flatten(1), y.flatten(1), torch.nn.functional.one_hot(labels).double())
    return torch.stack([geometry.distances(each) for each in rows])


def centred(d: Tensor, biased: bool) -> Tensor:
    return geometry.double_centered(d) if biased else geometry.u_centered(d)


def moments_by_centring(products: Callable[[Tensor], Tensor], n: int, parts: Sequence[slice]) -> dict[str, Tensor]:
    """The moments from ``products``, the inner products [k, k] of a part of the images."""

    def without(*left_out: int) -> Tensor:
        gone = {i for part in left_out for i in range(n)[parts[part]]}
        matrix = products(torch.tensor([i for i in range(n) if i not in gone]))
        return matrix[*torch.triu_indices(*matrix.shape)]

    u, pairs = len(parts), list(combinations(range(len(parts)), 2))
    whole, one = without(), [without(i) for i in range(u)]
    influences = torch.stack([(u - 1) * (whole - each) for each in one])
    influences = influences - influences.mean(0)
    interactions = torch.stack([u * whole - (u - 1) * (one[i] + one[j]) + (u - 2) * without(i, j) for i, j in pairs])
    interactions = interactions - interactions.mean(0)
    slope = torch.einsum("ia,ib,ic->abc", influences, influences, influences)
    for (i, j), q in zip(pairs, interactions, strict=True):
        for one_part, other in ((i, j), (j, i)):
            slope += 2 * torch.einsum("a,b,c->abc", influences[one_part], q, influences[other])
    scale = u * (u - 1)
    return {
        "variance": influences.T @ influences / scale,
        "interaction": interactions.T @ interactions / scale,
        "slope": slope / (u * scale),
    }


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "single"), [(9, True), (23, True), (23, False), (50, False)])
def test_moments_are_those_of_matrices_centred_again(n: int, single: bool, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "PARTS", 6)
    monkeypatch.setattr(moments, "SINGLE_IMAGES", n if single else 0)
    d = distances(n)
    actual = moments.of_matrices(centred(d, biased), biased)
    order = torch.arange(n) if single else torch.randperm(n, generator=torch.Generator().manual_seed(0))
    parts = [slice(i, i + 1) for i in range(n)] if single else [slice(u * n // 6, (u + 1) * n // 6) for u in range(6)]

    def products(part: Tensor) -> Tensor:
        at, size = order[part], len(part)
        matrix = geometry.products(centred(d[:, at][:, :, at], biased)) * (size * (size - 3))
        return matrix / size**2 * n / (n - 3) if biased else matrix / (size * (size - 3))

    assert actual is not None and actual.parts == len(parts)
    for name, value in moments_by_centring(products, n, parts).items():
        assert oracle.error(getattr(actual, name), value) < 1e-10, name


def test_too_few_images_have_no_moments_or_no_interaction() -> None:
    assert moments.of_matrices(centred(distances(4), False)) is None
    five = moments.of_matrices(centred(distances(5), False))
    assert five is not None and five.parts == 5 and not five.interaction.any() and five.variance.isfinite().all()


def test_an_image_far_from_all_others_loses_no_digits() -> None:
    """Adding u_i + u_j to the distances changes nothing: the moments are those of the centred matrices."""
    d = distances(12)
    far = 1e6 * torch.nn.functional.one_hot(torch.tensor(5), 12).double()
    shifted = (d + far[:, None] + far[None]) * (1 - torch.eye(12))
    one, other = (moments.of_matrices(geometry.u_centered(each)) for each in (d, shifted))
    assert one is not None and other is not None
    assert oracle.error(other.variance, one.variance) < 1e-8 and oracle.error(other.interaction, one.interaction) < 1e-8


def test_moments_of_batches_are_those_of_a_sum_of_independent_terms() -> None:
    products = torch.stack([geometry.products(centred(distances(8 + i), False)) for i in range(5)])
    actual = moments.of_batches(products)
    values = products[:, *torch.triu_indices(3, 3)]
    assert oracle.error(actual.variance, 5 * torch.cov(values.T)) < 1e-12  # five independent batches of the covariance between them
    assert actual.parts == 5 and not actual.interaction.any()
    replicates = moments.Moments(1, actual.variance, actual.interaction, actual.slope) + actual.scaled(2)
    assert replicates.parts == 6 and oracle.error(replicates.variance, 5 * actual.variance) < 1e-12
    assert oracle.error(replicates.slope, 9 * actual.slope) < 1e-12
