"""Scores and maps do not depend on the unit of the features, from 1e-30 to 1e30."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from tests import oracle
from tests.hooked import batch

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
POWERS = (-100, 40, 100, *(pytest.param(power, marks=pytest.mark.slow) for power in (-83, -31, 83)))
X, Y, LABELS = oracle.features()
EMBEDDING = torch.nn.functional.one_hot(LABELS).double() + 0.1 * Y.flatten(1)[:, :4]
OTHERS, MORE = torch.cat([X] * 16)[:300].flip(0), torch.cat([Y] * 16)[:300]
NOISE = torch.randn(300, X[0].numel(), generator=torch.Generator().manual_seed(5), dtype=torch.float64).reshape(300, *X.shape[1:])


def _scores(unit: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[float]:
    x, y, many, more = (features.to(dtype) for features in (X, Y, OTHERS + NOISE, MORE))
    target = unit(EMBEDDING)
    scores = [
        kdx.fss(unit(x), y, permutations=19),
        kdx.rs(unit(x), LABELS, unit(y), permutations=19),
        kdx.rs(y, target, unit(x), "biased", permutations=19),
        kdx.partial_rs(unit(x), LABELS, y, permutations=19),
        kdx.rs(unit(many), torch.arange(300) % 4, more, permutations=19),
        kdx.fss(more, unit(many), batch=30, permutations=19),
        *kdx.compare({"a": {"student": unit(x), "base": y}}, target, permutations=19)["a"].scores.values(),
    ]
    return [value for score in scores for value in (score.value, *(score.interval or ()), score.p_value or 0.0)]


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_intervals_and_p_values(dtype: torch.dtype, power: int) -> None:
    """A power of two changes no digit of a feature, so it changes next to none of a score."""
    expected = _scores(lambda features: features, dtype)
    np.testing.assert_allclose(_scores(lambda features: features * 2.0**power, dtype), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-22, 1e22, 1e30])
def test_scores_in_other_units(scale: float) -> None:
    expected = kdx.rs(X.float(), LABELS, Y.float(), permutations=0).value
    for unit in (scale, np.float32(scale)):
        assert kdx.rs(X.float() * float(unit), LABELS, Y.float(), permutations=0).value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
@pytest.mark.parametrize("mode", ["batch", "pooled", "reference"])
def test_unicam(mode: str, weighting: Any, dtype: torch.dtype, power: int) -> None:
    """The maps stay the same, and the weights, as a derivative by the features, have the inverse unit."""
    x, y, unit = X.to(dtype), Y.to(dtype), 2.0**power
    known = [kdx.ReferenceSet(a, b, LABELS) for a, b in ((x, y), (x * unit, y))] if mode == "reference" else [None, None]
    expected, actual = (
        kdx.unicam(features, y, LABELS, weighting=weighting, pooled=mode == "pooled", reference=reference)
        for features, reference in zip((x, x * unit), known, strict=True)
    )
    assert float(expected.maps.max()) > 0
    assert oracle.error(actual.maps, expected.maps) < 1e-6 and actual.score == pytest.approx(expected.score, rel=1e-9)
    assert oracle.error(actual.weights.double() * unit, expected.weights) < 1e-6
    other = kdx.unicam(x, y * unit, LABELS, weighting=weighting, pooled=mode == "pooled")
    if mode != "reference":
        assert oracle.error(other.maps, expected.maps) < 1e-6


def test_an_objective_in_the_unit_of_the_distances() -> None:
    """Uniqueness is a sum of residuals: it has the features' unit, as its maps do, and its weights have none."""
    for objective in ("uniqueness", lambda r: r.square().sum((-2, -1)).sqrt()):
        expected, actual = (kdx.unicam(X.float() * unit, Y.float(), LABELS, objective) for unit in (1.0, 2.0**-90))
        assert actual.score == pytest.approx(expected.score * 2.0**-90, rel=1e-9)
        assert oracle.error(actual.weights, expected.weights) < 1e-6
        assert oracle.error(actual.maps.double() * 2.0**90, expected.maps) < 1e-6


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("channels", [11, 40])
def test_decompositions(channels: int, power: int) -> None:
    """With fewer and with more channels than images."""
    x = torch.cat([X] * 4, 1)[:, :channels].float() + 0.1 * torch.randn(19, channels, 5, 3, generator=torch.Generator().manual_seed(3))
    y, unit = Y.float(), 2.0**power
    for other in ("given", "minus"):
        second: dict[str, Any] = {other: y * unit}
        expected, actual = (kdx.decompose(features, LABELS, **second) for features in (x, x * unit))
        assert oracle.error(actual.maps, expected.maps) < 1e-6 and actual.score == pytest.approx(expected.score, rel=1e-9)


class _Units(nn.Module):
    """A network whose layer ``unit`` returns its features in another unit; the logits do not depend on it."""

    def __init__(self, power: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution, self.unit, self.head = nn.Conv2d(3, 6, 3), nn.Identity(), nn.Linear(6, 5)
        self.power = power

    def forward(self, images: Tensor) -> Tensor:
        features = self.unit(self.convolution(images).relu() * 2.0**self.power) * 2.0**-self.power
        logits: Tensor = self.head(features.tanh().mean((2, 3)))
        return logits


@pytest.mark.parametrize("power", [-100, 100])
@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
def test_networks(power: int, weighting: Any) -> None:
    """Class maps, maps of an earlier layer, and the Explainer, with and without reference images."""
    images, labels = batch(8, torch.float32), torch.arange(8) % 2
    (student, base), (other, other_base) = ([_Units(unit, seed).eval() for seed in (0, 1)] for unit in (0, power))
    method = kdx.grad_cam if weighting == "gap" else kdx.hires_cam
    assert oracle.error(method(other, images, "unit").maps, method(student, images, "unit").maps) < 1e-6

    def explained(*networks: nn.Module, references: bool) -> Any:
        student, base = networks
        with kdx.Explainer(student=student, base=base, layers="unit", runtime="eager", permutations=0, weighting=weighting) as explainer:
            if references:
                explainer.use_references(images.flip(0), labels)
            return explainer(images, labels).layers["unit"]

    for references in (False, True):
        expected, actual = (explained(*pair, references=references) for pair in ((student, base), (other, other_base)))
        for name in ("distilled", "residual"):
            assert float(getattr(expected, name).maps.max()) > 0
            assert oracle.error(getattr(actual, name).maps, getattr(expected, name).maps) < 1e-6
        for name, score in expected.scores.items():
            assert actual.scores[name].value == pytest.approx(score.value, rel=1e-9), name
        for name, score_map in expected.score_maps.items():
            assert oracle.error(actual.score_maps[name].maps, score_map.maps) < 1e-6, name


def test_features_beyond_computing_are_refused() -> None:
    with pytest.raises(kdx.KdxError, match="too large"):
        kdx.unicam(1e60 * X, Y, LABELS)


@pytest.mark.parametrize("power", [-250, -300, -600])
def test_features_whose_products_underflow_are_refused_and_not_called_constant(power: int) -> None:
    small = X * 2.0**power
    for call in (lambda: kdx.fss(small, small), lambda: kdx.rs(Y, LABELS, small), lambda: kdx.unicam(small, Y, LABELS)):
        with pytest.raises(kdx.KdxError, match="too close to zero"):
            call()
