"""A layer's measurement on a GPU, whose kernels run on the CPU here: it equals PyTorch's, with few launches and without waiting."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import kdx
from kdx.explain import fused_layer, layer_graphs
from kdx.explain.fused_layer import FusedMeasurement
from kdx.explain.layer import LayerMeasurement, LayerMethod, begin, measure
from kdx.explain.layer_graphs import LayerGraphs
from kdx.features.target import Target
from kdx.kernels import cuda, geometry
from kdx.runtimes.transfers import tensors_of
from kdx.scores import uncertainty
from tests import oracle
from tests.device_work import counted
from tests.explain.test_layer import roles
from tests.host import HostLauncher, running

CLOSE = oracle.TOLERANCE["float32"]


def inputs(n: int = 19, *names: str) -> tuple[dict[str, Tensor], Target, Tensor]:
    features, labels = roles(n, classes=3)
    features["random"] = features["teacher"].flip(0) + features["student"].mean()
    kept = {name: features[name].float() for name in names or ("student", "base")}
    return kept, Target.of(labels), uncertainty.permutation_table(n, 19, 0)


def assert_close(actual: LayerMeasurement, expected: LayerMeasurement, tolerance: float = CLOSE) -> None:
    assert list(actual.maps) == list(expected.maps) and list(actual.shares) == list(expected.shares)
    for name, maps in expected.maps.items():
        assert actual.maps[name].maps.dtype == maps.maps.dtype and actual.maps[name].weights.dtype == maps.weights.dtype
        assert oracle.error(actual.maps[name].maps, maps.maps) < tolerance, name
        assert oracle.error(actual.maps[name].weights, maps.weights) < tolerance, name
        assert actual.maps[name].score == pytest.approx(maps.score, rel=tolerance)
    for key, share in expected.shares.items():
        assert oracle.error(actual.shares[key], share) < tolerance, key
    assert oracle.error(actual.products, expected.products) < tolerance
    assert actual.permuted.keys() == expected.permuted.keys()
    for name, rows in expected.permuted.items():
        assert oracle.error(rows, actual.permuted[name]) < tolerance, name
    assert (actual.moments is None) == (expected.moments is None)
    if actual.moments is not None and expected.moments is not None:
        assert actual.moments.parts == expected.moments.parts
        for field in ("variance", "interaction", "slope"):
            assert oracle.error(getattr(actual.moments, field), getattr(expected.moments, field)) < tolerance, field


@pytest.mark.parametrize(("names", "launches"), [(("student", "base"), 51), (("teacher", "student", "base", "random"), 80)])
def test_a_batch_takes_few_launches_and_no_wait(names: tuple[str, ...], launches: int) -> None:
    features, target, table = inputs(16, *names)
    target.checked()
    with counted():
        begin(features, target, table)  # small constants are copied to the device once
    with counted() as work:
        begin(features, target, table)
    assert not work.waits and work.launches.total() <= launches, work.by_line()


SLOW = pytest.mark.slow
NETWORKS = [("student", "base"), ("student", "teacher"), ("teacher", "student", "base", "random")]
CASES = [
    pytest.param(names, shares, marks=[] if names == NETWORKS[0] and shares else [SLOW]) for names in NETWORKS for shares in (True, False)
]


@pytest.mark.parametrize(("names", "shares"), CASES)
def test_the_results_are_those_of_pytorch(names: tuple[str, ...], shares: bool) -> None:
    features, target, table = inputs(19, *names)
    expected = measure(features, target, table, LayerMethod(shares=shares))
    with running():
        actual = measure(features, target, table, LayerMethod(shares=shares))
    assert_close(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 6])
def test_few_images(n: int) -> None:
    features, target, table = inputs(n)
    expected = measure(features, target, table)
    with running():
        assert_close(measure(features, target, table), expected, 10 * CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "student", "base", "dtype"),
    [
        (5, (1, 1, 1), (2, 1, 1), torch.float16),
        (6, (8, 1, 1), (8, 1, 1), torch.bfloat16),
        (7, (3, 1, 2), (1, 3, 3), torch.bfloat16),
        (9, (33, 9, 8), (2, 1, 1), torch.float32),
        (33, (5, 3, 5), (5, 3, 5), torch.float16),
    ],
)
def test_small_and_odd_shapes(n: int, student: tuple[int, ...], base: tuple[int, ...], dtype: torch.dtype) -> None:
    """One channel, one position, networks of unlike shapes and rows that are not aligned, with threads in random order."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % 2
    shapes = {"student": student, "base": base}
    drawn = {role: torch.randn(n, *shape, generator=generator) + labels[:, None, None, None] for role, shape in shapes.items()}
    features = {role: values.to(dtype) for role, values in drawn.items()}
    target, table = Target.of(labels), uncertainty.permutation_table(n, 5, 0)
    wide = {role: values.double() for role, values in features.items()}
    expected = measure(wide, target, table, backend="torch")
    with running(HostLauncher("shuffled", n)):
        actual = measure(features, target, table)
    for name, maps in expected.maps.items():
        assert oracle.error(actual.maps[name].maps, maps.maps) < CLOSE and oracle.error(actual.maps[name].weights, maps.weights) < CLOSE
    assert oracle.error(actual.products, expected.products) < CLOSE
    assert all(oracle.error(actual.shares[key], share) < CLOSE for key, share in expected.shares.items())
    assert all(oracle.error(actual.permuted[name], rows) < CLOSE for name, rows in expected.permuted.items())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_uniqueness(dtype: torch.dtype) -> None:
    features, target, table = inputs()
    features = {role: value.to(dtype) for role, value in features.items()}
    method = LayerMethod(geometry.uniqueness)
    expected = measure(features, target, table, method)
    with running():
        assert_close(measure(features, target, table, method), expected)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-15, 1e25])
