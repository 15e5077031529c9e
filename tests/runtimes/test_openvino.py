"""The runtime openvino: every kind of file against PyTorch and ONNX Runtime, and the error of bfloat16."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from kdx import Explainer, KdxError
from kdx.explain.graph import explainer_graph
from kdx.explain.results import Explanation
from kdx.export import onnx_file, parity
from kdx.export.description import Origin, describe
from kdx.export.explainer_graphs import Graph
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.models.network import Network
from kdx.models.resnet import resnet
from kdx.runs.run import RunOptions, _recorded_options
from kdx.runtimes import openvino
from kdx.runtimes.choice import Choice, open_file
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from kdx.runtimes.openvino import OpenVinoRunner

pytest.importorskip("openvino")

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""Relative to an output's largest value: float32 sums in another order."""

MAPS_AGREE = 1e-4
"""Relative to an output's largest value: a residual is a small difference of large values."""

ROUNDED = 0.05
"""Relative to a feature's largest value: a rounding of 2**-9 at each of about ten operators."""

ROUNDED_MAPS = 0.02, 0.99
"""The largest mean absolute difference of a layer's scaled maps, which are in [0, 1], and their smallest correlation."""

OWN = Preprocessing((24, 20), (0.4, 0.5, 0.3), (0.2, 0.3, 0.25))
LAYERS = {"layer1": "layer1", "layer2": "layer2"}

pytestmark = pytest.mark.slow
"""Exporting the files takes half a minute."""

needs_bfloat16 = pytest.mark.skipif(not openvino.has_bfloat16(), reason="this CPU does not compute in bfloat16")


def network(seed: int, width: int = 8) -> Network:
    torch.manual_seed(seed)
    module = resnet(width, 1, 5, 2)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):  # with the initial statistics a missing norm would go unnoticed
            part.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return Network(f"small@{seed}", module.eval(), OWN)


@pytest.fixture(scope="module")
def networks() -> dict[str, Network]:
    return {"student": network(0), "base": network(1), "teacher": network(2, 12)}


