"""When an exported file agrees with PyTorch, and when it does not."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

from kdx.choices import FilePrecision
from kdx.errors import KdxError
from kdx.explain.graph import explainer_graph
from kdx.export import onnx_file, parity
from kdx.export.description import Origin
from kdx.export.explainer_graphs import Graph
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.export.parity import Difference, ParityReport
from kdx.models.network import Network
from kdx.models.resnet import resnet

SIZE = (9, 7)
GOOD = Difference(1e-7, 1e-8, 1e-7, 1.0, 1.0)
Named = dict[str, NDArray[Any]]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return resnet(3, 1, 4, 2).eval()


def gradients(seed: int = 0) -> GradientGraph:
    return GradientGraph(network(seed), ["layer1", "layer2"])


def features(seed: int = 0) -> FeatureGraph:
    return FeatureGraph(network(seed), ["layer1"])


# ---- one output ----


def test_a_difference_is_relative_to_the_outputs_largest_value() -> None:
    generator = np.random.default_rng(0)
    expected = generator.normal(size=(3, 7, 5)).astype(np.float32)
    result = expected + np.float32(1e-3) * generator.normal(size=expected.shape).astype(np.float32)
    errors = sorted(
        abs(float(r) - float(e)) / max(abs(float(v)) for v in expected.flat) for r, e in zip(result.flat, expected.flat, strict=True)
    )
    difference = parity.difference(result, expected)
    assert difference.max == pytest.approx(errors[-1], rel=1e-9) and difference.mean == pytest.approx(math.fsum(errors) / 105, rel=1e-9)
    assert errors[101] <= difference.q99 <= errors[104] and difference.largest == float(np.abs(expected).max())
    scaled = parity.difference(4 * result, 4 * expected)
    assert scaled.max == pytest.approx(difference.max, rel=1e-12) and scaled.largest == 4 * difference.largest


def test_an_output_that_is_zero_in_both_agrees() -> None:
    assert parity.difference(np.zeros(4), np.zeros(4)) == Difference(0.0, 0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (np.ones((2, 3)), np.ones((3, 2))),
        (np.full(4, 2.0), np.zeros(4)),
        (np.array([1.0, math.nan]), np.array([1.0, 2.0])),
        (np.array([1.0, 2.0]), np.array([1.0, math.nan])),
        (np.array([1.0, math.inf]), np.array([1.0, 2.0])),
    ],
)
def test_different_shapes_nan_infinity_and_values_in_place_of_zeros_fail(result: np.ndarray, expected: np.ndarray) -> None:
    report = ParityReport({"good": Difference(0.0, 0.0, 0.0, 1.0, 1.0), "bad": parity.difference(result, expected)}, 1.0, (2,))
    assert not report
    assert "output bad" in report.worst() and report.as_dict()["passed"] is False


def test_a_report_is_true_if_every_output_is_within_the_tolerance() -> None:
    near, far = Difference(1e-4, 0.0, 0.0, 1.0, 1.0), Difference(1.01e-4, 0.0, 0.0, 1.0, 1.0)
    assert ParityReport({"a": near, "b": near}, 1e-4, (3,))
    assert not ParityReport({"a": near, "b": far, "c": near}, 1e-4, (3,))
    assert "output b" in ParityReport({"a": near, "b": far, "c": near}, 1e-4, (3,)).worst()


def test_without_onnx_runtime_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(KdxError) as caught:
        parity.compare(tmp_path / "m.onnx", features(), SIZE)
    assert "onnxruntime" in caught.value.problem and "kdx[cpu]" in caught.value.hint


# ---- a report ----


@pytest.mark.parametrize(
    ("difference", "agrees"),
    [
        (replace(GOOD, max=1e-4, smooth=None), True),
        (replace(GOOD, max=1.01e-4), False),
        (replace(GOOD, max=1e-5, cosine=0.1), True),  # every error is small: the cosine is that of a feature near zero
        (replace(GOOD, max=0.5, smooth=1e-4, kinked=2, cosine=0.9), True),
        (replace(GOOD, max=0.5, smooth=1e-4, kinked=2, cosine=0.89), False),
        (replace(GOOD, max=0.5, smooth=1.01e-4, kinked=2, cosine=0.99), False),
        (replace(GOOD, max=0.5, smooth=math.inf, kinked=6, cosine=1.0), False),
        (replace(GOOD, max=0.5, smooth=1e-5, kinked=0, cosine=0.5), True),
        (Difference(math.inf, math.inf, math.inf, 1.0, math.nan, 2, 1e-5), False),
    ],
)
def test_float32_errors_are_within_the_tolerance_except_where_a_derivative_jumps(difference: Difference, agrees: bool) -> None:
    report = ParityReport({"a": GOOD, "gradient/a": difference}, 1e-4, (6, 7))
    assert bool(report) is agrees and report.as_dict()["passed"] is agrees
    assert report.failures() == (() if agrees else ("gradient/a",))
    if difference.kinked:
        assert f"except {difference.kinked} images" in report.summary()


@pytest.mark.parametrize(
    ("difference", "judged", "reported"),
    [
        (replace(GOOD, max=0.3, cosine=0.9), True, True),
        (replace(GOOD, max=0.3, cosine=0.89), False, True),
        (replace(GOOD, max=math.inf, cosine=math.nan), False, False),
        (replace(GOOD, max=math.nan, cosine=0.99), False, False),
    ],
)
def test_half_precision_needs_a_cosine_and_reported_outputs_must_be_finite(difference: Difference, judged: bool, reported: bool) -> None:
    report = ParityReport({"a": GOOD, "b": difference}, None, (6, 7))
    assert bool(report) is judged and "cosine with float32" in report.summary()
    assert bool(replace(report, reported=("b",))) is reported
    if not judged:
        assert "output b has a cosine of" in report.worst()


# ---- a comparison ----


class Session:
    """A session whose outputs are PyTorch's, changed by ``change``."""

    def __init__(self, graph: Graph, change: Callable[[Named], None]) -> None:
        self.graph, self.change, self.calls = graph, change, 0

    def run(self, _: None, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        self.calls += 1
        with torch.no_grad():
            results = self.graph(*(torch.from_numpy(feeds[name]) for name in self.graph.input_names))
        named = {name: result.numpy().copy() for name, result in zip(self.graph.output_names, results, strict=True)}
        self.change(named)
        return list(named.values())


def compared(
    monkeypatch: pytest.MonkeyPatch, graph: Graph, change: Callable[[Named], None], tolerance: float | None = 1e-4
) -> ParityReport:
    monkeypatch.setattr(parity, "_session", lambda _: Session(graph, change))
    return parity.compare(Path("m.onnx"), graph, SIZE, tolerance)


def nothing(named: Named) -> None:
    pass


def noisy(values: NDArray[Any], share: float) -> NDArray[Any]:
    noise = np.random.default_rng(0).normal(size=values.shape)
    result: NDArray[Any] = (values + share * np.abs(values).max() * noise).astype(np.float32)
    return result


def test_equal_outputs_agree_and_no_image_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    report = compared(monkeypatch, gradients(), nothing)
    assert report and report.batches == (6, 7) and report.reported == ()
    assert set(report.outputs) == {"logits", "layer1", "layer2", "gradient/layer1", "gradient/layer2"}
    for name, difference in report.outputs.items():
        assert (difference.max, difference.kinked, difference.smooth) == (
            0.0,
            0,
            0.0 if "gradient" in name else None,
        ) and difference.cosine > 0.999999


def test_a_gradient_with_an_error_of_one_percent_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(named: Named) -> None:
        named["gradient/layer1"] *= 1.01

    report = compared(monkeypatch, gradients(), change)
    assert not report and report.failures() == ("gradient/layer1",) and "gradient/layer1 differs by 1.0e-02" in report.worst()


def test_images_where_a_derivative_jumps_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(named: Named) -> None:
        named["gradient/layer1"][[0, 3]] = noisy(named["gradient/layer1"][[0, 3]], 0.01)

    report = compared(monkeypatch, gradients(), change)
    difference = report.outputs["gradient/layer1"]
    assert report and (difference.kinked, difference.smooth) == (4, 0.0) and difference.max > 1e-3 and difference.cosine < 1
    assert report.outputs["gradient/layer2"].kinked == 0 and "except 4 images" in report.summary()


def test_an_image_with_the_opposite_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(named: Named) -> None:
        named["gradient/layer2"][1] *= -1

    report = compared(monkeypatch, gradients(), change)
    assert not report and report.failures() == ("gradient/layer2",)
    assert report.outputs["gradient/layer2"].cosine == pytest.approx(-1)


def test_features_and_logits_must_agree_in_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(named: Named) -> None:
        named["layer1"][0] = noisy(named["layer1"][0], 0.001)
        named["logits"][0] += 0.001 * np.abs(named["logits"]).max()

    assert compared(monkeypatch, gradients(), change).failures() == ("logits", "layer1")


def test_other_images_are_compared_if_a_derivative_jumps_in_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def change(named: Named) -> None:
        calls.append(len(named["logits"]))
        if len(calls) in (1, 2):
            named["gradient/layer1"] = noisy(named["gradient/layer1"], 0.01)

    assert compared(monkeypatch, gradients(), change)
    assert calls == [6, 6, 6, 7]
    calls.clear()

    def always(named: Named) -> None:
        calls.append(len(named["logits"]))
        named["gradient/layer1"] = noisy(named["gradient/layer1"], 0.01)

    assert not compared(monkeypatch, gradients(), always)
    assert calls == [6] * 4 + [7] * 4


def test_agreement_with_pytorch_in_float64_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = parity._eager

    def jumping(graph: Graph, feeds: Mapping[str, Tensor]) -> Named:
        outputs = eager(graph, feeds)
        if feeds["images"].dtype == torch.float32:
            outputs["gradient/layer1"] = noisy(outputs["gradient/layer1"], 0.01)
        return outputs

    monkeypatch.setattr(parity, "_eager", jumping)
    report = compared(monkeypatch, gradients(), nothing)
    assert report and report.outputs["gradient/layer1"].kinked == 0 and report.outputs["gradient/layer1"].max > 1e-3


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_gradient_that_does_not_change_is_an_error(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    def change(named: Named) -> None:
        named["gradient/layer1"][:] = value

    with pytest.raises(KdxError, match="gradient/layer1 does not change with its inputs"):
        compared(monkeypatch, gradients(), change)


def test_in_half_precision_rounding_passes_and_another_network_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounding(named: Named) -> None:
        for name, values in named.items():
            named[name] = values.astype(np.float16).astype(np.float32)

    report = compared(monkeypatch, gradients(), rounding, None)
    assert report and report.tolerance is None and 0 < max(difference.max for difference in report.outputs.values()) < 1e-2

    def foreign(named: Named) -> None:
        named["layer1"] = np.roll(named["layer1"], 1, axis=1)

    assert compared(monkeypatch, features(), foreign, None).failures() == ("layer1",)


def test_only_the_logits_of_a_half_precision_explainer_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = {role: Network(role, network(seed), Preprocessing()) for seed, role in enumerate(("student", "base"))}
    graph = explainer_graph(networks, {"layer2": "layer2"})

    def change(named: Named) -> None:
        for name in named:
            if not name.startswith("logits"):
                named[name] = -named[name]

    report = compared(monkeypatch, graph, change, None)
    assert report and report.reported == graph.output_names[2:] and report.as_dict()["reported"] == list(graph.output_names[2:])

    def broken(named: Named) -> None:
        named["layer2/scores"][0] = np.nan

    assert compared(monkeypatch, graph, broken, None).failures() == ("layer2/scores",)
    assert set(compared(monkeypatch, graph, change).failures()) >= {"layer2/distances", "layer2/scores"}


@pytest.mark.parametrize(("error", "agrees"), [(5e-5, True), (3e-4, False)])
def test_scaled_maps_may_differ_by_what_scaling_makes_of_the_error_of_a_map(
    error: float, agrees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = {role: Network(role, network(seed), Preprocessing()) for seed, role in enumerate(("student", "base"))}
    graph, name = explainer_graph(networks, {"layer2": "layer2"}), "layer2/distilled/scaled"
    amplified = []

    def change(named: Named) -> None:
        maps = named["layer2/distilled/maps"]
        ranges = np.ptp(maps, axis=(1, 2))
        weakest = min(np.flatnonzero(ranges), key=lambda image: ranges[image])
        amplified.append(maps.max() / ranges[weakest])
        named[name][weakest] += error * amplified[-1]

    report = compared(monkeypatch, graph, change)
    assert min(amplified) > 1.5  # an error that is seen because the image's map is weak
    assert report.failures() == (() if agrees else (name,))


def test_a_file_that_does_not_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(_: Named) -> None:
        raise RuntimeError("a\nshape")

    with pytest.raises(KdxError, match="ONNX Runtime cannot run the exported file on 6 images: a shape"):
        compared(monkeypatch, features(), change)


# ---- files ----


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gradients") / "net.onnx"
    onnx_file.write(gradients(), path, origin=Origin("a:b", ""), image_size=SIZE)
    return path


def rewired(file: Path, output: str, nodes: Callable[[str], list[onnx.NodeProto]], out: Path, **weights: NDArray[Any]) -> Path:
    """A copy of ``file`` in which these nodes compute ``output`` from its earlier value, whose name is their argument."""
    model = onnx.load(file)
    before = f"{output}.before"
    for node in model.graph.node:
        node.output[:] = [before if name == output else name for name in node.output]
        node.input[:] = [before if name == output else name for name in node.input]
    model.graph.node.extend(nodes(before))
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(model, out)
    return out


@pytest.mark.slow
def test_a_file_agrees_with_its_graph_and_no_other(file: Path) -> None:
    assert parity.compare(file, gradients(), SIZE)
    report = parity.compare(file, gradients(1), SIZE)
    assert not report and set(report.failures()) == set(gradients().output_names)


@pytest.mark.slow
def test_a_file_with_a_constant_gradient_is_an_error(file: Path, tmp_path: Path) -> None:
    value = numpy_helper.from_array(np.array([0.3], np.float32))
    path = rewired(
        file,
        "gradient/layer1",
        lambda before: [
            helper.make_node("Shape", [before], ["shape"]),
            helper.make_node("ConstantOfShape", ["shape"], ["gradient/layer1"], value=value),
        ],
        tmp_path / "constant.onnx",
    )
    with pytest.raises(KdxError, match="gradient/layer1 does not change with its inputs"):
        parity.compare(path, gradients(), SIZE)


def test_a_file_with_a_gradient_error_of_one_percent_fails(file: Path, tmp_path: Path) -> None:
    path = rewired(
        file,
        "gradient/layer2",
        lambda before: [helper.make_node("Mul", [before, "more"], ["gradient/layer2"])],
        tmp_path / "more.onnx",
        more=np.array(1.01, np.float32),
    )
    assert parity.compare(path, gradients(), SIZE).failures() == ("gradient/layer2",)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_half_precision_file_differs_from_that_of_another_network(precision: FilePrecision, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    report = onnx_file.write(features(), path, origin=Origin("a:b", ""), image_size=SIZE, precision=precision)
    assert report.tolerance is None and min(difference.cosine for difference in report.outputs.values()) > 0.999
    assert max(difference.max for difference in report.outputs.values()) > 1e-5  # it was rounded
    other = parity.compare(path, features(1), SIZE, None)
    assert not other and "has a cosine of" in other.worst()
    assert parity.compare(path, features(), SIZE).failures()  # the tolerance of float32 does not apply to it
