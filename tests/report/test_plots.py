"""The drawings of scores."""

from __future__ import annotations

import math

import pytest

from kdx.report import plots


def test_a_plot_has_the_colours_of_the_page_and_escapes_text() -> None:
    points = {"a<b>$x$ &": {"FSS(S,T)": (0.5, (0.4, 0.6)), "FSS(B,T)": (math.nan, (math.nan, math.nan))}}
    svg = plots.plot(points, plots.SIMILARITY_SERIES[:2], "prefix")
    assert svg == plots.plot(points, plots.SIMILARITY_SERIES[:2], "prefix")
    assert "a&lt;b&gt;$x$ &amp;" in svg
    assert "var(--student)" in svg and "currentColor" in svg and "#0102" not in svg
    assert "NaN" not in svg and "nan" not in svg


def _points(*values: float, half: float = 0.01) -> dict[str, dict[str, tuple[float, tuple[float, float]]]]:
    return {"layer": {name: (x, (x - half, x + half)) for name, x in zip(("FSS(S,T)", "FSS(B,T)"), values, strict=True)}}


@pytest.mark.parametrize(
    ("values", "zero"), [((0.92, 0.89), False), ((0.9, 0.5), False), ((0.9, 0.4), True), ((0.3, -0.2), True), ((-0.1, -0.2), True)]
)
def test_an_axis_includes_its_intervals_and_omits_zero_only_where_they_would_be_too_short(values: tuple[float, float], zero: bool) -> None:
    points = _points(*values)
    low, high = plots.limits(points, plots.SIMILARITY_SERIES[:2], from_zero=False)
    assert low < min(values) - 0.01 and high > max(values) + 0.01
    assert (low <= 0 <= high) == zero
    assert zero or max(values) - min(values) + 0.02 > 0.45 * (high - low) or high - low < 0.06
    from_zero = plots.limits(points, plots.SIMILARITY_SERIES[:2])
    assert from_zero[0] <= 0 <= from_zero[1] and (not zero or from_zero == (low, high))


def test_scores_that_are_not_finite_have_a_default_axis() -> None:
    assert plots.limits(_points(math.nan, math.nan), plots.SIMILARITY_SERIES[:2], from_zero=False) == pytest.approx((-0.008, 0.208))
