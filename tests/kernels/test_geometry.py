"""The closed form against the definitions, against autograd through features, and its properties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdx.kernels import distances, geometry, reference
from tests import oracle


def laplacian(x: Tensor, y: Tensor, target: Tensor, objective: str) -> geometry.Laplacian:
    d, e, h = (geometry.distances(rows.flatten(1)) for rows in (x, y, target))
    return geometry.laplacian(d, geometry.u_centered(d), geometry.u_centered(e), geometry.u_centered(h), geometry.OBJECTIVES[objective])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("case", oracle.CASES)
@pytest.mark.parametrize(("name", "objective"), [("relevance", "relevance"), ("unique", "uniqueness")])
def test_published_scores_weights_and_maps(case: str, name: str, objective: str, dtype: torch.dtype) -> None:
    known = oracle.load(case)
    x, y = (torch.from_numpy(known[key]).to(dtype) for key in ("x", "y"))
    lap = laplacian(x, y, torch.from_numpy(known["target"]), objective)
    weights = geometry.gradient(lap.lap, geometry.gap(x))
    tolerance = oracle.TOLERANCE[str(dtype).removeprefix("torch.")]
    assert oracle.error(weights, known[f"{name}/weights"]) < tolerance
    assert oracle.error(geometry.cam(x, weights), known[f"{name}/cam"]) < tolerance
    # A score near zero is a difference of large numbers, so its error is measured on its own scale of one.
    scale = max(1.0, abs(float(known[f"{name}/score"])))
    assert abs(float(lap.score) - float(known[f"{name}/score"])) / scale < tolerance


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("n", [4, 5, 19])
def test_closed_form_is_autograd_through_the_features(objective: str, weighting: str, pooled: bool, n: int) -> None:
    x, y, labels = oracle.features(n=n, classes=2 if n < 9 else 4)
    target = torch.nn.functional.one_hot(labels).double()
    score, weights, maps = reference.unicam(x, y, target, objective, weighting, pooled)
    rows = (geometry.gap(x), geometry.gap(y)) if pooled else (x, y)
    lap = laplacian(*rows, target, objective)
    gap = geometry.gradient(lap.lap, geometry.gap(x)) / (x.shape[2] * x.shape[3] if pooled else 1)
    actual = (
        geometry.elementwise_cam(x, geometry.gradient(lap.lap, x.flatten(1)))
        if weighting == "elementwise" and not pooled
        else geometry.cam(x, gap)
    )
    tolerance = oracle.TOLERANCE["float64"]
    assert oracle.error(lap.score, score) < tolerance
    if n == 4 and objective == "relevance":  # one dimension remains besides B, so L cannot change
        assert gap.abs().max() == 0 and actual.abs().max() == 0
        assert weights.abs().max() < 1e-14 * abs(float(score))
        return
    assert oracle.error(gap, weights) < tolerance
    assert oracle.error(actual, maps) < tolerance


def test_any_objective_by_autograd_on_the_residual() -> None:
    x, y, labels = oracle.features()
    target = torch.nn.functional.one_hot(labels).double()
    own = geometry.differentiated(lambda r: r.amax(-1).sum(-1))
    d, e, h = (geometry.distances(rows.flatten(1)) for rows in (x, y, target))
    u = geometry.u_centered
    assert oracle.error(geometry.laplacian(d, u(d), u(e), u(h), own).lap, laplacian(x, y, target, "uniqueness").lap) < 1e-12


def test_distances_of_near_duplicates_far_from_the_origin() -> None:
    """A Gram product alone loses them: their distance is 1e-6 of their norm."""
    generator = torch.Generator().manual_seed(0)
    x = 1e3 + torch.randn(9, 33, generator=generator, dtype=torch.float64)
    x[4] = x[2] + 1e-3 * torch.randn(33, generator=generator, dtype=torch.float64)
    x[7] = x[2]
    single = x.float()
    expected = reference.distances(single.double())
    actual = geometry.distances(single)
    assert actual[7, 2] == 0
    assert oracle.error(actual, expected) < 1e-6
    assert float((actual[4, 2] - expected[4, 2]).abs() / expected[4, 2]) < 1e-5


def test_cross_distances_are_blocks_of_distances() -> None:
    x = torch.randn(17, 23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[3] = x[12]
    assert oracle.error(geometry.cross_distances(x[:6], x[6:]), reference.distances(x)[:6, 6:]) < 1e-12
    bordered = geometry.bordered(geometry.distances(x[6:]), geometry.cross_distances(x[:6], x[6:]))
    for query in range(6):
        rows = torch.cat([x[6:], x[query : query + 1]])
        assert oracle.error(bordered[query], reference.distances(rows)) < 1e-12


def test_permuted_products_are_products_of_permuted_matrices() -> None:
    x, y, labels = oracle.features(n=24, classes=3)
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)[labels]
    target = geometry.distances(rows)
    matrices = torch.stack([geometry.u_centered(geometry.distances(f.flatten(1))) for f in (x, y)])
    permutations = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(seed)) for seed in range(7)])
    expected = torch.stack(
        [torch.stack([reference.inner(a, reference.u_centered(target[p][:, p])) for a in matrices]) for p in permutations]
    )
    assert oracle.error(geometry.permuted_products(matrices, geometry.u_centered(target), permutations), expected) < 1e-12
    assert oracle.error(geometry.permuted_class_products(matrices, target, labels, permutations), expected) < 1e-12


@pytest.mark.parametrize("case", oracle.CASES)
def test_correlations_are_the_definitions(case: str) -> None:
    known = oracle.load(case)
    d = [geometry.distances(torch.from_numpy(known[key]).flatten(1)) for key in ("x", "target", "y")]
    for centre, defined in ((geometry.u_centered, reference.u_centered), (geometry.double_centered, reference.double_centered)):
        a, g, b = (centre(matrix) for matrix in d)
        x, t, y = (defined(matrix) for matrix in d)
        assert oracle.error(geometry.correlation(a, b), reference.correlation(x, y)) < 1e-9
        assert oracle.error(geometry.semipartial(a, g, b), reference.semipartial(x, t, y)) < 1e-9


def test_stacks_are_their_members() -> None:
    x, y, labels = oracle.features(n=9, classes=3)
    target = geometry.u_centered(geometry.distances(torch.nn.functional.one_hot(labels).double()))
    d = torch.stack([geometry.distances(x.flatten(1)), geometry.distances(y.flatten(1))])
    a = geometry.u_centered(d)
    both = geometry.laplacian(d, a, a.flip(0), target)
    for index in range(2):
        alone = geometry.laplacian(d[index], a[index], a[1 - index], target)
        assert oracle.error(both.lap[index], alone.lap) < 1e-14
        assert oracle.error(both.score[index], alone.score) < 1e-12


def test_float32_survives_features_of_any_scale() -> None:
    """Raw products of norms leave float32's range at these scales; unit-norm matrices do not."""
    x, y, labels = oracle.features()
    target = geometry.distances(torch.nn.functional.one_hot(labels).double(), torch.float32)

    def weights(scale: float) -> Tensor:
        d, e = (geometry.distances(f.flatten(1).float() * scale, torch.float32) for f in (x, y))
        lap = geometry.laplacian(d, geometry.u_centered(d), geometry.u_centered(e), geometry.u_centered(target))
        return geometry.gradient(lap.lap, geometry.gap(x.float() * scale, torch.float32)) * scale

    plain = weights(1.0)
    for scale in (1e-12, 1e12):
        assert oracle.error(weights(scale), plain) < oracle.TOLERANCE["float32"]


