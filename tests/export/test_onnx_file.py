"""Exported files against PyTorch at sizes they were not traced with; what they say of themselves; what is never left behind."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import logging
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from kdx.errors import KdxError
from kdx.export import description, engine, onnx_file, parity
from kdx.export.description import Description, NetworkDescription, Origin, describe, holds
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.export.parity import Difference, ParityReport
from kdx.models.network import weights_hash
from kdx.models.resnet import resnet
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from tests.command_line import left_in

TOLERANCE = 1e-5
"""Of an output's largest value: float32 sums in another order, through at most seven convolutions."""

PREPROCESSING = Preprocessing((15, 13), (0.4, 0.5, 0.3), (0.2, 0.3, 0.25))


class Plain(nn.Module):
    """One convolution, quick to export; ``last`` is applied to the logits."""

    def __init__(self, last: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)
        self.last = last

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(images).mean((2, 3)))
        return self.last(logits)


class Transformer(nn.Module):
    """A class token and 3 x 3 patches of an image of 12 x 12, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 10, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.position
        logits: Tensor = self.fc(self.block(tokens)[:, 0])
        return logits


class Branching(nn.Module):
    """Its forward pass depends on the pixels' values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.conv(images).mean((2, 3))
        return logits if images.mean() > 0.5 else -logits


