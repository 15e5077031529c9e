"""The kernels of the geometry, run on the CPU, against the definitions, the PyTorch geometry, and each with a mistake put into it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdx.kernels import fused, geometry, reference
from tests import host, oracle
from tests.host import ORDERS, HostLauncher, KernelError, Order, running

EXACT = oracle.TOLERANCE["float64"]
SINGLE = 1e-6
"""Results in float32 of sums that are exact to about a hundred times its rounding."""


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> Order:
    found: Order = request.param
    return found


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    """Float32 rows [n, d] less their mean: the second twice, the last one near to the first."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x[2] = x[1]
    x[-1] = x[0] + 1e-4 * torch.randn(d, generator=torch.Generator().manual_seed(seed + 1))
    return x - x.mean(0)


def matrices(batches: int, count: int, n: int) -> Tensor:
    """Distances [batches, count, n, n] in float64 that float32 holds exactly, about things that have to do with one another."""
    x = torch.randn(batches, 1, n, 6, generator=torch.Generator().manual_seed(n))
    y = torch.randn(batches, count, n, 6, generator=torch.Generator().manual_seed(count))
    return geometry.distances(x + y).float().double()


def geometries(n: int, count: int = 1, classes: int = 2, channels: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float32 distances [count, n, n] of two networks' features and of a target, and float64 means [count, n, channels]."""
    found: list[tuple[Tensor, ...]] = []
    for seed in range(count):
        x, y, labels = oracle.features(seed, n, shape=(channels, 3, 1), classes=classes)
        features = (x.flatten(1), y.flatten(1), torch.nn.functional.one_hot(labels).double())
        found.append((*(geometry.distances(f).float() for f in features), geometry.gap(x)))
    d, given, target, means = (torch.stack(part) for part in zip(*found, strict=True))
    return d, given, target, means


def laplacian(d: Tensor, given: Tensor, target: Tensor, objective: str) -> geometry.Laplacian:
    a, b, g = (geometry.u_centered(matrix.double()) for matrix in (d, given, target))
    return geometry.laplacian(d.double(), a, b, g, geometry.OBJECTIVES[objective])


def gradients(lap: Tensor, means: Tensor) -> Tensor:
    return torch.stack([geometry.gradient(*pair) for pair in zip(lap, means, strict=True)])


# Distances


@pytest.mark.parametrize(("n", "d"), [(4, 1), (5, 7), (19, 130), (33, 7), (111, 130)])
def test_distances_are_the_definition(n: int, d: int, order: Order) -> None:
    x = rows(n, d)
    with running(HostLauncher(order)):
        found = fused.distances(x)
    expected = reference.distances(x.double())
    assert oracle.error(found.matrix, expected) < SINGLE
    assert found.matrix[1, 2] == 0 and found.matrix.diagonal().abs().max() == 0
    near = expected[0, -1]  # a Gram product alone leaves nothing of it
    assert float((found.matrix[0, -1] - near).abs() / near) < 1e-6
    assert torch.equal(found.matrix, found.matrix.T)
    assert oracle.error(found.rows, found.matrix.double().sum(1)) < 1e-14


def test_distances_of_a_stack_of_strided_rows() -> None:
    stack = torch.stack([rows(67, 18, seed) for seed in range(3)])
    strided = stack.repeat_interleave(2, 2)[:, :, ::2]
    assert not strided.is_contiguous()
    with running():
        found, alone = fused.distances(strided), fused.distances(stack[1])
    assert oracle.error(found.matrix, torch.stack([reference.distances(x.double()) for x in stack])) < SINGLE
    assert oracle.error(found.matrix[1], alone.matrix) < SINGLE
    assert oracle.error(found.rows, found.matrix.double().sum(2)) < 1e-14


@pytest.mark.parametrize(("stacked", "elements"), [(1, 125), (1, 124), (2, 125)])
def test_wide_rows_add_up_in_blocks_of_columns(stacked: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once where that is small, or one after another."""
    monkeypatch.setattr(geometry, "_BLOCK", 32)
    monkeypatch.setattr(fused, "_ELEMENTS", elements)
    x = torch.stack([rows(5, 130, seed) for seed in range(stacked)])
    with running():
        assert oracle.error(fused.distances(x).matrix, torch.stack([reference.distances(r.double()) for r in x])) < SINGLE


@pytest.mark.parametrize(("q", "m", "d"), [(1, 1, 1), (5, 111, 7), (67, 33, 130), (64, 128, 4)])
def test_tiles_are_cross_distances(q: int, m: int, d: int, order: Order) -> None:
    both = torch.randn(q + m, d, generator=torch.Generator().manual_seed(0))
    both[q] = both[0]
    x, y = both[:q], both.repeat(1, 2)[q:, :d]
    norms = (x.square().sum(1), y.square().sum(1))
    with running(HostLauncher(order)):
        found = fused.tile(x, y, *norms, diagonal=False)
    assert found.matrix[0, 0] == 0
    assert oracle.error(found.matrix, torch.cdist(x.double(), y.double())) < SINGLE
    assert oracle.error(found.matrix, geometry.centred_distances(x, y, *norms)) < SINGLE
    assert oracle.error(found.rows, found.matrix.double().sum(1)) < 1e-14
    assert oracle.error(found.columns, found.matrix.double().sum(0)) < 1e-14


def test_a_tile_on_the_diagonal_is_distances() -> None:
    x = rows(70, 9)
    norms = x.square().sum(1)
    with running():
        found, expected = fused.tile(x, x, norms, norms, diagonal=True), fused.distances(x)
    assert torch.equal(found.matrix, expected.matrix)
    assert torch.equal(found.rows, expected.rows) and torch.equal(found.columns, expected.rows)


def test_what_is_not_a_number_is_not_hidden() -> None:
    x = rows(5, 7)
    x[3, 2] = torch.nan
    with running():
        found = fused.distances(x).matrix
    assert found[3, [0, 1, 2, 4]].isnan().all() and found[:3, :3].isfinite().all()


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
        assert seen == ["ieee"] and settings.fp32_precision == setting
    finally:
        settings.fp32_precision = before


# Inner products


def defined(d: Tensor) -> Tensor:
    centred = [[reference.u_centered(matrix) for matrix in batch] for batch in d.double()]
    return torch.stack([torch.stack([torch.stack([reference.inner(a, b) for b in batch]) for a in batch]) for batch in centred])


@pytest.mark.parametrize(
    ("batches", "count", "n", "dtype"),
    [
        (2, 3, 4, torch.float32),
        (1, 1, 5, torch.float32),
        (1, 2, 19, torch.float64),
        (2, 5, 33, torch.float32),
        (1, 9, 20, torch.float64),
        (1, 4, 111, torch.float32),
        (1, 6, 112, torch.float32),
    ],
)
def test_products_are_the_definition(batches: int, count: int, n: int, dtype: torch.dtype, order: Order) -> None:
    d = matrices(batches, count, n)
    with running(HostLauncher(order)):
        found = fused.products(d.to(dtype))
    assert oracle.error(found.inner, defined(d)) < EXACT
    assert oracle.error(found.inner, geometry.products(geometry.u_centered(d))) < EXACT
    assert oracle.error(found.rows, d.sum(-1)) < 1e-14
    assert oracle.error(found.totals, d.sum((-1, -2))) < 1e-14
    assert oracle.error(found.squares, d.square().sum((-1, -2))) < 1e-14


def test_products_at_any_strides() -> None:
    d = matrices(2, 3, 13).float()
    memory = torch.full((3, 2, 171), torch.nan)
    permuted = memory[:, :, 1:170].transpose(0, 1).unflatten(2, (13, 13))
    permuted.copy_(d)
    assert permuted.stride(0) == 171 and permuted.data_ptr() % 16
    with running():
        found = fused.products(d).inner
        assert torch.equal(fused.products(permuted).inner, found)
        assert torch.equal(fused.products(d.mT).inner, found)
        assert torch.equal(fused.products(d[:, :1].expand(2, 2, 13, 13)).inner, found[:, :1, :1].expand(2, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_distances_that_are_large_beside_their_spread(dtype: torch.dtype) -> None:
    """Of ten thousand equal parts of a sum of squares, one is left."""
    d = (1e3 * (1 - torch.eye(33, dtype=torch.float64)) + matrices(1, 3, 33)).to(dtype).double()
    with running():
        assert oracle.error(fused.products(d.to(dtype)).inner, defined(d)) < EXACT


def test_what_centring_sends_to_zero_is_zero() -> None:
    u = torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    added = (u[:, None] + u[None, :]).fill_diagonal_(0)
    with running():
        found = fused.products(torch.stack((added, matrices(1, 1, 9)[0, 0]))[None]).inner[0]
    assert found[0, 0] == 0 and found[1, 1] > 0 and found[0, 1].abs() < 1e-14


@pytest.mark.parametrize("multiprocessors", [1, 50])
def test_products_by_few_blocks_and_by_many(multiprocessors: int) -> None:
    d = matrices(1, 3, 70)
    with running(HostLauncher(multiprocessors=multiprocessors)):
        assert oracle.error(fused.products(d.float()).inner, defined(d)) < EXACT


# Weights


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize(("n", "count", "channels"), [(4, 2, 3), (5, 3, 1), (19, 1, 2049), (33, 2, 3)])
def test_weights_are_the_laplacian_of_the_geometry(n: int, count: int, channels: int, objective: fused.Objective, order: Order) -> None:
    d, given, target, means = geometries(n, count, channels=channels)
    with running(HostLauncher(order)):
        found = fused.weights(d, given, target, means, objective, lap=True)
    expected = laplacian(d, given, target, objective)
    assert found.lap is not None
    if n == 4 and objective == "relevance":  # one dimension is left beside B, so L cannot change
        assert found.lap.abs().max() == 0 and found.channel_weights.abs().max() == 0 and expected.lap.abs().max() == 0
    assert oracle.error(found.score, expected.score) < EXACT
    assert oracle.error(found.left, expected.left) < EXACT
    assert oracle.error(found.lap, expected.lap) < EXACT
    assert oracle.error(found.channel_weights, gradients(expected.lap, means)) < EXACT


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize("case", oracle.CASES)
def test_published_scores_weights_and_maps(case: str, objective: fused.Objective) -> None:
    """The kernels in a row, from features to maps."""
    known = oracle.load(case)
    name = "unique" if objective == "uniqueness" else objective
    x, y, g = (torch.from_numpy(known[key]).float() for key in ("x", "y", "target"))
    with running():
        d, given, target = (fused.distances(f.flatten(1) - f.flatten(1).mean(0)).matrix[None] for f in (x, y, g))
        found = fused.weights(d, given, target, geometry.gap(x)[None], objective)
        maps = fused.cam(x, found.channel_weights[0]).maps
    tolerance = oracle.TOLERANCE["float32"]
    assert found.lap is None
    assert oracle.error(found.channel_weights[0], known[f"{name}/weights"]) < tolerance
    assert oracle.error(maps, known[f"{name}/cam"]) < tolerance
    scale = max(1.0, abs(float(known[f"{name}/score"])))
    assert abs(float(found.score) - float(known[f"{name}/score"])) / scale < tolerance


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize(("n", "dtype"), [(5, torch.float32), (33, torch.bfloat16), (111, torch.float16)])
def test_from_features_to_maps_is_autograd_through_the_definition(n: int, dtype: torch.dtype, objective: fused.Objective) -> None:
    x, y, labels = oracle.features(n=n, shape=(5, 3, 5), classes=2)
    x, y, target = x.to(dtype), y.to(dtype), torch.nn.functional.one_hot(labels).float()
    score, weights, maps = reference.unicam(x, y, target, objective)
    with running():
        wide = (f.flatten(1).float() for f in (x, y, target))
        d, given, wanted = (fused.distances(f - f.mean(0)).matrix[None] for f in wide)
        found = fused.weights(d, given, wanted, geometry.gap(x)[None], objective)
        seen = fused.cam(x, found.channel_weights[0]).maps
    tolerance = oracle.TOLERANCE["float32"]
    assert oracle.error(found.score[0], score) < tolerance
    assert oracle.error(found.channel_weights[0], weights) < tolerance
    assert oracle.error(seen, maps) < tolerance


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
def test_weights_of_duplicates_and_near_duplicates(objective: fused.Objective) -> None:
    """A pair at distance zero carries no gradient; one at 1e-6 of the others puts large opposite numbers into Lap."""
    x, y, labels = oracle.features(n=23, shape=(11, 3, 1))
    x[7] = x[2]
    x[9] = x[4] + 1e-6 * x[5]
    target = torch.nn.functional.one_hot(labels).double()
    d, given, wanted = (geometry.distances(f.flatten(1)).float()[None] for f in (x, y, target))
    means = geometry.gap(x)[None]
    with running():
        found = fused.weights(d, given, wanted, means, objective, lap=True)
    expected = laplacian(d, given, wanted, objective)
    assert d[0, 7, 2] == 0 and found.lap is not None and found.lap[0, 7, 2] == 0
    assert oracle.error(found.lap, expected.lap) < EXACT
    assert found.lap.abs().max() > 1e3 * found.lap.abs().median()
    assert oracle.error(found.channel_weights, gradients(expected.lap, means)) < EXACT


def test_a_target_that_centring_sends_to_zero_has_no_score_and_no_map() -> None:
    d, given, _, means = geometries(9)
    with running():
        found = fused.weights(d, given, torch.zeros_like(d), means)
    expected = laplacian(d, given, torch.zeros_like(d), "relevance")
    assert found.score.isnan().all() and expected.score.isnan().all()
    assert found.channel_weights.abs().max() == 0 and expected.lap.abs().max() == 0
    assert oracle.error(found.left, expected.left) < EXACT


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
def test_features_that_explain_nothing_or_everything_leave_nothing(objective: fused.Objective) -> None:
    d, _, target, means = geometries(9)
    with running():
        constant = fused.weights(d, torch.zeros_like(d), target, means, objective)
        same = fused.weights(d, d, target, means, objective)
    assert constant.left.isnan().all() and constant.channel_weights.abs().max() == 0
    assert laplacian(d, torch.zeros_like(d), target, objective).left.isnan().all()
    assert same.left.max() < 1e-7 and same.channel_weights.abs().max() == 0


def test_a_target_that_the_residual_already_follows_gives_no_map() -> None:
    """L is at its maximum there, and what is left of its derivative is the rounding of float32 distances."""
    d, given, _, means = geometries(9)
    a, b = (geometry.u_centered(matrix.double()) for matrix in (d, given))
    along = geometry.residual(a, b)
    target = (along - along.amin() * (1 - torch.eye(9))).float()
    with running():
        found = fused.weights(d, given, target, means)
    assert found.score > 1 - 1e-9 and found.channel_weights.abs().max() == 0


@pytest.mark.parametrize(("objective", "degree"), [("relevance", 0), ("uniqueness", 1)])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_weights_of_features_of_any_scale(scale: float, objective: fused.Objective, degree: int) -> None:
    """A gradient is of one degree less than its score."""
    d, given, target, means = geometries(19)
    with running():
        plain = fused.weights(d, given, target, means, objective)
        scaled = fused.weights(d * scale, given * scale, target, means * scale, objective)
    assert oracle.error(scaled.score / scale**degree, plain.score) < oracle.TOLERANCE["float32"]
    assert oracle.error(scaled.channel_weights / scale ** (degree - 1), plain.channel_weights) < oracle.TOLERANCE["float32"]


# Queries among references


def among(m: int, q: int, channels: int = 11) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor]:
    *distances, means = (part[0] for part in geometries(m + q, channels=channels))
    return tuple(d[:m, :m] for d in distances), tuple(d[m:, :m] for d in distances), means[m:], means[:m]


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize(("m", "q", "channels"), [(3, 4, 3), (4, 1, 1), (18, 17, 130), (41, 5, 3)])
def test_query_weights_are_the_last_row_of_the_bordered_geometry(
    m: int, q: int, channels: int, objective: fused.Objective, order: Order
) -> None:
    inside, border, queries, references = among(m, q, channels)
    with running(HostLauncher(order)):
        found = fused.query_weights(inside, border, queries, references, objective)  # type: ignore[arg-type]
    d, given, target = (geometry.bordered(i.double(), b.double()) for i, b in zip(inside, border, strict=True))
    expected = laplacian(d, given, target, objective)
    g = geometry.u_centered(target)
    sound = geometry.dot(g, g) > 1e-9  # more than the rounding of a target that centring sends to zero
    assert sound.any()
    assert oracle.error(found.score[sound], expected.score[sound]) < EXACT
    assert oracle.error(found.left, expected.left) < EXACT
    weights = geometry.query_gradient(expected.lap, queries, references)
    assert oracle.error(found.channel_weights[sound], weights[sound]) < EXACT
    assert found.channel_weights.isfinite().all()


def test_queries_never_write_their_bordered_matrices() -> None:
    class Largest(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, Tensor))])
            return result

    inside, border, queries, references = ([p.clone() for p in part] if isinstance(part, tuple) else part for part in among(30, 25, 2))
    for objective in ("relevance", "uniqueness"):
        with running(), Largest() as seen:  # type: ignore[no-untyped-call]
            fused.query_weights(tuple(inside), tuple(border), queries, references, objective)  # type: ignore[arg-type]
        assert seen.bytes <= 3 * 31 * 31 * 8


# Maps


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [
        ((1, 1, 1), torch.float32, (3, 2)),
        ((2049, 1, 1), torch.float32, None),
        ((64, 7, 7), torch.float32, (20, 21)),
        ((64, 7, 7), torch.bfloat16, (9, 7)),
        ((2049, 3, 5), torch.float16, (5, 3)),
        ((2048, 3, 5), torch.float16, (5, 3)),
        ((3, 17, 17), torch.float32, (4, 40)),
        ((4, 56, 56), torch.float32, None),
        ((3, 56, 56), torch.float16, (60, 60)),
    ],
)
def test_maps_are_those_of_the_geometry(
    shape: tuple[int, int, int], dtype: torch.dtype, size: tuple[int, int] | None, order: Order
) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, *shape, generator=generator).to(dtype)
    weights = torch.randn(2, shape[0], generator=generator, dtype=torch.float64)
    with running(HostLauncher(order)):
        found = fused.cam(features, weights, size)
    expected = (weights[:, :, None, None] * features.double()).sum(1).relu()
    assert oracle.error(found.maps, expected) < SINGLE
    assert oracle.error(found.maps, geometry.cam(features, weights)) < 10 * SINGLE
    if size is None:
        assert found.resized is None
        return
    resized = torch.nn.functional.interpolate(geometry.scaled(found.maps)[:, None], size=size, mode="bilinear", align_corners=False)
    assert found.resized is not None and oracle.error(found.resized, resized[:, 0]) < SINGLE


@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_maps_by_few_blocks_and_by_many(multiprocessors: int) -> None:
    features = torch.randn(1, 320, 7, 7, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(1, 320, generator=torch.Generator().manual_seed(1))
    launcher = HostLauncher(multiprocessors=multiprocessors)
    with running(launcher):
        found = fused.cam(features, weights, (7, 7))
    assert oracle.error(found.maps, geometry.cam(features.double(), weights)) < SINGLE
    assert oracle.error(found.resized, geometry.scaled(found.maps)) < SINGLE


def test_maps_of_strided_and_misaligned_features() -> None:
    generator = torch.Generator().manual_seed(0)
    features, weights = torch.randn(3, 12, 5, 7, generator=generator), torch.randn(3, 24, generator=generator)[:, ::2]
    shifted = torch.empty(features.numel() + 1)[1:].view(features.shape).copy_(features)
    assert shifted.data_ptr() % 16
    expected = geometry.cam(features.double(), weights)
    with running():
        for given in (features, features.contiguous(memory_format=torch.channels_last), shifted):
            assert oracle.error(fused.cam(given, weights).maps, expected) < SINGLE


def test_scaled_maps_span_zero_to_one_and_constant_ones_vanish() -> None:
    features = torch.randn(3, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    features[1] = 2.0
    with running():
        found = fused.cam(features, torch.ones(3, 5), (7, 7))
    assert (found.maps[1] == 10).all()
    assert found.resized is not None and found.resized[1].abs().max() == 0
    assert all(found.resized[i].min() == 0 and found.resized[i].max() == 1 for i in (0, 2))


def test_a_map_that_is_not_a_number_says_so() -> None:
    features = torch.ones(1, 3, 2, 2)
    features[0, 1, 0, 1] = torch.nan
    with running():
        found = fused.cam(features, torch.ones(1, 3)).maps[0]
    assert found[0, 1].isnan() and found[[0, 1, 1], [0, 0, 1]].isfinite().all()


# All


def every() -> list[Tensor]:
    x, y = rows(70, 9), rows(67, 9, 3)
    d, given, target, means = geometries(19, 2)
    inside, border, queries, references = among(20, 5)
    features = torch.randn(2, 64, 7, 7, generator=torch.Generator().manual_seed(0))
    cross = fused.tile(x, y, x.square().sum(1), y.square().sum(1), diagonal=False)
    found = [*vars(fused.distances(x)).values(), *vars(cross).values(), *vars(fused.products(matrices(2, 5, 33))).values()]
    for objective in ("relevance", "uniqueness"):
        found += vars(fused.weights(d, given, target, means, objective, lap=True)).values()
        found += vars(fused.query_weights(inside, border, queries, references, objective)).values()  # type: ignore[arg-type]
    return [*found, *vars(fused.cam(features, torch.ones(2, 64), (9, 9))).values()]


def test_the_order_of_blocks_and_threads_changes_no_bit() -> None:
    results = []
    for order in ORDERS:
        with running(HostLauncher(order)):
            results.append(every())
    assert len(results[0]) == 25
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_what_no_kernel_takes_is_refused() -> None:
    x, d = rows(5, 7), matrices(1, 3, 5).float()
    means = torch.zeros(1, 5, 2, dtype=torch.float64)
    triple = (d[:, 0], d[:, 1], d[:, 2])
    small = (d[0, 0, :2, :2],) * 3
    for call in (
        lambda: fused.distances(x.double()),
        lambda: fused.tile(x, x[:, 1:], x.square().sum(1), x.square().sum(1), False),
        lambda: fused.products(d[..., :3, :3]),
        lambda: fused.products(d[0]),
        lambda: fused.weights(*triple, means.float()),
        lambda: fused.weights(d[:, 0], d[:, 1], d[:, 2, :4, :4], means),
        lambda: fused.query_weights(small, (d[0, 0, 2:, :2],) * 3, means[0, 2:], means[0, :2]),
        lambda: fused.cam(torch.zeros(2, 3, 4, 5, dtype=torch.float64), torch.zeros(2, 3)),
        lambda: fused.cam(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4)),
    ):
        with pytest.raises(ValueError, match=r"must|needs"):
            call()


# Mistakes put into the kernels


def check_pairwise() -> None:
    x, y = rows(70, 5), rows(66, 5, 3)
    found, expected = fused.distances(x), reference.distances(x.double())
    assert oracle.error(found.matrix, expected) < SINGLE and oracle.error(found.rows, expected.sum(1)) < SINGLE
    cross, expected = fused.tile(x, y, x.square().sum(1), y.square().sum(1), False), torch.cdist(x.double(), y.double())
    assert oracle.error(cross.matrix, expected) < SINGLE
    assert oracle.error(cross.rows, expected.sum(1)) < SINGLE and oracle.error(cross.columns, expected.sum(0)) < SINGLE


def check_products() -> None:
    d = matrices(1, 5, 33)
    found = fused.products(d.float())
    assert oracle.error(found.inner, defined(d)) < EXACT and oracle.error(found.rows, d.sum(-1)) < 1e-14


def check_weights() -> None:
    d, given, target, means = geometries(35)
    found, expected = fused.weights(d, given, target, means, "uniqueness"), laplacian(d, given, target, "uniqueness")
    assert oracle.error(found.score, expected.score) < EXACT
    assert oracle.error(found.channel_weights, gradients(expected.lap, means)) < EXACT


def check_cam() -> None:
    features = torch.randn(2, 320, 7, 7, generator=torch.Generator().manual_seed(0))
    found, expected = fused.cam(features, torch.ones(2, 320), (7, 7)), features.double().sum(1).relu()
    assert oracle.error(found.maps, expected) < SINGLE and oracle.error(found.resized, geometry.scaled(expected)) < 10 * SINGLE


BARRIER = "__syncthreads();"
MISTAKES = [
    # Missing barriers. That before an image's blocks are counted is not among them: blocks run one at a time here.
    ("pairwise", check_pairwise, f"top, left, diagonal);\n    {BARRIER}", "top, left, diagonal);"),
    ("pairwise", check_pairwise, f"top, left, false);\n    {BARRIER}", "top, left, false);"),
    ("products", check_products, BARRIER, ""),
    ("weights", check_weights, f"{BARRIER}  // the combinations are written; w is read", ""),
    ("weights", check_weights, f"{BARRIER}\n        if (!present)", "if (!present)"),
    ("cam", check_cam, f"{BARRIER}\n    // Element e", ""),
    ("cam", check_cam, f"- 1;\n    {BARRIER}", "- 1;"),
    ("cam", check_cam, f"= high;\n    {BARRIER}", "= high;"),
    ("cam", check_cam, f"/ span;\n    {BARRIER}", "/ span;"),
    # One too many, one too few
    ("pairwise", check_pairwise, "= i < x.count && j < y.count ? gram", "= i <= x.count && j < y.count ? gram"),
    ("pairwise", check_pairwise, "k < d; k += 32", "k <= d; k += 32"),
    ("products", check_products, "begin + rows_each)", "begin + rows_each + 1)"),
    ("weights", check_weights, "j < count && i != j", "j <= count && i != j"),
    ("weights", check_weights, "j < n; j += 32) {\n        const double a", "j + 1 < n; j += 32) {\n        const double a"),
    ("cam", check_cam, "position < count; position", "position <= count; position"),
    ("cam", check_cam, "begin + image.each)", "begin + image.each + 1)"),
]


@pytest.mark.parametrize(("source", "check", "old", "new"), MISTAKES, ids=[f"{m[0]}-{at}" for at, m in enumerate(MISTAKES)])
def test_a_mistake_in_a_kernel_is_caught(source: str, check: Callable[[], None], old: str, new: str) -> None:
    with pytest.raises((KernelError, AssertionError)):
        for order in ORDERS:
            with running(host.broken(source, old, new, order)):
                check()


@pytest.mark.parametrize("check", [check_pairwise, check_products, check_weights, check_cam])
def test_without_a_mistake_nothing_is_caught(check: Callable[[], None]) -> None:
    with running():
        check()