@pytest.fixture(scope="module")
def files(networks: dict[str, Network], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("files")
    student = networks["student"]
    graphs: dict[str, Graph] = {
        "features": FeatureGraph(student.module, list(LAYERS), OWN),
        "gradients": GradientGraph(student.module, list(LAYERS), OWN),
        "cotangent": GradientGraph(student.module, ["layer1"], OWN, "layer2"),
        "explainer": explainer_graph({role: networks[role] for role in ("student", "base")}, {"layer2": "layer2"}),
    }
    for name, graph in graphs.items():
        origin = {role: Origin(role, "abc") for role in (("student", "base") if name == "explainer" else ("network",))}
        # Untrained networks' maps are faint, and an image's own largest value divides them.
        tolerance = 1e-3 if name == "explainer" else parity.TOLERANCE
        onnx_file.write(graph, folder / f"{name}.onnx", origin=origin, image_size=(24, 20), tolerance=tolerance)
    return {name: folder / f"{name}.onnx" for name in graphs}


def images(n: int) -> Tensor:
    """Images of four classes of coarse patterns, each with its own noise."""
    generator = torch.Generator().manual_seed(n)
    coarse = torch.rand(4, 3, 5, 4, generator=generator)[torch.arange(n) % 4]
    return nn.functional.interpolate(coarse, (31, 27), mode="bilinear") * 0.6 + 0.4 * torch.rand(n, 3, 31, 27, generator=generator)


def fed(kind: str, n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    more = {
        "gradients": {"cotangent": torch.eye(5)[torch.arange(n) % 5]},
        "cotangent": {"cotangent": torch.randn(n, 16, 12, 10, generator=generator)},
        "explainer": {"target": torch.eye(4)[torch.arange(n) % 4]},
    }
    return {"images": images(n), **more.get(kind, {})}


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float32
    return float((actual - expected).abs().max() / expected.abs().max())


# ---- the kinds of file ----


@pytest.mark.parametrize("kind", ["features", "gradients", "cotangent"])
@pytest.mark.parametrize("n", [1, 5, 8])
def test_a_file_gives_what_pytorch_gives(kind: str, n: int, files: dict[str, Path], networks: dict[str, Network]) -> None:
    module = networks["student"].module
    at = "layer2" if kind == "cotangent" else None
    layers = ["layer1"] if at else list(LAYERS)
    graph = FeatureGraph(module, layers, OWN) if kind == "features" else GradientGraph(module, layers, OWN, at)
    feeds = fed(kind, n)
    expected = EagerRunner(graph, CPU).run(feeds)
    with OpenVinoRunner(files[kind]) as runner:
        actual = runner.run(feeds)
        assert (runner.kind, runner.layers, runner.device) == (graph.kind, tuple(layers), CPU)
    assert list(actual) == list(expected)
    for name, values in expected.items():
        assert error(actual[name], values) <= TOLERANCE, name


def test_an_explainer_file_gives_what_onnx_runtime_gives(files: dict[str, Path]) -> None:
    feeds = fed("explainer", 16)
    with OnnxRuntimeRunner(files["explainer"]) as ort, OpenVinoRunner(files["explainer"]) as runner:
        expected, actual = ort.run(feeds), runner.run(feeds)
    assert list(actual) == list(expected) and len(actual) == 15
    for name, values in expected.items():
        if not name.endswith("/scaled"):  # divided by an image's own largest value, which may be small
            assert error(actual[name], values) <= MAPS_AGREE, name


def test_layers_that_share_a_tensor_are_written_separately(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 7 * 9, 5)).eval()
    graph = FeatureGraph(module, ["0", "1", "2"], Preprocessing())
    onnx_file.write(graph, tmp_path / "a.onnx", origin=Origin("a", "b"), image_size=(9, 11))
    pixels = images(3)[:, :, :9, :11]
    actual, expected = OpenVinoRunner(tmp_path / "a.onnx").infer(pixels), EagerRunner(graph, CPU).infer(pixels)
    for layer in graph.layers:
        assert error(actual.features[layer], expected.features[layer]) <= TOLERANCE
    actual.features["1"].zero_()
    assert actual.features["2"].any(), "the results share no memory"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_files_in_half_precision_run(precision: Any, networks: dict[str, Network], tmp_path: Path) -> None:
    graph = FeatureGraph(networks["student"].module, ["layer2"], OWN)
    onnx_file.write(graph, tmp_path / "a.onnx", origin=Origin("a", "b"), image_size=(24, 20), precision=precision)
    actual, expected = OpenVinoRunner(tmp_path / "a.onnx").infer(images(4)), EagerRunner(graph, CPU).infer(images(4))
    assert 0 < error(actual.features["layer2"], expected.features["layer2"]) <= {"fp16": ROUNDED / 8, "bf16": ROUNDED}[precision]


# ---- what it refuses ----


def test_a_graph_that_differs_from_its_description_is_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    def described(**entries: object) -> Path:
        model = onnx.load(files["features"])
        for entry in model.metadata_props:
            name = entry.key.removeprefix("kdx.")
            entry.value = json.dumps(entries.get(name, json.loads(entry.value)))
        onnx.save(model, tmp_path / "a.onnx")
        return tmp_path / "a.onnx"

    outputs = {name: list(shape) for name, shape in describe(files["features"]).outputs.items()}
    assert OpenVinoRunner(described(outputs=outputs)).infer(images(2)).logits.shape == (2, 5)
    for wrong in ({**outputs, "layer9": ["batch", 5]}, {**outputs, "logits": ["batch", 6]}, {**outputs, "logits": ["batch", 5, 1]}):
        with pytest.raises(KdxError, match=r"does not have the logits, layer1, layer2.* of its description"):
            OpenVinoRunner(described(outputs=wrong))
    with pytest.raises(KdxError, match="does not have the pixels of its description"):
        OpenVinoRunner(described(inputs={"pixels": ["batch", 3, "height", "width"]}))


def test_a_file_that_openvino_cannot_load_is_an_error_with_its_message(files: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(files["features"])
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weight.dims[1] += 1
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(KdxError, match=r"OpenVINO cannot load .*a\.onnx: .*(does not|doesn't) match") as caught:
        OpenVinoRunner(tmp_path / "a.onnx")
    assert "Exception from" not in caught.value.problem


def test_without_the_package_a_file_cannot_be_opened(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(KdxError, match="The runtime openvino needs the package openvino") as caught:
        OpenVinoRunner(files["features"])
    assert "kdx[openvino]" in caught.value.hint


def test_bfloat16_on_a_cpu_without_it_is_an_error(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "has_bfloat16", lambda: False)
    with pytest.raises(KdxError, match="This CPU does not compute in bfloat16"):
        OpenVinoRunner(files["features"], precision="bfloat16")
    OpenVinoRunner(files["features"])


def test_bfloat16_would_round_an_explainer_files_geometry(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "has_bfloat16", lambda: True)
    with pytest.raises(KdxError, match="which bfloat16 would round too"):
        OpenVinoRunner(files["explainer"], precision="bfloat16")
    with pytest.raises(KdxError, match="which bfloat16 would round too"):
        Explainer(file=files["explainer"], runtime="openvino", precision="bfloat16")


# ---- the explainer ----


def explained(**settings: Any) -> Explanation[Any]:
    with Explainer(**{"layers": LAYERS, "permutations": 9, **settings}) as explainer:
        return explainer(images(32), torch.arange(32) % 4)


def test_the_explainer_gives_the_same_results_in_openvino(networks: dict[str, Network], files: dict[str, Path], tmp_path: Path) -> None:
    expected = explained(**networks, runtime="eager")
    by_networks = explained(**networks, runtime="openvino", folder=tmp_path, chunk=5)
    assert sorted(path.stem.partition("-")[0] for path in tmp_path.glob("*.onnx")) == ["base", "student", "teacher"]
    by_file = explained(file=files["explainer"], layers=["layer2"], runtime="openvino")
    trio, pair = ("distilled", "residual", "missed", "new"), ("distilled", "residual")
    for actual, layers, maps in ((by_networks, LAYERS, trio), (by_file, ["layer2"], pair)):
        assert list(actual.layers) == list(layers)
        for layer in layers:
            ours, theirs = actual.layers[layer], expected.layers[layer]
            assert tuple(ours.unicam) == maps
            for name in maps:
                assert error(ours.unicam[name].maps, theirs.unicam[name].maps) <= MAPS_AGREE
            for name, score in ours.scores.items():
                assert score.value == pytest.approx(theirs.scores[name].value, abs=1e-5)


# ---- bfloat16 ----


@needs_bfloat16
def test_bfloat16_is_used_only_on_request(files: dict[str, Path]) -> None:
    expected = OnnxRuntimeRunner(files["features"]).infer(images(9))
    for precision in ("float32", "bfloat16"):
        with open_file(files["features"], Choice("openvino", CPU, "", precision)) as runner:
            actual = runner.infer(images(9))
        for layer, values in expected.features.items():
            cost = error(actual.features[layer], values)
            assert cost <= TOLERANCE if precision == "float32" else 100 * TOLERANCE < cost <= ROUNDED


@needs_bfloat16
def test_maps_and_scores_of_bfloat16_features_agree(networks: dict[str, Network], tmp_path: Path) -> None:
    exact = explained(**networks, runtime="openvino", folder=tmp_path)
    rounded = explained(**networks, runtime="openvino", folder=tmp_path, precision="bfloat16")
    most, least = ROUNDED_MAPS
    for layer in LAYERS:
        ours, theirs = rounded.layers[layer], exact.layers[layer]
        for name in theirs.unicam:
            actual, expected = (result.unicam[name].scaled((31, 27)).flatten() for result in (ours, theirs))
            assert 0 < float((actual - expected).abs().mean()) <= most, (layer, name)
            assert float(np.corrcoef(actual, expected)[0, 1]) >= least, (layer, name)
        for name, score in theirs.scores.items():
            assert ours.scores[name].value == pytest.approx(score.value, abs=5e-3), (layer, name)


def test_a_runs_configuration_records_bfloat16_and_omits_float32() -> None:
    assert "precision" not in _recorded_options(RunOptions())
    assert _recorded_options(RunOptions(precision="bfloat16")) == {**_recorded_options(RunOptions()), "precision": "bfloat16"}
