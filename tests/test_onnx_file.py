"""Exported files against PyTorch at sizes they were not traced with; what they say of themselves; what is never left behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from kdx.errors import KdxError
from kdx.export import onnx_file, parity
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.export.onnx_file import NetworkDescription, Origin
from kdx.export.parity import Difference, ParityReport
from kdx.models import weights_hash
from kdx.networks import resnet

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


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


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
    found = onnx_file.describe(resizing.path)
    network = resizing.graph.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    layers = ("layer3", "layer1.0.conv2")
    assert found == onnx_file.Description(
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
    assert onnx_file.describe(fixed.path).image_size == (12, 12)
    assert onnx_file.describe(fixed.path).networks["network"].preprocessing == Preprocessing()
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
    assert onnx_file.holds(path, graph, weights)
    changed = copy.deepcopy(graph.network)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    assert not onnx_file.holds(path, graph, weights_hash(changed))
    assert not onnx_file.holds(path, FeatureGraph(graph.network, ["layer3"], PREPROCESSING), weights)
    assert not onnx_file.holds(path, FeatureGraph(graph.network, ["layer1.0.conv2", "layer3"], PREPROCESSING), weights)
    assert not onnx_file.holds(path, FeatureGraph(graph.network, graph.layers, Preprocessing((15, 13))), weights)
    assert not onnx_file.holds(path.with_name("none.onnx"), graph, weights)
    monkeypatch.setattr(onnx_file, "_versions", lambda: {"kdx": "0.0"})
    assert not onnx_file.holds(path, graph, weights)


def test_a_damaged_file_is_an_error_to_read_and_one_to_write_again(resizing: Exported, tmp_path: Path) -> None:
    content = resizing.path.read_bytes()
    path = tmp_path / "damaged.onnx"
    for damaged in (content[:-17], content[: len(content) // 2], content[:5], b"", b"PK\x03\x04 not a protobuf at all", b"\x00" * 99):
        path.write_bytes(damaged)
        with pytest.raises(KdxError) as caught:
            onnx_file.describe(path)
        assert "damaged.onnx" in caught.value.problem and "kdx export" in caught.value.mend
        assert not onnx_file.holds(path, resizing.graph, weights_hash(resizing.graph.network))


def test_another_programs_file_and_no_file_are_told_apart(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "foreign.onnx")
    with pytest.raises(KdxError, match="was not written by this version of kdx"):
        onnx_file.describe(tmp_path / "foreign.onnx")
    with pytest.raises(KdxError, match="There is no file"):
        onnx_file.describe(tmp_path / "absent.onnx")
    with pytest.raises(KdxError, match="not a readable ONNX file"):
        onnx_file.describe(tmp_path)


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
    assert said in caught.value.problem and "eager" in caught.value.mend and "\n" not in caught.value.problem
    assert left_in(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_a_failed_export_leaves_the_earlier_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier, path = b"earlier", tmp_path / "model.onnx"
    path.write_bytes(earlier)

    def interrupted(*_: object) -> None:
        assert any(re.fullmatch(r"\.model\.onnx\..*\.partial/model\.onnx", name) for name in left_in(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_file, "_exported", lambda *_: onnx.ModelProto())
    monkeypatch.setattr(parity, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        onnx_file.write(FeatureGraph(Plain(), ["conv"]), path, origin=Origin("r", ""), image_size=(8, 8))
    assert left_in(tmp_path) == ["model.onnx"] and path.read_bytes() == earlier


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