def test_features_of_unusual_magnitude_are_measured_step_by_step(factor: float) -> None:
    features, target, table = inputs()
    expected = measure(features, target, table)
    features = {role: value * factor for role, value in features.items()}
    with running():
        pending = begin(features, target, table)
        assert pending.numbers.numel()
        actual = pending.result(pending.numbers.clone())
    for name, maps in expected.maps.items():
        assert actual.maps[name].score == pytest.approx(maps.score, rel=CLOSE)
        assert oracle.error(actual.maps[name].maps, maps.maps) < CLOSE  # maps do not depend on the unit of the features


@pytest.mark.slow
def test_four_images_have_maps_of_zero() -> None:
    features, target, table = inputs(4)
    with running():
        actual = measure(features, target, table)
    assert actual.moments is None and not any(maps.maps.any() for maps in actual.maps.values())


def spoiled(features: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    features = {role: value.clone() for role, value in features.items()}
    if how == "nan":
        features["student"][[3, 7]] = torch.nan
    elif how == "infinite":
        features["base"][2, 0, 0, 0] = torch.inf
    elif how == "constant":
        features["base"][:] = 1.5
    else:
        features["base"] = 2 * features["student"]
    return features


@pytest.mark.parametrize("how", ["nan", *(pytest.param(how, marks=SLOW) for how in ("infinite", "constant", "equal"))])
def test_errors_are_those_of_pytorch_and_come_with_the_result(how: str) -> None:
    features, target, table = inputs()
    features = spoiled(features, how)
    with pytest.raises(kdx.KdxError) as expected:
        measure(features, target, table)
    with running():
        pending = begin(features, target, table)
        with pytest.raises(kdx.KdxError) as actual:
            pending.result()
    assert str(actual.value) == str(expected.value)


@pytest.mark.slow
def test_what_the_kernels_do_not_compute_is_complete_at_once() -> None:
    features, target, table = inputs()
    alone = {"student": features["student"]}
    double = features | {"base": features["base"].double()}
    assert fused_layer.applies(features) and not fused_layer.applies(alone) and not fused_layer.applies(double)
    with running():
        for given, method in (
            (alone, LayerMethod()),
            (features, LayerMethod(weighting="elementwise")),
            (features, LayerMethod(pooled=True)),
        ):
            pending = begin(given, target, table, method)
            assert not pending.numbers.numel() and pending.result().maps
    assert not begin(features, target, table).numbers.numel()  # on the CPU


def captured(run: Callable[[], tuple[FusedMeasurement, Tensor]]) -> tuple[tuple[FusedMeasurement, Tensor], Callable[[], None]]:
    """A stand-in for a CUDA graph, which computes the results again in the same memory."""
    results = run()

    def replay() -> None:
        measurement, packed = run()
        results[1].copy_(packed)
        for own, other in zip(tensors_of(results[0]), tensors_of(measurement), strict=True):
            own.copy_(other)

    return results, replay


@pytest.mark.slow
def test_batches_of_the_same_shapes_are_captured_and_keep_their_results() -> None:
    captures: list[object] = []

    def counting(run: Callable[[], tuple[FusedMeasurement, Tensor]]) -> tuple[tuple[FusedMeasurement, Tensor], Callable[[], None]]:
        captures.append(run)
        return captured(run)

    graphs, (features, target, table) = LayerGraphs(counting), inputs(19, *NETWORKS[2])
    batches = [{role: value.roll(shift, 1) * (shift + 1) for role, value in features.items()} for shift in range(4)]
    batches[3] = spoiled(batches[3], "nan")
    with running():
        pending = [begin(batch, target, table, graphs=graphs) for batch in batches]
        other = begin({role: value[:9] for role, value in features.items()}, inputs(9)[1], table[:, :9] % 9, graphs=graphs)
        results = [each.result() for each in pending[:3]]
        assert other.result().maps and len(captures) == 1
        with pytest.raises(kdx.KdxError, match="not finite in rows 3, 7"):
            pending[3].result()
        graphs.close()
        begin(features, target, table, graphs=graphs)
    assert len(captures) == 1
    for batch, result in zip(batches, results, strict=False):
        assert_close(result, measure(batch, target, table))


@pytest.mark.parametrize(
    ("text", "can_be_captured", "expected"),
    [(None, True, True), ("", True, True), ("0", True, False), (None, False, False), ("1", True, True)],
)
def test_graphs_are_captured_unless_they_are_turned_off(
    monkeypatch: pytest.MonkeyPatch, text: str | None, can_be_captured: bool, expected: bool
) -> None:
    monkeypatch.delenv("KDX_CUDA_GRAPHS", raising=False)
    if text is not None:
        monkeypatch.setenv("KDX_CUDA_GRAPHS", text)
    monkeypatch.setattr(layer_graphs, "CudaCapture", lambda device: captured)
    graphs, (features, target, table) = LayerGraphs(), inputs()
    with counted():
        monkeypatch.setattr(cuda.launcher(torch.device("cpu")), "can_be_captured", can_be_captured)
        for _ in range(2):
            begin(features, target, table, graphs=graphs)
    assert bool(graphs._captured) == expected


def test_large_features_and_launchers_without_graphs_are_not_captured() -> None:
    features, target, table = inputs()
    for graphs in (LayerGraphs(), LayerGraphs(captured)):
        with counted(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_graphs, "_BYTES", 1000)
            for _ in range(3):
                begin(features, target, table, graphs=graphs)
        assert not graphs._captured


@pytest.mark.parametrize("limit", ["memory", "graphs"])
def test_the_graphs_together_are_limited(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, target, table = inputs()
    few = {role: value[:9] for role, value in features.items()}
    graphs = LayerGraphs(captured)
    if limit == "memory":
        size = sum(tensor.nbytes for tensor in (*features.values(), table, target.distances.raw, target.values))
        monkeypatch.setattr(layer_graphs, "_memory", lambda device: layer_graphs._SHARE * size)
    else:
        monkeypatch.setattr(layer_graphs, "_GRAPHS", 1)
    with counted():
        for _ in range(3):
            begin(features, target, table, graphs=graphs)
            begin(few, inputs(9)[1], table[:, :9] % 9, graphs=graphs)
    assert len(graphs._captured) == 1


@pytest.mark.parametrize("place", ["inputs", "capture"])
def test_too_little_memory_for_a_graph_leaves_single_launches(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (features, target, table), attempts, empty_like = inputs(), list[str](), torch.empty_like

    def failing(*arguments: Any, **options: Any) -> Any:
        if place == "inputs" and attempts:
            return empty_like(*arguments, **options)
        attempts.append(place)
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = LayerGraphs(failing if place == "capture" else captured)
    with running():
        results = [begin(features, target, table, graphs=graphs).result()]
        if place == "inputs":
            monkeypatch.setattr(torch, "empty_like", failing)
        results += [begin(features, target, table, graphs=graphs).result() for _ in range(3)]
    assert attempts == [place] and not graphs._captured
    monkeypatch.undo()
    for result in results:
        assert_close(result, measure(features, target, table))


def test_another_failure_of_a_capture_is_an_error_with_its_reason() -> None:
    features, target, table = inputs()

    def failing(run: Callable[[], tuple[FusedMeasurement, Tensor]]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = LayerGraphs(failing)
    with counted():
        begin(features, target, table, graphs=graphs)
        with pytest.raises(kdx.KdxError, match="cannot be captured: operation not permitted") as error:
            begin(features, target, table, graphs=graphs)
    assert "KDX_CUDA_GRAPHS=0" in error.value.hint


def test_a_thread_captures_only_what_it_has_computed_before() -> None:
    """A thread's first products prepare cuBLAS, and the first batch of a shape copies constants; neither can be captured."""
    (features, target, table), captures = inputs(), []

    def counting(run: Callable[[], tuple[FusedMeasurement, Tensor]]) -> Any:
        captures.append(run)
        return captured(run)

    graphs = LayerGraphs(counting)
    with counted():
        begin(features, target, table, graphs=graphs)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(begin, features, target, table, graphs=graphs).result()
            assert not captures
            pool.submit(begin, features, target, table, graphs=graphs).result()
    assert len(captures) == 1


@pytest.mark.slow
def test_threads_share_graphs() -> None:
    """Without a lock, a thread would overwrite the inputs of another before they are used."""
    graphs, (features, target, table) = LayerGraphs(captured), inputs()
    batches = [{role: value.roll(shift, 1) * (shift + 1) for role, value in features.items()} for shift in range(6)]
    with running():
        for _ in range(2):
            begin(features, target, table, graphs=graphs)
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(lambda batch: begin(batch, target, table, graphs=graphs).result(), batches))
    for batch, result in zip(batches, results, strict=True):
        assert_close(result, measure(batch, target, table))
