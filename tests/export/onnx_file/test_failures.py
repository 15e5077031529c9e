"""Failed exports leave earlier files as they were."""

from __future__ import annotations

import errno
import logging
import os
import re
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kdx.errors import KdxError
from kdx.export import onnx_file, parity
from kdx.export.description import Origin
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.export.parity import Difference, ParityReport
from tests.command_line import left_in
from tests.export.onnx_file.networks import (
    Branching,
    FixedBatch,
    Plain,
)
from tests.hooked import Blocks


@pytest.mark.parametrize(
    ("network", "tolerance", "message"),
    [
        (Plain(torch.exp), -1.0, "does not agree with PyTorch"),
        (Plain(lambda logits: (-logits.abs()).log()), parity.TOLERANCE, "differs by inf"),
        (FixedBatch(), parity.TOLERANCE, "its forward pass fixes the batch"),
        (Branching(), parity.TOLERANCE, "cannot be exported"),
    ],
    ids=["tolerance", "nan", "fixed batch", "branching"],
)
def test_the_error_of_a_failed_export_has_its_reason_and_no_file_remains(
    network: nn.Module, tolerance: float, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KdxError) as caught:
        onnx_file.write(
            FeatureGraph(network, ["conv"]),
            tmp_path / "model.onnx",
            origin=Origin("a:network", ""),
            image_size=(8, 8),
            tolerance=tolerance,
        )
    assert message in caught.value.problem and "eager" in caught.value.hint and "\n" not in caught.value.problem
    assert left_in(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_a_layer_after_which_only_the_class_token_is_read_is_refused_before_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "_exported", None)
    with pytest.raises(KdxError, match="No position of layer 'last' has any influence") as caught:
        onnx_file.write(
            GradientGraph(Blocks(), ["first", "last"]), tmp_path / "model.onnx", origin=Origin("a:network", ""), image_size=(12, 9)
        )
    assert "the head may read only the class token" in caught.value.hint and left_in(tmp_path) == []


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


def test_a_file_that_violates_the_onnx_specification_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [onnx.helper.make_node("Relu", ["nothing"], ["logits"])]
    value = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [value]))
    monkeypatch.setattr(onnx_file, "_exported", lambda *_: model)
    with pytest.raises(KdxError, match=r"The ONNX file of r is not valid: .*nothing"):
        onnx_file.write(FeatureGraph(Plain(), ["conv"]), tmp_path / "m.onnx", origin=Origin("r", ""), image_size=(8, 8))
    assert left_in(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KdxError, match="cannot be written"):
        onnx_file.write(FeatureGraph(Plain(), ["conv"]), tmp_path / "file" / "m.onnx", origin=Origin("r", ""), image_size=(8, 8))


def test_a_path_that_is_a_folder_or_read_only_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(Path, "open", refused)  # root may write regardless of the mode
    with pytest.raises(KdxError, match="cannot be written: Permission denied"):
        onnx_file.write(graph, tmp_path / "m.onnx", origin=Origin("r", ""), image_size=(8, 8))
    assert left_in(tmp_path) == []


def test_exporting_restores_logging_and_warning_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings() -> tuple[object, ...]:
        return logging.getLogger("torch").level, list(warnings.filters), torch.fx.config.do_not_emit_stack_traces

    before = settings()
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: warnings.warn("loud", stacklevel=1))
    with pytest.raises(KdxError, match="cannot be exported"):
        onnx_file._exported(FeatureGraph(Plain(), ["conv"]), {"images": torch.rand(2, 3, 5, 5)}, False, "r", 21)
    assert settings() == before


@pytest.mark.parametrize("outside", [False, True])
def test_a_full_disk_leaves_the_earlier_file(outside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
