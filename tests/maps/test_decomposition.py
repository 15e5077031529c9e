"""Maps that add up to the scores: against the definition, against `kdx.rs` and `kdx.fss`, and the properties of the shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import kdx
from kdx.kernels import decomposition, geometry, reference

N = 13
LABELS = np.arange(N) % 4
SUMS = {np.float64: 1e-9, np.float32: 1e-4}
"""How far the sum of a map may be from its score."""


def features(seed: int, *shape: int, dtype: Any = np.float64) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    classes = rng.normal(size=(4, *shape))
    return (classes[LABELS] * 0.3 + rng.normal(size=(N, *shape)) + 5.0).astype(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_shares_equal_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.from_numpy(features(0, 6, 15)).to(dtype)
    g = geometry.u_centered(geometry.distances(torch.from_numpy(features(1, 7))))
    expected = reference.shares(x, g)
    actual = decomposition.shares(x, geometry.distances(x.flatten(1)), g)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    assert float(expected.sum()) == pytest.approx(float(geometry.dot(geometry.distances(x.flatten(1)), g)), rel=1e-5)


@pytest.mark.parametrize("apart", [1e-8, 1e-5, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pairs_at_nearly_zero_distance_keep_their_digits(apart: float, dtype: torch.dtype) -> None:
    x = torch.from_numpy(features(0, 4, 6) - 5.0).to(dtype)
    x[1] = x[0]
    x[1, 2, 3] += apart
    x[2] = x[0]  # a distance of exactly zero adds nothing
    g = geometry.u_centered(geometry.distances(torch.from_numpy(features(1, 7))))
    expected = reference.shares(x, g)
    actual = decomposition.shares(x, geometry.distances(x.flatten(1)), g)
    assert (actual - expected).abs().max() <= (1e-9 if dtype == torch.float64 else 1e-4) * expected.abs().max()


@pytest.mark.parametrize(("others", "size"), [(2, 3), (4, 4), (9, 5), (28, 12)])
def test_an_image_alone_beside_equal_classes_has_a_map_of_zeros(others: int, size: int) -> None:
    """Its row of U-centred target distances is zero exactly, and its map must not be an enlarged picture of rounding."""
    labels = np.random.default_rng(others).permutation(np.append(np.arange(others * size) % others, others))
    x = np.random.default_rng(0).normal(size=(len(labels), 3, 2, 2))
    drawn = np.abs(kdx.decompose(x, labels).at_size((4, 4))).max((1, 2))
    assert drawn[labels == others] == 0 and drawn[labels != others].min() == 1


SCORES: dict[str, tuple[Callable[[Any, Any, Any], kdx.Decomposition[Any]], Callable[[Any, Any, Any], float]]] = {
    "RS(X)": (lambda x, y, t: kdx.decompose(x, LABELS), lambda x, y, t: kdx.rs(x, LABELS).value),
    "RS(X|Y)": (lambda x, y, t: kdx.decompose(x, LABELS, given=y), lambda x, y, t: kdx.rs(x, LABELS, given=y).value),
    "RS(X)-RS(Y)": (
        lambda x, y, t: kdx.decompose(x, LABELS, minus=y),
        lambda x, y, t: kdx.rs(x, LABELS).value - kdx.rs(y, LABELS).value,
    ),
    "FSS(X,T)": (lambda x, y, t: kdx.decompose(x, t), lambda x, y, t: kdx.fss(x, t).value),
    "FSS(T,X)": (lambda x, y, t: kdx.decompose(t, x), lambda x, y, t: kdx.fss(x, t).value),
    "FSS(X,T)-FSS(Y,T)": (lambda x, y, t: kdx.decompose(x, t, minus=y), lambda x, y, t: kdx.fss(x, t).value - kdx.fss(y, t).value),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", SCORES)
def test_maps_add_up_to_the_scores(name: str, dtype: Any) -> None:
    x, y, t = features(0, 6, 4, 5, dtype=dtype), features(1, 9, 4, 5, dtype=dtype), features(2, 5, 3, 2, dtype=dtype)
    decompose, score = SCORES[name]
    result = decompose(x, y, t)
    assert result.score == pytest.approx(score(x, y, t), abs=SUMS[dtype] / 10)
    assert float(result.maps.sum()) == pytest.approx(result.score, abs=SUMS[dtype])
    assert result.maps.shape == ((N, 3, 2) if name == "FSS(T,X)" else (N, 4, 5))
    assert np.allclose(result.images, result.maps.sum((1, 2)))
    if result.other is not None:
        assert np.allclose(result.maps, result.explained - result.other, atol=1e-12)


@pytest.mark.parametrize("extra", ["given", "minus"])
def test_different_grids_keep_their_sums(extra: str) -> None:
    x, y = features(0, 6, 6, 4), features(1, 9, 3, 5)
    second: dict[str, Any] = {extra: y}
    result = kdx.decompose(x, LABELS, **second)
    assert result.maps.shape == (N, 6, 5)
    assert float(result.maps.sum()) == pytest.approx(result.score, abs=1e-9)


def test_mass_is_distributed_by_area() -> None:
    coarse = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    fine = decomposition.spread(coarse, 4, 2)
    assert fine.tolist() == [[[0.5, 1.0], [0.5, 1.0], [1.5, 2.0], [1.5, 2.0]]]
    uneven = decomposition.spread(coarse, 3, 3)
    assert uneven.sum().item() == pytest.approx(10) and uneven[0, 0, 0].item() == pytest.approx(4 / 9)


@pytest.fixture
def rotation() -> NDArray[np.float64]:
    return np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0]


def test_what_changes_nothing(rotation: NDArray[np.float64]) -> None:
    x, y = features(0, 6, 4, 5), features(1, 9, 4, 5)
    expected = kdx.decompose(x, LABELS, given=y).maps
    rotated = np.einsum("dc,nchw->ndhw", rotation, x)
    shifted = x + np.random.default_rng(4).normal(size=(1, 6, 4, 5))
    constant = np.concatenate([x, np.full((N, 1, 4, 5), 7.0)], 1)
    for same in (rotated, 1e-3 * x, 1e6 * x, shifted, constant):
        assert np.allclose(kdx.decompose(same, LABELS, given=y).maps, expected, rtol=1e-7, atol=1e-10 * np.abs(expected).max())


def test_a_position_that_is_equal_in_all_images_has_no_share() -> None:
    x = features(0, 6, 4, 5)
    x[:, :, 2, 3] = 1.0
    maps = kdx.decompose(x, LABELS).maps
    assert np.abs(maps[:, 2, 3]).max() < 1e-14 < np.abs(maps).max()


def test_permuting_images_permutes_maps() -> None:
    x, y, order = features(0, 6, 4, 5), features(1, 9, 4, 5), np.random.default_rng(5).permutation(N)
    expected = kdx.decompose(x, LABELS, minus=y).maps[order]
    assert np.allclose(kdx.decompose(x[order], LABELS[order], minus=y[order]).maps, expected, atol=1e-13)


def test_positions_may_be_tokens() -> None:
    x = features(0, 6, 4, 5)
    tokens = x.reshape(N, 6, 20).transpose(0, 2, 1)  # [n, L, C]
    assert np.allclose(kdx.decompose(tokens.transpose(0, 2, 1)[..., None], LABELS).maps.reshape(N, 4, 5), kdx.decompose(x, LABELS).maps)


def test_equal_networks_differ_nowhere() -> None:
    x = features(0, 6, 4, 5)
    assert np.abs(kdx.decompose(x, LABELS, minus=x).maps).max() == 0
    with pytest.raises(kdx.KdxError, match="explain"):
        kdx.decompose(x, LABELS, given=x)


def test_mistakes() -> None:
    x = features(0, 6, 4, 5)
    with pytest.raises(ValueError, match="not both"):
        kdx.decompose(x, LABELS, given=x, minus=x)
    with pytest.raises(kdx.KdxError, match="rows"):
        kdx.decompose(x, LABELS, minus=x[:-1])
    with pytest.raises(kdx.KdxError, match="rows"):
        kdx.decompose(x, x[:-1])
    with pytest.raises(kdx.KdxError, match="one class"):
        kdx.decompose(x, np.zeros(N, int))


def test_tensors_come_back_as_tensors() -> None:
    x = torch.from_numpy(features(0, 6, 4, 5, dtype=np.float32))
    result = kdx.decompose(x, torch.from_numpy(LABELS))
    assert isinstance(result.maps, torch.Tensor) and isinstance(result.images, torch.Tensor)


def test_when_conditioning_has_little_effect() -> None:
    """cos^2 of the gradients of RS(S) and RS(S|B) is 1 - RS(B|S)^2/(1 - RS(S)^2), by autograd."""
    d = [geometry.distances(torch.from_numpy(features(seed, 8))) for seed in range(2)]
    a, b = (geometry.unit(geometry.u_centered(each)) for each in d)
    labels = torch.from_numpy(np.eye(4)[LABELS])
    g = geometry.unit(geometry.u_centered(geometry.distances(labels)))
    leaf = a.clone().requires_grad_()
    gradients = [torch.autograd.grad(score, leaf)[0] for score in (geometry.correlation(leaf, g), geometry.semipartial(leaf, g, b))]
    cosine = geometry.dot(*gradients) / (geometry.dot(gradients[0], gradients[0]) * geometry.dot(gradients[1], gradients[1])).sqrt()
    beyond, alone = geometry.semipartial(b, g, a), geometry.correlation(a, g)
    assert float(cosine**2) == pytest.approx(float(1 - beyond**2 / (1 - alone**2)), abs=1e-12)
