"""Files in half precision, and weights beside the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from kdx.errors import KdxError
from kdx.export import engine, onnx_file
from kdx.export.description import Origin, describe, is_export_of
from kdx.export.graphs import FeatureGraph
from kdx.export.parity import ParityReport
from kdx.models.resnet import resnet
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from tests.command_line import left_in
from tests.export.onnx_file.networks import (
    PREPROCESSING,
    Exported,
    assert_agrees,
    assert_portable,
)

HALF: dict[str, int] = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


class Files(dict[str, Exported]):
    """The files of one network by precision. A file is exported when it is first needed."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(5)
        self.folder = folder
        self.graph = FeatureGraph(resnet(24, 1, 5, 2).eval(), ["layer2"], PREPROCESSING)

    def __missing__(self, precision: Any) -> Exported:
        path = self.folder / precision / "net.onnx"
        report = onnx_file.write(self.graph, path, origin=Origin("a:b", ""), image_size=(15, 13), precision=precision)
        self[precision] = Exported(path, self.graph, report)
        return self[precision]


@pytest.fixture(scope="session")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("halves"))


PRECISIONS = pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])


@pytest.mark.slow
@PRECISIONS
def test_a_half_precision_file_has_half_precision_weights(halves: Files, precision: str) -> None:
    path = halves[precision].path
    assert 0.45 < path.stat().st_size / halves["fp32"].path.stat().st_size < 0.6
    model = onnx.load(path)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            assert {types[name] for name in node.input if name in types} == {HALF[precision]}
    large = {tensor.data_type for tensor in model.graph.initializer if np.prod(tensor.dims) > 8}
    assert large == {HALF[precision]}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    description = describe(path)
    assert description.precision == precision and description.outputs == describe(halves["fp32"].path).outputs
    assert not is_export_of(path, halves[precision].graph, "")


@pytest.mark.slow
def test_float16_runs_on_the_cpu(halves: Files) -> None:
    images = torch.rand(3, 3, 20, 11, generator=torch.Generator().manual_seed(0))
    with OnnxRuntimeRunner(halves["fp16"].path) as runner, OnnxRuntimeRunner(halves["fp32"].path) as exact:
        outputs, expected = runner.infer(images), exact.infer(images)
    assert outputs.features["layer2"].dtype == torch.float32
    for ours, theirs in ((outputs.logits, expected.logits), (outputs.features["layer2"], expected.features["layer2"])):
        assert 0 < float((ours - theirs).abs().max()) <= 1e-2 * float(theirs.abs().max())


@pytest.mark.slow
def test_bfloat16_on_the_cpu_is_an_error(halves: Files) -> None:
    with pytest.raises(KdxError) as caught:
        OnnxRuntimeRunner(halves["bf16"].path).infer(torch.rand(3, 3, 20, 11))
    assert "ONNX Runtime cannot" in caught.value.problem and caught.value.hint


@PRECISIONS
def test_the_cost_of_half_precision_is_in_its_report(halves: Files, precision: str) -> None:
    report = halves[precision].report
    step = {"fp16": 2**-11, "bf16": 2**-8}[precision]
    for difference in report.outputs.values():
        assert step / 16 < difference.max < 30 * step and difference.cosine > 0.999
    assert report and report.tolerance is None and report.as_dict()["tolerance"] is None


@pytest.mark.slow
def test_weights_over_the_limit_are_written_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    graph = FeatureGraph(resnet(8, 1, 5, 2).eval(), ["layer2"])
    path, beside = tmp_path / "net.onnx", tmp_path / "net.onnx.data"

    def write() -> None:
        onnx_file.write(graph, path, origin=Origin("a:network", "w"), image_size=(12, 10))

    write()
    whole = path.read_bytes()
    assert left_in(tmp_path) == ["net.onnx", "net.onnx.parity.json"]
    monkeypatch.setattr(onnx_file, "_LARGEST", 1000)
    write()
    assert left_in(tmp_path) == ["net.onnx", "net.onnx.data", "net.onnx.parity.json"]
    assert path.stat().st_size < len(whole) / 2 < beside.stat().st_size
    assert_portable(path.read_bytes(), tmp_path)
    first = path.read_bytes(), beside.read_bytes()
    write()  # onnx's own writer would append
    assert (path.read_bytes(), beside.read_bytes()) == first
    assert describe(path).networks["network"].weights == "w"
    assert_agrees(Exported(path, graph, ParityReport({}, None, ())), torch.rand(3, 3, 12, 10))
    pytest.importorskip("tensorrt_rtx")
    engine.build(path, tmp_path / "net.engine", batch=(1, 2, 3), arch="sm_86")
    before = engine.describe(tmp_path / "net.engine").onnx_sha256
    beside.write_bytes(b"\0" + beside.read_bytes()[1:])
    assert engine._digest(path, onnx.load(path, load_external_data=False)) != before
    monkeypatch.undo()
    write()
    assert left_in(tmp_path) == ["net.engine", "net.engine.json", "net.onnx", "net.onnx.parity.json"]
    assert path.read_bytes() == whole
