"""The float64 definitions against the published code's numbers and the dcor package."""

from __future__ import annotations

import dcor
import numpy as np
import pytest
import torch

from kdx.kernels import reference
from tests import oracle

TOLERANCE = oracle.TOLERANCE["float64"]


def centred(x: object, how: str = "u") -> torch.Tensor:
    rows = torch.from_numpy(np.asarray(x)).flatten(1)
    return (reference.u_centered if how == "u" else reference.double_centered)(reference.distances(rows))


@pytest.mark.parametrize("case", oracle.CASES)
@pytest.mark.parametrize(("name", "objective"), [("relevance", "relevance"), ("unique", "uniqueness")])
def test_unicam_agrees_with_the_published_code(case: str, name: str, objective: str) -> None:
    known = oracle.load(case)
    x, y, target = (torch.from_numpy(known[key]) for key in ("x", "y", "target"))
    score, weights, maps = reference.unicam(x, y, target, objective)
    assert oracle.error(score, known[f"{name}/score"]) < TOLERANCE
    assert oracle.error(weights, known[f"{name}/weights"]) < TOLERANCE
    assert oracle.error(maps, known[f"{name}/cam"]) < TOLERANCE


@pytest.mark.parametrize("case", oracle.CASES)
def test_scores_agree_with_the_published_code_and_dcor(case: str) -> None:
    known = oracle.load(case)
    a, b, g = (centred(known[key]) for key in ("x", "y", "target"))
    for result, key in (
        (reference.correlation(a, b), "dcor_unbiased_xy"),
        (reference.correlation(a, b), "dcor_library_unbiased_xy"),
        (reference.correlation(a, g), "dcor_unbiased_xg"),
        (reference.semipartial(a, g, b), "semipartial_xg_given_y"),
        (reference.semipartial(b, g, a), "semipartial_yg_given_x"),
        (reference.partial(a, g, b), "dcor_library_partial_xg_given_y"),
        (reference.correlation(centred(known["x"], "double"), centred(known["y"], "double")), "dcor_library_biased_xy"),
    ):
        assert oracle.error(result, known[key]) < TOLERANCE, key


@pytest.mark.parametrize("case", oracle.CASES)
def test_the_published_biased_score_is_ours_except_for_its_epsilons(case: str) -> None:
    """The published code scales rows to unit length, and adds 1e-12 under the root of distances and 1e-9 under that of the denominator."""
    known = oracle.load(case)

    def double_centred(key: str) -> torch.Tensor:
        rows = torch.nn.functional.normalize(torch.from_numpy(known[key]).flatten(1))
        squared = reference.distances(rows).square()
        return reference.double_centered((squared + 1e-12).sqrt())

    a, b = double_centred("x"), double_centred("y")
    published = (a * b).mean() / ((a * a).mean() * (b * b).mean() + 1e-9).sqrt()
    assert oracle.error(published, known["dcor_biased_normalized_xy"]) < TOLERANCE
    assert oracle.error(reference.correlation(a, b), known["dcor_biased_normalized_xy"]) < 1e-5


def test_scores_of_random_data_agree_with_dcor() -> None:
    rng = np.random.default_rng(3)
    for n, d, e in ((7, 1, 3), (23, 5, 2), (41, 19, 111)):
        x, y, z = rng.normal(size=(n, d)), rng.normal(size=(n, e)), rng.exponential(size=(n, 4))
        a, b, c = centred(x), centred(y), centred(z)
        assert oracle.error(reference.inner(a, b), dcor.u_distance_covariance_sqr(x, y)) < TOLERANCE
        assert oracle.error(reference.correlation(a, b), dcor.u_distance_correlation_sqr(x, y)) < TOLERANCE
        assert oracle.error(reference.partial(a, b, c), dcor.partial_distance_correlation(x, y, z)) < TOLERANCE
        biased = reference.correlation(centred(x, "double"), centred(y, "double"))
        assert oracle.error(biased, dcor.distance_correlation_sqr(x, y)) < TOLERANCE


def test_golden_partial_correlation() -> None:
    """R's package energy gives 0.8082904; the published semi-partial formula 0.7378648."""
    a, b, c = (centred(np.array(v, dtype=float)[:, None]) for v in ((1, 2, 3, 4, 5), (1, 2, 9, 4, 4), (9, 5, 6, 7, 8)))
    assert float(reference.partial(a, b, c)) == pytest.approx(0.8082904, abs=5e-8)
    assert float(reference.semipartial(a, b, c)) == pytest.approx(0.7378648, abs=5e-8)
