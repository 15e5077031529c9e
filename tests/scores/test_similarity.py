"""The similarity of all layers: against dcor, the formula of CKA, and inner products of whole matrices."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import dcor
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import kdx
from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.rows import InMemory
from kdx.kernels import geometry, layer_sums, moments, tiles
from kdx.kernels.tiles import FeatureDistances
from kdx.scores import score

Array = NDArray[np.float64]

N = 23


def features(n: int = N, seed: int = 0) -> tuple[dict[str, Array], dict[str, Array]]:
    """Layers of two related networks: feature maps, tokens and vectors."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, 5))
    a = {"map": rng.normal(size=(n, 2, 3, 3)) + shared[:, :2, None, None], "fc": shared + rng.normal(size=(n, 5))}
    b = {
        "tokens": rng.normal(size=(n, 4, 3)) + 2 * shared[:, None, :3],
        "vector": shared[:, 1:2] ** 3,
        "far": 3 + rng.normal(size=(n, 7)),
    }
    return a, b


def flat(x: Array) -> Array:
    return x.reshape(len(x), -1)


def unbiased_hsic(k: Array, m: Array) -> float:
    """Song et al. 2012, equation 5, as it is written there."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    terms = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return float(terms / (n * (n - 3)))


def hsic_table(x: Array, y: Array) -> Array:
    """HSIC of (x, y), (x, x) and (y, y) with linear kernels."""
    k, m = flat(x) @ flat(x).T, flat(y) @ flat(y).T
    return np.array([unbiased_hsic(k, m), unbiased_hsic(k, k), unbiased_hsic(m, m)])


def test_values_are_those_of_dcor_and_cka_is_its_formula() -> None:
    a, b = features()
    result = kdx.similarity(a, b)
    assert result.layers_a == ("map", "fc") and result.layers_b == ("tokens", "vector", "far")
    assert result.n == N and result.geometry == "whole" and result.partial is None
    for i, x in enumerate(a.values()):
        for j, y in enumerate(b.values()):
            assert result.values[i, j] == pytest.approx(dcor.u_distance_correlation_sqr(flat(x), flat(y)), abs=1e-12)
            xy, xx, yy = hsic_table(x, y)
            assert result.cka[i, j] == pytest.approx(xy / np.sqrt(xx * yy), abs=1e-12)
            assert result.low[i, j] < result.values[i, j] < result.high[i, j]


def test_partial_values_are_those_of_dcor() -> None:
    a, b = features()
    third = features(seed=3)[0]["fc"] + flat(a["map"])[:, :5]
    result = kdx.similarity(a, b, given=third)
    assert result.partial is not None and result.partial_low is not None and result.partial_high is not None
    for i, x in enumerate(a.values()):
        for j, y in enumerate(b.values()):
            assert result.partial[i, j] == pytest.approx(dcor.partial_distance_correlation(flat(x), flat(y), third), abs=1e-12)
    assert (result.partial_low < result.partial).all() and (result.partial < result.partial_high).all()


def test_several_given_layers_are_projected_out_by_least_squares() -> None:
    a, b = features()
    given = features(seed=5)[1]
    u = {name: geometry.u_centered(geometry.distances(torch.from_numpy(flat(x)))).flatten() for name, x in {**a, **b}.items()}
    basis = torch.stack([geometry.u_centered(geometry.distances(torch.from_numpy(flat(x)))).flatten() for x in given.values()], 1)
    left = {name: x - basis @ torch.linalg.lstsq(basis, x).solution for name, x in u.items()}
    partial = kdx.similarity(a, b, given=given).partial
    assert partial is not None
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            assert partial[i, j] == pytest.approx(float(torch.nn.functional.cosine_similarity(left[x], left[y], dim=0)), abs=1e-12)


def test_what_the_third_network_spans_leaves_nothing() -> None:
    a, b = features()
    partial = kdx.similarity(a, b, given={"same": a["map"].copy(), "other": b["far"]}).partial
    assert partial is not None
    assert (partial[0] == 0).all() and (partial[:, 2] == 0).all()
    assert (partial[1, :2] != 0).all()


@pytest.mark.parametrize("n", [23, 300])
def test_intervals_are_those_of_a_single_score(n: int) -> None:
    """Of `score.summary` with the moments of three inner products, from the same parts."""
    a, b = features(n)
    result = kdx.similarity(a, b)
    x, y = (FeatureDistances.of(InMemory(torch.from_numpy(flat(z)))) for z in (a["fc"], b["tokens"]))
    sums = layer_sums.of_set([*(FeatureDistances.of(InMemory(torch.from_numpy(flat(z)))) for z in (*a.values(), *b.values()))]).distances
    pair = layer_sums.of_set([x, y]).distances
    chosen = moments.influences(sums.pairs[1:3, 1:3], sums.rows[1:3], sums.division.sizes).moments()
    assert torch.allclose(pair.products(), sums.products()[1:3, 1:3], rtol=1e-10)
    expected = score.summary(score.estimate(score.correlation, pair.products()), chosen, None, n=n, batches=1)
    assert (result.low[1, 0], result.high[1, 0]) == pytest.approx(expected.interval, abs=1e-9)


def test_partial_intervals_are_those_of_the_partial_score() -> None:
    """The weights of the residuals count as fixed, which is exact to first order: with many images nothing else matters."""
    a, b = features(400)
    third = features(400, seed=3)[0]["fc"] + flat(a["map"])[:, :5]
    result = kdx.similarity(a["fc"], b["tokens"], given=third)
    assert result.partial_low is not None and result.partial_high is not None
    sums = layer_sums.of_set([FeatureDistances.of(InMemory(torch.from_numpy(flat(z)))) for z in (a["fc"], b["tokens"], third)]).distances
    known = moments.influences(sums.pairs, sums.rows, sums.division.sizes).moments()
    expected = score.summary(score.estimate(score.partial, sums.products()), known, None, n=400, batches=1).interval
    width = expected[1] - expected[0]
    assert abs(result.partial_low[0, 0] - expected[0]) < 0.03 * width
    assert abs(result.partial_high[0, 0] - expected[1]) < 0.03 * width


@pytest.mark.parametrize("size", [5, 8])
def test_batches_pool_inner_products(size: int) -> None:
    a, b = features(30)
    result = kdx.similarity(a, b, given=b["vector"] ** 2, batch=size, seed=4)
    batches = arrays.batches_of(np.random.default_rng(4).permutation(30), size)
    assert result.geometry == "batch" and result.batches == len(batches)
    for i, x in enumerate(a.values()):
        for j, y in enumerate(b.values()):
            d = [[geometry.distances(torch.from_numpy(flat(z)[part])) for z in (x, y)] for part in batches]
            xy, xx, yy = np.sum([_inner(geometry.u_centered(torch.stack(pair))) for pair in d], 0)
            assert result.values[i, j] == pytest.approx(xy / np.sqrt(xx * yy), abs=1e-12)
            xy, xx, yy = np.sum([hsic_table(x[part], y[part]) for part in batches], 0)
            assert result.cka[i, j] == pytest.approx(xy / np.sqrt(xx * yy), abs=1e-12)


def _inner(matrices: torch.Tensor) -> Array:
    products = geometry.products(matrices)
    return np.array([float(products[0, 1]), float(products[0, 0]), float(products[1, 1])])


def test_intervals_of_many_batches_come_from_their_variation() -> None:
    a, b = features(100)
    result = kdx.similarity(a["fc"], b["tokens"], batch=5, seed=1)
    batches = arrays.batches_of(np.random.default_rng(1).permutation(100), 5)
    each = [
        torch.stack([geometry.u_centered(geometry.distances(torch.from_numpy(flat(z)[p]))) for z in (a["fc"], b["tokens"])])
        for p in batches
    ]
    products = torch.stack([geometry.products(pair) for pair in each])
    known = moments.of_batches(products)
    expected = score.summary(score.estimate(score.correlation, products.sum(0)), known, None, n=100, batches=20)
    assert (result.low[0, 0], result.high[0, 0]) == pytest.approx(expected.interval, abs=1e-9)


def test_a_network_is_most_similar_to_itself() -> None:
    a, _ = features()
    result = kdx.similarity(a, a)
    assert np.allclose(np.diag(result.values), 1, atol=1e-12) and np.allclose(np.diag(result.cka), 1, atol=1e-12)
    assert np.allclose(result.values, result.values.T) and (result.low <= result.values).all() and (result.values <= result.high).all()
    assert result.best_matches() == {"map": "map", "fc": "fc"}


def test_the_order_of_images_changes_nothing() -> None:
    a, b = features()
    order = np.random.default_rng(9).permutation(N)
    turned = kdx.similarity({k: v[order] for k, v in a.items()}, {k: v[order] for k, v in b.items()})
    result = kdx.similarity(a, b)
    assert np.allclose(turned.values, result.values, atol=1e-13) and np.allclose(turned.cka, result.cka, atol=1e-13)


def test_many_tiles_and_strips_give_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(77)
    result = kdx.similarity(a, b)
    monkeypatch.setattr(tiles, "TILE", 10)
    monkeypatch.setattr(layer_sums, "_BYTES", 8 * 5 * 10 * 10 * 2)
    small = kdx.similarity(a, b)
    assert np.allclose(small.values, result.values, atol=1e-12) and np.allclose(small.cka, result.cka, atol=1e-12)


def test_files_and_tensors_give_the_values_of_arrays(tmp_path: Path) -> None:
    a, b = features()
    a32, b32 = ({name: x.astype(np.float32) for name, x in layers.items()} for layers in (a, b))
    result = kdx.similarity(a32, b32)
    files = {}
    for name, x in a32.items():
        np.save(tmp_path / f"{name}.npy", x)
        files[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    assert np.array_equal(kdx.similarity(files, b32).values, result.values)
    tensors = {name: torch.from_numpy(x) for name, x in b32.items()}
    assert np.array_equal(kdx.similarity(list(a32.values()), tensors).values, result.values)
    assert np.allclose(result.values, kdx.similarity(a, b).values, atol=1e-5)


@pytest.mark.parametrize("n", [4, 5])
def test_few_images_have_finite_values_inside_their_intervals(n: int) -> None:
    result = kdx.similarity(*features(n))
    for table in (result.values, result.low, result.high, result.cka):
        assert np.isfinite(table).all() and (abs(table) <= 1).all()
    assert (result.low <= result.values).all() and (result.values <= result.high).all()
    if n == 4:
        assert (result.low == -1).all() and (result.high == 1).all()


@pytest.mark.parametrize(
    ("a", "b", "problem"),
    [
        ({}, {"x": np.ones((9, 2))}, "no features of A"),
        ({"x": np.ones((9, 2))}, {"y": np.random.default_rng(0).normal(size=(9, 2))}, "features of A at x are constant"),
        ({"x": np.eye(9)[:3]}, {"y": np.eye(9)[:3]}, "at least 4 images"),
        (
            {"x": np.random.default_rng(0).normal(size=(9, 2))},
            {"y": np.random.default_rng(0).normal(size=(8, 2))},
            "8 rows of features of B",
        ),
        ({"x": np.full((9, 2), np.nan)}, {"y": np.random.default_rng(0).normal(size=(9, 2))}, "not finite"),
        ({"x": np.ones((9, 2), dtype=int)}, {"y": np.random.default_rng(0).normal(size=(9, 2))}, "int64"),
    ],
)
def test_bad_features_are_refused(a: Any, b: Any, problem: str) -> None:
    with pytest.raises(KdxError, match=problem):
        kdx.similarity(a, b)


def test_tables_contain_every_number(tmp_path: Path) -> None:
    a, b = features()
    result = kdx.similarity(a, b, given=b["far"])
    text = result.to_csv(tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["layer_a"], row["layer_b"]) for row in rows] == [(x, y) for x in a for y in b]
    for name, table in (("distance_correlation", result.values), ("low", result.low), ("cka", result.cka), ("partial", result.partial)):
        assert table is not None and [float(row[name]) for row in rows] == table.flatten().tolist()
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["values"] == result.values.tolist() and content["given"] == ["0"]
    with pytest.raises(KdxError, match="third network"):
        kdx.similarity(a, b).best_matches("partial")


def test_figures_contain_the_layers_and_values(tmp_path: Path) -> None:
    a, b = features()
    result = kdx.similarity(a, {"<b>&": b["far"], **b})
    svg = result.save(tmp_path / "map.svg").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;" in svg and "Linear CKA" in svg and f"{result.values[1, 1]:.2f}" in svg
    assert svg == result.save(tmp_path / "again.svg").read_text(encoding="utf-8")
    assert result._repr_html_().count("<img ") == 1
    with pytest.raises(KdxError, match="No figure"):
        result.save(tmp_path / "map.gif")
