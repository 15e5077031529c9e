"""The kernels of channel weights, run on the CPU, against the definition and the PyTorch geometry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdx.choices import ObjectiveName
from kdx.kernels import fused, fused_maps, geometry, reference
from tests import oracle
from tests.host import HostLauncher, Order, running
from tests.kernels.inputs import EXACT, among, geometries, gradients, laplacian


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize(("n", "count", "channels"), [(4, 2, 3), (5, 3, 1), (19, 1, 2049), pytest.param(33, 2, 3, marks=pytest.mark.slow)])
def test_weights_are_the_laplacian_of_the_geometry(n: int, count: int, channels: int, objective: ObjectiveName, order: Order) -> None:
    d, given, target, means = geometries(n, count, channels=channels)
    with running(HostLauncher(order)):
        actual = fused.weights(d, given, target, means, objective, lap=True)
        through_lap = fused.product_weights(torch.stack((d, given, target), 1), means, objective)
    expected = laplacian(d, given, target, objective)
    assert actual.lap is not None
    if n == 4 and objective == "relevance":  # one dimension remains besides B, so L cannot change
        assert actual.lap.abs().max() == 0 and actual.channel_weights.abs().max() == 0 and expected.lap.abs().max() == 0
    assert oracle.error(actual.score, expected.score) < EXACT
    assert oracle.error(actual.left, expected.left) < EXACT
    assert oracle.error(actual.lap, expected.lap) < EXACT
    assert oracle.error(actual.channel_weights, gradients(expected.lap, means)) < EXACT
    assert oracle.error(through_lap.channel_weights, gradients(expected.lap, means)) < EXACT
    assert torch.equal(through_lap.score, actual.score) and torch.equal(through_lap.left, actual.left)


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize("case", oracle.CASES)
def test_published_scores_weights_and_maps(case: str, objective: ObjectiveName) -> None:
    """All kernels one after another, from features to maps."""
    known = oracle.load(case)
    name = "unique" if objective == "uniqueness" else objective
    x, y, g = (torch.from_numpy(known[key]).float() for key in ("x", "y", "target"))
    with running():
        d, given, target = (fused.distances(f.flatten(1) - f.flatten(1).mean(0))[None] for f in (x, y, g))
        actual = fused.weights(d, given, target, geometry.gap(x)[None], objective)
        maps = fused_maps.cam(x, actual.channel_weights[0])
    tolerance = oracle.TOLERANCE["float32"]
    assert actual.lap is None
    assert oracle.error(actual.channel_weights[0], known[f"{name}/weights"]) < tolerance
    assert oracle.error(maps, known[f"{name}/cam"]) < tolerance
    scale = max(1.0, abs(float(known[f"{name}/score"])))
    assert abs(float(actual.score) - float(known[f"{name}/score"])) / scale < tolerance


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize(
    ("n", "dtype"), [(5, torch.float32), (33, torch.bfloat16), pytest.param(111, torch.float16, marks=pytest.mark.slow)]
)
def test_from_features_to_maps_is_autograd_through_the_definition(n: int, dtype: torch.dtype, objective: ObjectiveName) -> None:
    x, y, labels = oracle.features(n=n, shape=(5, 3, 5), classes=2)
    x, y, target = x.to(dtype), y.to(dtype), torch.nn.functional.one_hot(labels).float()
    score, weights, expected = reference.unicam(x, y, target, objective)
    with running():
        wide = (f.flatten(1).float() for f in (x, y, target))
        d, given, wanted = (fused.distances(f - f.mean(0))[None] for f in wide)
        actual = fused.weights(d, given, wanted, geometry.gap(x)[None], objective)
        maps = fused_maps.cam(x, actual.channel_weights[0])
    tolerance = oracle.TOLERANCE["float32"]
    assert oracle.error(actual.score[0], score) < tolerance
    assert oracle.error(actual.channel_weights[0], weights) < tolerance
    assert oracle.error(maps, expected) < tolerance


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
def test_weights_of_duplicates_and_near_duplicates(objective: ObjectiveName) -> None:
    """A pair at distance zero carries no gradient; a pair a million times closer than others puts large opposite numbers into Lap."""
    x, y, labels = oracle.features(n=23, shape=(11, 3, 1))
    x[7] = x[2]
    x[9] = x[4] + 1e-6 * x[5]
    target = torch.nn.functional.one_hot(labels).double()
    d, given, wanted = (geometry.distances(f.flatten(1)).float()[None] for f in (x, y, target))
    means = geometry.gap(x)[None]
    with running():
        actual = fused.weights(d, given, wanted, means, objective, lap=True)
    expected = laplacian(d, given, wanted, objective)
    assert d[0, 7, 2] == 0 and actual.lap is not None and actual.lap[0, 7, 2] == 0
    assert oracle.error(actual.lap, expected.lap) < EXACT
    assert actual.lap.abs().max() > 1e3 * actual.lap.abs().median()
    assert oracle.error(actual.channel_weights, gradients(expected.lap, means)) < EXACT


def test_a_target_that_centring_sends_to_zero_has_no_score_and_no_map() -> None:
    d, given, _, means = geometries(9)
    with running():
        actual = fused.weights(d, given, torch.zeros_like(d), means)
    expected = laplacian(d, given, torch.zeros_like(d), "relevance")
    assert actual.score.isnan().all() and expected.score.isnan().all()
    assert actual.channel_weights.abs().max() == 0 and expected.lap.abs().max() == 0
    assert oracle.error(actual.left, expected.left) < EXACT


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
def test_features_that_explain_nothing_or_everything_leave_nothing(objective: ObjectiveName) -> None:
    d, _, target, means = geometries(9)
    with running():
        constant = fused.weights(d, torch.zeros_like(d), target, means, objective)
        same = fused.weights(d, d, target, means, objective)
    assert constant.left.isnan().all() and constant.channel_weights.abs().max() == 0
    assert laplacian(d, torch.zeros_like(d), target, objective).left.isnan().all()
    assert same.left.max() < 1e-7 and same.channel_weights.abs().max() == 0


def test_a_target_that_the_residual_already_follows_gives_no_map() -> None:
    """L is at its maximum, and its derivative is only the rounding of float32 distances."""
    d, given, _, means = geometries(9)
    a, b = (geometry.u_centered(matrix.double()) for matrix in (d, given))
    along = geometry.residual(a, b)
    target = (along - along.amin() * (1 - torch.eye(9))).float()
    with running():
        actual = fused.weights(d, given, target, means)
    assert actual.score > 1 - 1e-9 and actual.channel_weights.abs().max() == 0


@pytest.mark.parametrize(("objective", "degree"), [("relevance", 0), ("uniqueness", 1)])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_weights_of_features_of_any_scale(scale: float, objective: ObjectiveName, degree: int) -> None:
    """The degree of a gradient is one less than the degree of its score."""
    d, given, target, means = geometries(19)
    with running():
        plain = fused.weights(d, given, target, means, objective)
        scaled = fused.weights(d * scale, given * scale, target, means * scale, objective)
    assert oracle.error(scaled.score / scale**degree, plain.score) < oracle.TOLERANCE["float32"]
    assert oracle.error(scaled.channel_weights / scale ** (degree - 1), plain.channel_weights) < oracle.TOLERANCE["float32"]


# Queries among references


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize(("m", "q", "channels"), [(3, 4, 3), (4, 1, 1), (18, 17, 130), (41, 5, 3)])
def test_query_weights_are_the_last_row_of_the_bordered_geometry(
    m: int, q: int, channels: int, objective: ObjectiveName, order: Order
) -> None:
    inside, border, queries, references = among(m, q, channels)
    with running(HostLauncher(order)):
        actual = fused.query_weights(inside, border, queries, references, objective)  # type: ignore[arg-type]
    d, given, target = (geometry.bordered(i.double(), b.double()) for i, b in zip(inside, border, strict=True))
    expected = laplacian(d, given, target, objective)
    g = geometry.u_centered(target)
    sound = geometry.dot(g, g) > 1e-9  # above the rounding of a target that centring sends to zero
    assert sound.any()
    assert oracle.error(actual.score[sound], expected.score[sound]) < EXACT
    assert oracle.error(actual.left, expected.left) < EXACT
    weights = geometry.query_gradient(expected.lap, queries, references)
    assert oracle.error(actual.channel_weights[sound], weights[sound]) < EXACT
    assert actual.channel_weights.isfinite().all()


def test_queries_never_write_their_bordered_matrices() -> None:
    class Largest(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, Tensor))])
            return result

    inside, border, queries, references = ([p.clone() for p in part] if isinstance(part, tuple) else part for part in among(16, 12, 2))
    for objective in ("relevance", "uniqueness"):
        with running(), Largest() as seen:  # type: ignore[no-untyped-call]
            fused.query_weights(tuple(inside), tuple(border), queries, references, objective)  # type: ignore[arg-type]
        assert seen.bytes <= 3 * 17 * 17 * 8
