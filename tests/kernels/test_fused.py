"""All kernels of the geometry: the order of blocks changes no bit, wrong calls are refused, and a mistake put into a kernel is caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdx.kernels import fused, fused_maps, fused_shares, fused_sums, geometry, moments, reference, rounding
from tests import host, oracle
from tests.host import ORDERS, HostLauncher, KernelError, running
from tests.kernels.inputs import EXACT, SINGLE, among, defined, geometries, gradients, laplacian, matrices, rows


def all_results() -> list[Tensor]:
    x, y = rows(70, 9), rows(67, 9, 3)
    d, given, target, means = geometries(19, 2)
    inside, border, queries, references = among(20, 5)
    features = torch.randn(2, 64, 7, 7, generator=torch.Generator().manual_seed(0))
    cross = fused.centred_distances(x, y, x.square().sum(1), y.square().sum(1))
    results = [fused.distances(x), cross, *vars(fused.products(matrices(2, 5, 33))).values()]
    for objective in ("relevance", "uniqueness"):
        results += vars(fused.weights(d, given, target, means, objective, lap=True)).values()
        results += vars(fused.query_weights(inside, border, queries, references, objective)).values()  # type: ignore[arg-type]
    positions = fused_shares.PositionSquares.of(features.flatten(2).mT.reshape(14, 7, 64))
    shares = positions.shares(geometry.u_centered(matrices(1, 5, 14)[0]), [slice(0, 14)])
    centred = geometry.u_centered(matrices(1, 3, 14)[0])
    permuted = fused_sums.permuted_products(centred, centred[0], torch.arange(28).view(2, 14) % 14)
    influences = fused_sums.influences(centred)
    assert influences is not None and influences.second is not None
    results += [permuted, influences.first, influences.second, fused_maps.means_with_probes(features, rounding.drawn(2, 0))]
    return [*results, fused_maps.cam(features, torch.ones(2, 64)), fused_maps.means(features), positions.distances, shares]


@pytest.mark.slow
def test_the_order_of_blocks_and_threads_changes_no_bit() -> None:
    results = []
    for order in ORDERS:
        with running(HostLauncher(order)):
            results.append(all_results())
    assert len(results[0]) == 28
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_wrong_shapes_and_types_are_refused() -> None:
    x, d = rows(5, 7), matrices(1, 3, 5).float()
    means = torch.zeros(1, 5, 2, dtype=torch.float64)
    triple = (d[:, 0], d[:, 1], d[:, 2])
    small = (d[0, 0, :2, :2],) * 3
    for call in (
        lambda: fused.distances(x.double()),
        lambda: fused.centred_distances(x, x[:, 1:], x.square().sum(1), x.square().sum(1)),
        lambda: fused.products(d[..., :3, :3]),
        lambda: fused.products(d[0]),
        lambda: fused.weights(*triple, means.float()),
        lambda: fused.weights(d[:, 0], d[:, 1], d[:, 2, :4, :4], means),
        lambda: fused.query_weights(small, (d[0, 0, 2:, :2],) * 3, means[0, 2:], means[0, :2]),
        lambda: fused_maps.cam(torch.zeros(2, 3, 4, 5, dtype=torch.float64), torch.zeros(2, 3)),
        lambda: fused_maps.cam(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4)),
    ):
        with pytest.raises(ValueError, match=r"must|needs"):
            call()


# Mistakes put into the kernels


def check_pairwise() -> None:
    x, y = rows(70, 5), rows(66, 5, 3)
    assert oracle.error(fused.distances(x), reference.distances(x.double())) < SINGLE
    cross = fused.centred_distances(x, y, x.square().sum(1), y.square().sum(1))
    assert oracle.error(cross, torch.cdist(x.double(), y.double())) < SINGLE


def check_products() -> None:
    d = matrices(1, 5, 33)
    actual = fused.products(d.float())
    assert oracle.error(actual.inner, defined(d)) < EXACT and oracle.error(actual.row_sums, d.sum(-1)) < 1e-14


def check_weights() -> None:
    d, given, target, means = geometries(35)
    actual, expected = fused.weights(d, given, target, means, "uniqueness"), laplacian(d, given, target, "uniqueness")
    assert oracle.error(actual.score, expected.score) < EXACT
    assert oracle.error(actual.channel_weights, gradients(expected.lap, means)) < EXACT


def check_cam() -> None:
    features = torch.randn(2, 320, 7, 7, generator=torch.Generator().manual_seed(0))
    assert oracle.error(fused_maps.cam(features, torch.ones(2, 320)), features.double().sum(1).relu()) < SINGLE


def check_means() -> None:
    for size in (5, 9), (9, 11):
        features = torch.randn(3, 11, *size, generator=torch.Generator().manual_seed(0))
        means = fused_maps.means_with_probes(features, rounding.drawn(3, 0))
        assert oracle.error(means[:, :11], features.double().mean((2, 3))) < EXACT
        assert oracle.error(means, rounding.with_probes(means[:, :11], features)) < SINGLE
    features = torch.randn(3, 35, 7, 7, generator=torch.Generator().manual_seed(0))
    read = torch.zeros(3, 35, dtype=torch.float64)
    fused_shares.PositionSquares.of_each([features.flatten(2)], [read])
    assert oracle.error(read, features.double().mean((2, 3))) < EXACT


def check_shares() -> None:
    """Five matrices, in four strips. Two images are close to each other."""
    x = torch.randn(35, 20, 40, generator=torch.Generator().manual_seed(0))
    x[3] = 1.001 * x[2]
    g = geometry.u_centered(matrices(1, 5, 35)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_shares, "_SQUARES", 10 * 35 * 40)
        actual = fused_shares.PositionSquares.of(x).shares(g, [slice(0, 35, 2), slice(1, 35, 2)]).sum(0)
    for shares, matrix in zip(actual, g, strict=True):
        assert oracle.error(shares, reference.shares(x, matrix)) < SINGLE


def check_sums() -> None:
    d = matrices(1, 3, 35)
    centred = geometry.u_centered(d[0])
    table = torch.stack([torch.randperm(35, generator=torch.Generator().manual_seed(seed)) for seed in range(11)])
    assert oracle.error(fused_sums.u_centered(d[0], fused.products(d)), centred) < EXACT
    assert (
        oracle.error(fused_sums.permuted_products(centred, centred[1], table), geometry.permuted_products(centred, centred[1], table))
        < EXACT
    )
    labels = torch.arange(35) % 4
    target = geometry.u_centered(2**0.5 * (labels[:, None] != labels).double())
    by_label = fused_sums.permuted_label_products(centred, labels, table)
    assert oracle.error(by_label, geometry.permuted_products(centred, target, table)) < EXACT
    actual, expected = fused_sums.influences(centred), moments.matrix_influences(centred)
    assert actual is not None and expected is not None and actual.second is not None and expected.second is not None
    assert oracle.error(actual.second, expected.second) < EXACT


def check_scaled() -> None:
    features = torch.randn(2, 320, 7, 7, generator=torch.Generator().manual_seed(0))
    weights = torch.full((1, 2, 328), 1e-9, dtype=torch.float64)
    weights[:, :, 319] = 1e-3
    maps = fused_maps.scaled_cam(features, fused_maps.scaled_weights(weights, torch.float32, 49), 0)
    assert oracle.error(maps, geometry.cam(features.double(), weights[0, :, :320])) < SINGLE


BARRIER = "__syncthreads();"
MISTAKES = [
    # Missing barriers. The barrier before the count of an image's blocks is not among them, because blocks run one at a time here.
    ("pairwise", check_pairwise, f"top, left, diagonal);\n    {BARRIER}", "top, left, diagonal);"),
    ("products", check_products, BARRIER, ""),
    ("weights", check_weights, f"{BARRIER}  // the combinations are written; w is read", ""),
    ("weights", check_weights, f"{BARRIER}\n        if (!present)", "if (!present)"),
    ("cam", check_cam, f"{BARRIER}\n    // Element e", ""),
    ("cam", check_cam, f"- 1;\n    {BARRIER}", "- 1;"),
    ("shares", check_shares, f"+ position]);\n    }}\n    {BARRIER}", "+ position]);\n    }"),
    ("shares", check_shares, f"{BARRIER}\n#pragma unroll\n        for", "#pragma unroll\n        for"),
    ("shares", check_shares, f"{BARRIER}\n    }}\n#pragma unroll 1", "}\n#pragma unroll 1"),
    ("shares", check_shares, f"= sum[m];\n    {BARRIER}", "= sum[m];"),
    ("means", check_means, "__syncwarp();", ""),
    ("means", check_means, f"= sum;\n    {BARRIER}", "= sum;"),
    ("influences", check_sums, BARRIER, ""),
    # Off by one
    ("means", check_means, "k < positions; k += 2", "k + 1 < positions; k += 2"),
    ("means", check_means, "at = packs * W + lane; at < count", "at = packs * W + lane; at + 1 < count"),
    ("means", check_means, "begin += 32 * kBatch", "begin += 32"),
    ("influences", check_sums, "v >= n || !second", "!second"),
    ("influences", check_sums, "gram[(to + u) * width + at + v]", "gram[(at + u) * width + to + v]"),
    ("permuted", check_sums, "j < i; j += 32) {\n            const", "j + 1 < i; j += 32) {\n            const"),
    ("permuted", check_sums, "j < i; j += 32) {\n            bool", "j + 1 < i; j += 32) {\n            bool"),
    ("permuted", check_sums, "|| lane / 8 >= members", ""),
    ("permuted", check_sums, "__syncwarp();", ""),
    ("permuted", check_sums, "if (q < each && lane", "if (lane"),
    ("products", check_sums, "i == j ? 0.0 : d[at + j] -", "d[at + j] -"),
    ("cam", check_scaled, f"= own;\n    {BARRIER}", "= own;"),
    ("cam", check_scaled, "exponents ? exponents[at] : 0", "0"),
    ("means", check_means, "min((long long)kRows, rows - first)", "kRows"),
    ("pairwise", check_pairwise, "= i < x.count && j < y.count ? gram", "= i <= x.count && j < y.count ? gram"),
    ("pairwise", check_pairwise, "k < d; k += 32", "k <= d; k += 32"),
    ("products", check_products, "begin + rows_per_block)", "begin + rows_per_block + 1)"),
    ("weights", check_weights, "j < count && i != j", "j <= count && i != j"),
    ("weights", check_weights, "j < n; j += 32) {\n        const double a", "j + 1 < n; j += 32) {\n        const double a"),
    ("cam", check_cam, "position < count; position", "position <= count; position"),
    ("cam", check_cam, "begin + image.periods_per_block)", "begin + image.periods_per_block + 1)"),
    ("shares", check_shares, "if (channel >= height)", "if (channel > height)"),
    ("shares", check_means, "position < width; position += 2", "position + 1 < width; position += 2"),
    ("shares", check_means, " && channel < height)", ")"),
    ("shares", check_shares, "position < width; position += kLanes", "position <= width; position += kLanes"),
    ("shares", check_shares, "other < count && own < other", "other <= count && own < other"),
    ("shares", check_shares, "left + kLanes - 1 <= own", "left <= own"),
    ("shares", check_shares, "channel < channels; ++channel", "channel + 1 < channels; ++channel"),
    ("shares", check_shares, "norm[own] + norm[column]", "norm[own] + norm[own]"),
    ("shares", check_shares, "own < rows ? count : rows", "rows"),
    ("shares", check_shares, "min(own, other) * count + max(own, other)", "own * count + other"),
    ("shares", check_shares, "partner < partners ? distances[partner] : 0.0", "distances[partner]"),
    ("shares", check_shares, " && place < shared", ""),
    ("shares", check_shares, "contexts[place / matrices].has(first + partner)", "true"),
    ("shares", check_shares, "first ? *to + total : total", "total"),
    ("shares", check_shares, "other != own", "true"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "check", "old", "new"), MISTAKES, ids=[f"{m[0]}-{at}" for at, m in enumerate(MISTAKES)])
def test_a_mistake_in_a_kernel_is_caught(source: str, check: Callable[[], None], old: str, new: str) -> None:
    with pytest.raises((KernelError, AssertionError)):
        for order in ORDERS:
            with running(host.broken(source, old, new, order)):
                check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", [check_pairwise, check_products, check_weights, check_cam, check_scaled, check_means, check_sums, check_shares]
)
def test_without_a_mistake_nothing_is_caught(check: Callable[[], None]) -> None:
    with running():
        check()