class FixedBatch(Plain):
    """``len`` gives the tracer a number, and with it the batch size of the trace."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).reshape(len(images), 5)


@dataclasses.dataclass(frozen=True)
class Exported:
    path: Path
    graph: FeatureGraph
    report: ParityReport


def export(folder: Path, network: nn.Module, layers: list[str], preprocessing: Preprocessing, size: tuple[int, int]) -> Exported:
    graph = FeatureGraph(network.eval(), layers, preprocessing)
    path = folder / "sub" / f"{type(network).__name__}.onnx"
    report = onnx_file.write(
        graph, path, origin=Origin("a:network", weights_hash(network)), image_size=size, classes=("zero", "één", "<b>")
    )
    return Exported(path, graph, report)


@pytest.fixture(scope="session")
def resizing(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    return export(tmp_path_factory.mktemp("resizing"), resnet(4, 1, 5), ["layer3", "layer1.0.conv2"], PREPROCESSING, (15, 13))


@pytest.fixture(scope="session")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(1)
    return export(tmp_path_factory.mktemp("fixed"), Transformer(), ["block", "patch"], Preprocessing(), (12, 12))


def assert_agrees(exported: Exported, images: Tensor) -> None:
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = exported.graph(images)
    assert len(found) == len(expected) == 1 + len(exported.graph.layers)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == tuple(theirs.shape)
        assert np.abs(ours - theirs.numpy()).max() <= TOLERANCE * float(theirs.abs().max())


# ---- a file is its network ----


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("size", [(15, 13), (31, 9), (8, 8), (3, 1)])
def test_a_resizing_file_is_its_network_at_any_batch_and_image_size(resizing: Exported, n: int, size: tuple[int, int]) -> None:
    assert_agrees(resizing, torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(n)))


@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_transformers_file_is_its_network_at_any_batch_size(fixed: Exported, n: int) -> None:
    assert_agrees(fixed, torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(n)))


def test_tokens_are_a_grid_in_the_file_too(fixed: Exported) -> None:
    block, patch = onnx.load(fixed.path).graph.output[1:]
    for output in (block, patch):
        assert [dim.dim_value for dim in output.type.tensor_type.shape.dim][1:] == [8, 3, 3]


def test_exporting_leaves_the_networks_weights_and_gradients_alone(resizing: Exported) -> None:
    torch.manual_seed(0)
    assert weights_hash(resizing.graph.network) == weights_hash(resnet(4, 1, 5))
    assert all(parameter.requires_grad for parameter in resizing.graph.parameters())
    assert not any(module._forward_hooks for module in resizing.graph.modules())


# ---- what a file says of itself ----


def test_a_file_says_what_was_written(resizing: Exported, fixed: Exported) -> None:
    found = describe(resizing.path)
    network = resizing.graph.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    layers = ("layer3", "layer1.0.conv2")
    assert found == Description(
        kind="features",
        networks={"network": NetworkDescription("a:network", weights_hash(network), parameters, PREPROCESSING, layers)},
        classes=("zero", "één", "<b>"),
        precision="fp32",
        at=None,
        scores=(),
        image_size=None,
        inputs={"images": ("batch", 3, "height", "width")},
        outputs={"logits": ("batch", 5), "layer3": ("batch", 16, 4, 4), "layer1.0.conv2": ("batch", 4, 15, 13)},
        versions=found.versions,
    )
    assert found.layers == layers
    assert found.versions["torch"] == torch.__version__ and set(found.versions) == {"kdx", "torch", "onnx", "onnxscript"}
    assert describe(fixed.path).image_size == (12, 12)
    assert describe(fixed.path).networks["network"].preprocessing == Preprocessing()
    model = onnx.load(resizing.path)
    assert [output.name for output in model.graph.output] == ["logits", "layer3", "layer1.0.conv2"]
    assert [entry.name for entry in model.graph.input] == ["images"]


def test_the_parity_report_is_returned_stored_beside_and_inside(resizing: Exported) -> None:
    report = resizing.report
    assert report and report.summary() and set(report.outputs) == {"logits", "layer3", "layer1.0.conv2"}
    assert all(d.mean <= d.max <= TOLERANCE and d.q99 <= d.max and d.largest > 0 for d in report.outputs.values())
    beside = json.loads(resizing.path.with_name(f"{resizing.path.name}.parity.json").read_text())
    inside = {entry.key: entry.value for entry in onnx.load(resizing.path).metadata_props}["kdx.parity"]
    assert beside == json.loads(inside) == report.as_dict() and beside["passed"] is True
    assert left_in(resizing.path.parent) == [resizing.path.name, f"{resizing.path.name}.parity.json"]


def test_a_file_holds_its_graph_and_no_other(resizing: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, path = resizing.graph, resizing.path
    weights = weights_hash(graph.network)
    assert holds(path, graph, weights)
    changed = copy.deepcopy(graph.network)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    assert not holds(path, graph, weights_hash(changed))
    assert not holds(path, FeatureGraph(graph.network, ["layer3"], PREPROCESSING), weights)
    assert not holds(path, FeatureGraph(graph.network, ["layer1.0.conv2", "layer3"], PREPROCESSING), weights)
    assert not holds(path, FeatureGraph(graph.network, graph.layers, Preprocessing((15, 13))), weights)
    assert not holds(path.with_name("none.onnx"), graph, weights)
    monkeypatch.setattr(description, "versions", lambda: {"kdx": "0.0"})
    assert not holds(path, graph, weights)


def test_a_damaged_file_is_an_error_to_read_and_one_to_write_again(resizing: Exported, tmp_path: Path) -> None:
    content = resizing.path.read_bytes()
    path = tmp_path / "damaged.onnx"
    for damaged in (content[:-17], content[: len(content) // 2], content[:5], b"", b"PK\x03\x04 not a protobuf at all", b"\x00" * 99):
        path.write_bytes(damaged)
        with pytest.raises(KdxError) as caught:
            describe(path)
        assert "damaged.onnx" in caught.value.problem and "kdx export" in caught.value.hint
        assert not holds(path, resizing.graph, weights_hash(resizing.graph.network))


def test_another_programs_file_and_no_file_are_told_apart(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "foreign.onnx")
    with pytest.raises(KdxError, match="was not written by this version of kdx"):
        describe(tmp_path / "foreign.onnx")
    with pytest.raises(KdxError, match="There is no file"):
        describe(tmp_path / "absent.onnx")
    with pytest.raises(KdxError, match="not a readable ONNX file"):
        describe(tmp_path)


# ---- what is never left behind ----


@pytest.mark.parametrize(
    ("network", "tolerance", "said"),
    [
        (Plain(torch.exp), -1.0, "does not agree with PyTorch"),
        (Plain(lambda logits: (-logits.abs()).log()), parity.TOLERANCE, "differs by inf"),
        (FixedBatch(), parity.TOLERANCE, "its forward pass fixes the batch"),
        (Branching(), parity.TOLERANCE, "cannot be exported"),
    ],
    ids=["tolerance", "nan", "fixed batch", "branching"],
)
def test_a_failed_export_says_why_and_leaves_nothing(
    network: nn.Module, tolerance: float, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KdxError) as caught:
        onnx_file.write(
            FeatureGraph(network, ["conv"]),
            tmp_path / "model.onnx",
            origin=Origin("a:network", ""),
            image_size=(8, 8),
            tolerance=tolerance,
        )
    assert said in caught.value.problem and "eager" in caught.value.hint and "\n" not in caught.value.problem
    assert left_in(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_a_failed_export_leaves_the_earlier_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier, path = b"earlier", tmp_path / "model.onnx"
    path.write_bytes(earlier)

    def interrupted(*_: object) -> None:
        assert any(re.fullmatch(r"\.model\.onnx\..*\.partial/model\.onnx", name) for name in left_in(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_file, "_exported", lambda *_: onnx.ModelProto())
    monkeypatch.setattr(onnx_file, "_check", lambda *_: None)
    monkeypatch.setattr(parity, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        onnx_file.write(FeatureGraph(Plain(), ["conv"]), path, origin=Origin("r", ""), image_size=(8, 8))
    assert left_in(tmp_path) == ["model.onnx"] and path.read_bytes() == earlier


def test_a_file_that_breaks_onnxs_rules_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [onnx.helper.make_node("Relu", ["nothing"], ["logits"])]
    value = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [value]))
    monkeypatch.setattr(onnx_file, "_exported", lambda *_: model)
    with pytest.raises(KdxError, match=r"The ONNX file of r is not sound: .*nothing"):
        onnx_file.write(FeatureGraph(Plain(), ["conv"]), tmp_path / "m.onnx", origin=Origin("r", ""), image_size=(8, 8))
    assert left_in(tmp_path) == []


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KdxError, match="cannot be written"):
        onnx_file.write(FeatureGraph(Plain(), ["conv"]), tmp_path / "file" / "m.onnx", origin=Origin("r", ""), image_size=(8, 8))


def test_a_path_that_is_a_folder_or_read_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = FeatureGraph(Plain(), ["conv"])
    report = ParityReport({"logits": Difference(0.0, 0.0, 0.0, 1.0, 1.0)}, 1e-4, (3,))
    monkeypatch.setattr(onnx_file, "_exported", lambda *_: onnx.ModelProto())
    monkeypatch.setattr(parity, "compare", lambda *_: report)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(KdxError, match="cannot be written: Is a directory"):
        onnx_file.write(graph, tmp_path / "folder.onnx", origin=Origin("r", ""), image_size=(8, 8))
    assert left_in(tmp_path) == []

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # a mode is no obstacle to root
    with pytest.raises(KdxError, match="cannot be written: Permission denied"):
        onnx_file.write(graph, tmp_path / "m.onnx", origin=Origin("r", ""), image_size=(8, 8))
    assert left_in(tmp_path) == []


def test_exporting_changes_no_logging_and_no_warning_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = logging.getLogger("torch").level, list(warnings.filters)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: warnings.warn("loud", stacklevel=1))
    with pytest.raises(AssertionError):
        onnx_file._exported(FeatureGraph(Plain(), ["conv"]), {"images": torch.rand(2, 3, 5, 5)}, False, "r")
    assert (logging.getLogger("torch").level, list(warnings.filters)) == before


# ---- gradients ----


@pytest.fixture(scope="session")
def differentiated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], tuple[Path, GradientGraph]]:
    """The gradients file of a network and its graph, with the cotangent at a layer or at the logits."""
    made: dict[str | None, tuple[Path, GradientGraph]] = {}

    def get(at: str | None) -> tuple[Path, GradientGraph]:
        if at not in made:
            torch.manual_seed(2)
            graph = GradientGraph(resnet(4, 1, 5, 2).eval(), ["layer1", "conv1"], PREPROCESSING, at)
            path = tmp_path_factory.mktemp("gradients") / "net.onnx"
            onnx_file.write(graph, path, origin=Origin("a:network", "w"), image_size=(15, 13))
            made[at] = path, graph
        return made[at]

    return get


@pytest.mark.parametrize("n", [1, 4, 11])
@pytest.mark.parametrize("at", [None, "layer2"])
def test_a_gradients_file_is_autograd(differentiated: Any, at: str | None, n: int) -> None:
    path, graph = differentiated(at)
    generator = torch.Generator().manual_seed(n)
    images = torch.rand(n, 3, 17, 9, generator=generator)
    cotangent = torch.randn(graph.cotangent_shape(images), generator=generator)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy(), "cotangent": cotangent.numpy()})
    expected = graph(images, cotangent)
    assert [output.name for output in session.get_outputs()] == list(graph.output_names)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == tuple(theirs.shape)
        assert np.abs(ours - theirs.numpy()).max() <= TOLERANCE * float(theirs.abs().max())


@pytest.mark.parametrize("at", [None, "layer2"])
def test_a_gradients_file_says_where_its_cotangent_goes(differentiated: Any, at: str | None) -> None:
    path, _ = differentiated(at)
    found = describe(path)
    assert (found.kind, found.at, found.layers, found.image_size) == ("gradients", at, ("layer1", "conv1"), None)
    assert found.inputs["cotangent"] == (("batch", 5) if at is None else ("batch", 8, 8, 7))
    assert found.outputs["gradient/layer1"] == found.outputs["layer1"] == ("batch", 4, 15, 13)


# ---- the same export is the same file ----


def assert_portable(content: bytes, *folders: Path) -> None:
    for where in (*map(str, folders), "/site-packages", str(Path.cwd())):
        assert where.encode() not in content


def test_a_second_export_is_byte_for_byte_the_first(resizing: Exported, differentiated: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = export(tmp_path / "elsewhere", resnet(4, 1, 5), ["layer3", "layer1.0.conv2"], PREPROCESSING, (15, 13))
    assert features.path.read_bytes() == resizing.path.read_bytes()
    path, graph = differentiated(None)
    again = tmp_path / "other" / path.name
    onnx_file.write(copy.deepcopy(graph), again, origin=Origin("a:network", "w"), image_size=(15, 13))
    assert again.read_bytes() == path.read_bytes()
    for each in (features.path, again):
        assert_portable(each.read_bytes(), tmp_path, resizing.path.parent, path.parent)


# ---- weights outside ----


def test_weights_over_the_limit_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("outside", [False, True])
def test_a_full_disk_leaves_nothing_half_written(outside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    weights = onnx.numpy_helper.from_array(np.ones((40, 40), np.float32), "w")
    value = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [value], [], [weights]))
    monkeypatch.setattr(onnx_file, "_exported", lambda *_: model)
    if outside:
        monkeypatch.setattr(onnx_file, "_LARGEST", 0)
        monkeypatch.setattr(onnx.external_data_helper, "write_external_data_tensors", full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(KdxError) as caught:
        onnx_file.write(FeatureGraph(Plain(), ["conv"]), path, origin=Origin("r", ""), image_size=(8, 8))
    assert "cannot be written: No space left on device" in caught.value.problem and "disk with room" in caught.value.hint
    assert left_in(tmp_path) == ["m.onnx"] and path.read_bytes() == b"earlier"


# ---- precision ----

HALF: dict[str, int] = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


@pytest.fixture(scope="session")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    torch.manual_seed(5)
    graph = FeatureGraph(resnet(24, 1, 5, 2).eval(), ["layer2"], PREPROCESSING)
    made = {}
    for precision in ("fp32", "fp16", "bf16"):
        path = tmp_path_factory.mktemp(precision) / "net.onnx"
        kind: Any = precision
        report = onnx_file.write(graph, path, origin=Origin("a:b", ""), image_size=(15, 13), precision=kind)
        made[precision] = Exported(path, graph, report)
    return made


@pytest.mark.parametrize("precision", HALF)
def test_a_file_in_half_precision_holds_its_weights_so(halves: dict[str, Exported], precision: str) -> None:
    path = halves[precision].path
    assert 0.45 < path.stat().st_size / halves["fp32"].path.stat().st_size < 0.6
    model = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            assert {kinds[name] for name in node.input if name in kinds} == {HALF[precision]}
    large = {tensor.data_type for tensor in model.graph.initializer if np.prod(tensor.dims) > 8}
    assert large == {HALF[precision]}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    found = describe(path)
    assert found.precision == precision and found.outputs == describe(halves["fp32"].path).outputs
    assert not holds(path, halves[precision].graph, "")


def test_float16_runs_on_the_cpu_and_bfloat16_says_where_it_does_not(halves: dict[str, Exported]) -> None:
    images = torch.rand(3, 3, 20, 11, generator=torch.Generator().manual_seed(0))
    with OnnxRuntimeRunner(halves["fp16"].path) as runner, OnnxRuntimeRunner(halves["fp32"].path) as exact:
        found, expected = runner.infer(images), exact.infer(images)
    assert found.features["layer2"].dtype == torch.float32
    for ours, theirs in ((found.logits, expected.logits), (found.features["layer2"], expected.features["layer2"])):
        assert 0 < float((ours - theirs).abs().max()) <= 1e-2 * float(theirs.abs().max())
    with pytest.raises(KdxError) as caught:
        OnnxRuntimeRunner(halves["bf16"].path).infer(images)
    assert "ONNX Runtime cannot" in caught.value.problem and caught.value.hint


@pytest.mark.parametrize("precision", HALF)
def test_the_cost_of_half_precision_is_in_its_report(halves: dict[str, Exported], precision: str) -> None:
    report = halves[precision].report
    step = {"fp16": 2**-11, "bf16": 2**-8}[precision]
    for found in report.outputs.values():
        assert step / 16 < found.max < 30 * step and found.cosine > 0.999
    assert report and report.tolerance is None and report.as_dict()["tolerance"] is None
