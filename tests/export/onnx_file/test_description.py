"""The descriptions of exported files."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from kdx.errors import KdxError
from kdx.export import description
from kdx.export.description import Description, NetworkDescription, describe, is_export_of
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.models.network import weights_hash
from tests.command_line import left_in
from tests.export.onnx_file.networks import (
    PREPROCESSING,
    TOLERANCE,
    Exported,
)


def test_a_file_describes_itself(resizing: Exported, fixed: Exported) -> None:
    description = describe(resizing.path)
    network = resizing.graph.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    layers = ("layer3", "layer1.0.conv2")
    assert description == Description(
        kind="features",
        networks={"network": NetworkDescription("a:network", weights_hash(network), parameters, PREPROCESSING, layers)},
        classes=("zero", "één", "<b>"),
        precision="fp32",
        at=None,
        scores=(),
        image_size=None,
        inputs={"images": ("batch", 3, "height", "width")},
        outputs={"logits": ("batch", 5), "layer3": ("batch", 16, 4, 4), "layer1.0.conv2": ("batch", 4, 15, 13)},
        versions=description.versions,
    )
    assert description.layers == layers
    assert description.versions["torch"] == version("torch") and set(description.versions) == {"kdx", "torch", "onnx", "onnxscript"}
    assert describe(fixed.path).image_size == (12, 12)
    assert describe(fixed.path).networks["network"].preprocessing == Preprocessing()
    model = onnx.load(resizing.path)
    assert [output.name for output in model.graph.output] == ["logits", "layer3", "layer1.0.conv2"]
    assert [entry.name for entry in model.graph.input] == ["images"]


def test_the_parity_report_is_returned_and_is_in_the_file_and_beside_it(resizing: Exported) -> None:
    report = resizing.report
    assert report and report.summary() and set(report.outputs) == {"logits", "layer3", "layer1.0.conv2"}
    assert all(d.mean <= d.max <= TOLERANCE and d.q99 <= d.max and d.largest > 0 for d in report.outputs.values())
    beside = json.loads(resizing.path.with_name(f"{resizing.path.name}.parity.json").read_text())
    inside = {entry.key: entry.value for entry in onnx.load(resizing.path).metadata_props}["kdx.parity"]
    assert beside == json.loads(inside) == report.as_dict() and beside["passed"] is True
    assert left_in(resizing.path.parent) == [resizing.path.name, f"{resizing.path.name}.parity.json"]


def test_a_file_is_the_export_of_its_graph_only(resizing: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, path = resizing.graph, resizing.path
    weights = weights_hash(graph.network)
    assert is_export_of(path, graph, weights)
    changed = copy.deepcopy(graph.network)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    assert not is_export_of(path, graph, weights_hash(changed))
    assert not is_export_of(path, FeatureGraph(graph.network, ["layer3"], PREPROCESSING), weights)
    assert not is_export_of(path, FeatureGraph(graph.network, ["layer1.0.conv2", "layer3"], PREPROCESSING), weights)
    assert not is_export_of(path, FeatureGraph(graph.network, graph.layers, Preprocessing((15, 13))), weights)
    assert not is_export_of(path.with_name("none.onnx"), graph, weights)
    monkeypatch.setattr(description, "versions", lambda: {"kdx": "0.0"})
    assert not is_export_of(path, graph, weights)


def test_a_damaged_file_is_an_error_and_not_an_export_of_its_graph(resizing: Exported, tmp_path: Path) -> None:
    content = resizing.path.read_bytes()
    path = tmp_path / "damaged.onnx"
    for damaged in (content[:-17], content[: len(content) // 2], content[:5], b"", b"PK\x03\x04 not a protobuf at all", b"\x00" * 99):
        path.write_bytes(damaged)
        with pytest.raises(KdxError) as caught:
            describe(path)
        assert "damaged.onnx" in caught.value.problem and "kdx export" in caught.value.hint
        assert not is_export_of(path, resizing.graph, weights_hash(resizing.graph.network))


def test_another_programs_file_and_a_missing_file_have_different_errors(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "foreign.onnx")
    with pytest.raises(KdxError, match="was not written by this version of kdx"):
        describe(tmp_path / "foreign.onnx")
    with pytest.raises(KdxError, match="There is no file"):
        describe(tmp_path / "absent.onnx")
    with pytest.raises(KdxError, match="not a readable ONNX file"):
        describe(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("at", [None, "layer2"])
def test_a_gradients_file_describes_its_cotangent(differentiated: Any, at: str | None) -> None:
    path, _ = differentiated(at)
    description = describe(path)
    assert (description.kind, description.at, description.layers, description.image_size) == ("gradients", at, ("layer1", "conv1"), None)
    assert description.inputs["cotangent"] == (("batch", 5) if at is None else ("batch", 8, 8, 7))
    assert description.outputs["gradient/layer1"] == description.outputs["layer1"] == ("batch", 4, 15, 13)