class _Explained(torch.nn.Module):
    """The closed form as a graph in float32 only, as runtimes without float64 need it."""

    def forward(self, x: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d, e, h = (geometry.distances(rows.flatten(1), torch.float32) for rows in (x, y, target))
        a, b, g = (geometry.u_centered(matrix) for matrix in (d, e, h))
        lap = geometry.laplacian(d, a, b, g)
        maps = geometry.cam(x, geometry.gradient(lap.lap, geometry.gap(x, torch.float32)))
        return (
            geometry.scaled(maps),
            geometry.elementwise_cam(x, geometry.gradient(lap.lap, x.flatten(1))),
            geometry.products(torch.stack([a, b, g])),
        )


def test_traceable_with_a_dynamic_batch() -> None:
    batch = torch.export.Dim("batch", min=4)

    def inputs(n: int) -> tuple[Tensor, ...]:
        x, y, labels = oracle.features(n=n)
        labels = labels % 3  # four images of four classes have no geometry, and their maps would be rounding
        return x.float(), y.float(), torch.nn.functional.one_hot(labels, 3).float()

    program = torch.export.export(_Explained(), inputs(7), dynamic_shapes=({0: batch},) * 3)
    for n in (4, 13):
        for actual, expected in zip(program.module()(*inputs(n)), _Explained()(*inputs(n)), strict=True):
            assert oracle.error(actual, expected) < 1e-5


def test_nothing_of_size_n_by_n_by_d() -> None:
    """No step makes a tensor with more elements than the features or an n x n matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.elements = max([self.elements, *sizes])
            return result

    x, y, labels = oracle.features(n=31, shape=(13, 7, 7), other=(11, 5, 5))
    with Largest() as seen:  # type: ignore[no-untyped-call]
        lap = laplacian(x, y, torch.nn.functional.one_hot(labels).double(), "relevance")
        geometry.cam(x, geometry.gradient(lap.lap, geometry.gap(x)))
        geometry.elementwise_cam(x, geometry.gradient(lap.lap, x.flatten(1)))
    assert seen.elements <= max(x.numel(), 31 * 31)


def test_scaled_maps_span_zero_to_one_and_constant_maps_become_zero() -> None:
    maps = torch.rand(5, 3, 7, generator=torch.Generator().manual_seed(0)) + 2
    maps[2] = 4.0
    scaled = geometry.scaled(maps)
    assert scaled[2].abs().max() == 0
    assert all(scaled[i].min() == 0 and scaled[i].max() == 1 for i in (0, 1, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [3 * 4096, 5 * 4099])
def test_distances_of_wide_features_are_those_of_all_columns_at_once(
    dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several steps with a shorter last one, padding with columns of zeros, a stack, and strided rows."""
    generator = torch.Generator().manual_seed(3)
    x = (5 + torch.randn(2, columns, 6, generator=generator)).to(dtype).mT
    monkeypatch.setattr(distances, "_COPIED", 2 * 2 * 6 * 4096 * geometry.wide(x).itemsize // torch.get_num_threads())
    actual = geometry.distances(x)
    for matrix, rows in zip(actual, x, strict=True):
        assert oracle.error(matrix, reference.distances(rows.double())) < (1e-12 if dtype == torch.float64 else 1e-6)
        assert torch.equal(matrix, matrix.T) and not matrix.diagonal().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_spatial_mean_covers_all_places_at_any_step_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(7, 5, 4, 3, generator=torch.Generator().manual_seed(4)).to(dtype).transpose(2, 3)
    monkeypatch.setattr(
        distances, "_COPIED", 3 * 5 * 12 * 8 // torch.get_num_threads()
    )  # steps of three images, and one image in the last step
    assert oracle.error(geometry.gap(features), features.double().mean((2, 3))) < 1e-15
