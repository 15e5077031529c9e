"""The public functions with the CUDA kernels, which run on the CPU here, against PyTorch; and the choice of the backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

import kdx
from kdx.explain.layer import LayerReferences, measure
from kdx.features.target import Target
from kdx.kernels import dispatch
from kdx.scores import uncertainty
from tests import oracle
from tests.explain.test_layer import roles
from tests.host import HostLauncher, running

CLOSE = oracle.TOLERANCE["float32"]


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched. They run on CPU tensors instead of PyTorch."""
    seen: list[str] = []

    class Counting(HostLauncher):
        def launch(self, source: str, kernel: str, *rest: Any, **more: Any) -> None:
            seen.append(kernel)
            super().launch(source, kernel, *rest, **more)

    with running(Counting()):
        yield seen


def features(n: int = 19) -> tuple[Tensor, Tensor, Tensor]:
    x, y, labels = oracle.features(n=n)
    return x.float(), y.float(), labels


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
def test_maps(launches: list[str], objective: Any, weighting: Any) -> None:
    x, y, labels = features()
    expected = kdx.unicam(x, y, labels, objective, weighting, backend="torch")
    assert not launches
    actual = kdx.unicam(x, y, labels, objective, weighting, backend="cuda")
    assert {"pairwise_symmetric", f"weights_{objective}"} <= set(launches)
    assert ("cam_float32" in launches) == (weighting == "gap")
    for name in ("maps", "weights"):
        assert oracle.error(getattr(actual, name), getattr(expected, name)) < CLOSE, name
    assert actual.score == pytest.approx(expected.score, rel=CLOSE)


@pytest.mark.parametrize("second", ["given", "minus", ""])
def test_maps_that_add_up(launches: list[str], second: str) -> None:
    x, y, labels = features()
    options: dict[str, Any] = {second: y} if second else {}
    expected = kdx.decompose(x, labels, **options, backend="torch")
    assert not launches
    actual = kdx.decompose(x, labels, **options, backend="cuda")
    for kernel in ("shares_rows_float32", "shares_squares_float32", "shares_contract"):
        assert launches.count(kernel) == (2 if second else 1)
    assert oracle.error(actual.maps, expected.maps) < CLOSE and actual.score == pytest.approx(expected.score, abs=1e-5)
    assert float(actual.maps.sum()) == pytest.approx(actual.score, abs=1e-5)


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
def test_maps_in_reference_mode(launches: list[str], objective: Any) -> None:
    x, y, labels = features(24)
    reference = kdx.ReferenceSet(x[:16], y[:16], labels[:16])
    expected = kdx.unicam(x[16:], y[16:], labels[16:], objective, reference=reference, backend="torch")
    actual = kdx.unicam(x[16:], y[16:], labels[16:], objective, reference=reference, backend="cuda")
    assert f"query_weights_{objective}" in launches
    assert oracle.error(actual.maps, expected.maps) < CLOSE and actual.score == pytest.approx(expected.score, rel=CLOSE)


def test_pytorch_computes_what_no_kernel_covers(launches: list[str]) -> None:
    """A user's objective, and elementwise weighting in reference mode: the kernels compute only distances and maps."""
    x, y, labels = features(24)

    def largest(r: Tensor) -> Tensor:
        return r.amax((-2, -1))

    expected = kdx.unicam(x, y, labels, largest, backend="torch")
    actual = kdx.unicam(x, y, labels, largest, backend="cuda")
    assert set(launches) == {"pairwise_symmetric", "means_float32", "cam_float32"}
    assert oracle.error(actual.maps, expected.maps) < CLOSE
    reference = kdx.ReferenceSet(x[:16], y[:16], labels[:16])
    options: dict[str, Any] = {"weighting": "elementwise", "reference": reference}
    among = [kdx.unicam(x[16:], y[16:], labels[16:], backend=backend, **options) for backend in ("torch", "cuda")]
    assert oracle.error(among[1].maps, among[0].maps) < CLOSE


@pytest.mark.parametrize("references", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_batch_of_three_networks(launches: list[str], references: bool) -> None:
    """Four maps at once: networks with equal numbers of channels share a launch."""
    features_by_role, labels = roles(24)
    features_by_role = {role: value.float() for role, value in features_by_role.items()}
    known = LayerReferences.of({role: value[:12] for role, value in features_by_role.items()}, labels[:12]) if references else None
    launches.clear()
    table = uncertainty.permutation_table(24, 19, 0)
    expected, actual = (
        measure(features_by_role, Target.of(labels), permutations=table, references=known, backend=backend) for backend in ("torch", "cuda")
    )
    assert launches.count("weights_relevance") == (0 if references else 2)
    for name, maps in expected.maps.items():
        assert oracle.error(actual.maps[name].maps, maps.maps) < CLOSE, name
        assert oracle.error(actual.maps[name].weights, maps.weights) < CLOSE, name
        assert actual.maps[name].score == pytest.approx(maps.score, abs=CLOSE)
    assert oracle.error(actual.products, expected.products) < CLOSE


@pytest.mark.parametrize(("n", "batch"), [(40, None), pytest.param(260, None, marks=pytest.mark.slow), (60, 16)])
def test_scores(launches: list[str], n: int, batch: int | None) -> None:
    x, y, labels = features(n)
    for options in ({"estimator": "unbiased"}, {"estimator": "biased"}):
        actual, expected = (
            kdx.rs(x, labels, y, batch=batch, permutations=19, backend=backend, **options)  # type: ignore[arg-type]
            for backend in ("cuda", "torch")
        )
        assert actual.value == pytest.approx(expected.value, abs=1e-4)
        assert actual.interval == pytest.approx(expected.interval, abs=1e-4)
        assert actual.p_value == expected.p_value
    assert {"pairwise_cross", "pairwise_symmetric"} & set(launches)
    assert ("products_float32" in launches or "products_float64" in launches) == (batch is not None)


def test_pytorch_computes_float64(launches: list[str]) -> None:
    x, y, labels = oracle.features()
    assert kdx.rs(x, labels, y).value == kdx.rs(x, labels, y, backend="torch").value and not launches
    for call in (
        lambda: kdx.unicam(x, y, labels, backend="cuda"),
        lambda: kdx.fss(x, y, backend="cuda"),
        lambda: kdx.decompose(x, labels, backend="cuda"),
    ):
        with pytest.raises(kdx.KdxError, match="float64"):
            call()


def test_the_kernels_are_refused_where_they_cannot_run() -> None:
    x, y, labels = features()
    assert type(dispatch.chosen(x)) is type(dispatch.chosen(x, "torch")) is dispatch.TorchBackend
    for call in (
        lambda: kdx.unicam(x, y, labels, backend="cuda"),
        lambda: kdx.rs(x, labels, backend="cuda"),
        lambda: kdx.decompose(x, labels, backend="cuda"),
        lambda: kdx.compare({"layer": {"student": x, "base": y}}, labels, backend="cuda"),
    ):
        with pytest.raises(kdx.KdxError, match="GPU"):
            call()
    with pytest.raises(ValueError, match="backend"):
        kdx.fss(x, y, backend="gpu")  # type: ignore[arg-type]
