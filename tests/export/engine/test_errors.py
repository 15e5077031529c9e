"""The errors of a build, and interrupted builds."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from kdx.errors import KdxError
from kdx.export import engine
from kdx.export.engine import EngineDescription
from tests.export.engine.files import BATCH, handmade, left_in


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "86", "", "SM86"])
def test_the_error_for_an_unknown_architecture_names_the_known_ones(arch: str, fixed: Path, tmp_path: Path) -> None:
    with pytest.raises(KdxError) as caught:
        engine.build(fixed, tmp_path / "a.engine", batch=BATCH, arch=arch)
    assert repr(arch) in caught.value.problem and all(known in caught.value.hint for known in engine.ARCHITECTURES)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("batch", [(0, 1, 2), (3, 2, 4), (1, 5, 4), (2, 1, 0), (-1, 1, 1)])
def test_batches_out_of_order_are_an_error(batch: tuple[int, int, int], fixed: Path, tmp_path: Path) -> None:
    with pytest.raises(KdxError, match=f"from {batch[0]} to {batch[2]}, best {batch[1]}"):
        engine.build(fixed, tmp_path / "a.engine", batch=batch, arch="sm_86")


def test_a_file_that_kdx_did_not_write_is_an_error(fixed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no network")
    model = onnx.load(fixed)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    for name, message in (("text", "not a readable ONNX file"), ("foreign", "not written by"), ("absent", "There is no file")):
        with pytest.raises(KdxError, match=message):
            engine.build(tmp_path / f"{name}.onnx", tmp_path / "out" / "a.engine", batch=BATCH, arch="sm_86")
    assert not (tmp_path / "out").exists()


NORM = helper.make_node("LayerNormalization", ["z", "scale"], ["y", "mean", "deviation"], name="the norm")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ([helper.make_node("Invent", ["z"], ["logits"], name="the new", domain="strange")], "Invent node 'the new'"),
        ([helper.make_node("Invent", ["z"], ["logits"], domain="strange")], "Invent node 'number 1'"),
        ([NORM, helper.make_node("Sub", ["y", "mean"], ["logits"])], "LayerNormalization node 'the norm'"),
        ([helper.make_node("MatMul", ["z", "scale"], ["logits"], name="a product")], "MatMul node 'a product'.* must match"),
    ],
)
def test_the_error_names_a_node_that_tensorrt_does_not_support(
    last: list[onnx.NodeProto], message: str, fixed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes = [helper.make_node("Relu", ["images"], ["z"], name="first"), *last]
    path = handmade(tmp_path / "model.onnx", fixed, nodes, {"scale": (4,)}, width=4 if last[0] is NORM else 5)
    with pytest.raises(KdxError, match=message) as caught:
        engine.build(path, tmp_path / "a.engine", batch=BATCH, arch="sm_86")
    assert "\n" not in caught.value.problem and caught.value.hint
    assert left_in(tmp_path) == ["model.onnx"]
    assert capfd.readouterr() == ("", "")


def test_the_error_of_a_failed_build_has_its_reason(fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT refuses a dynamic batch that the profile does not bound."""
    monkeypatch.setattr(engine, "_profile", lambda builder, _wanted: builder.create_optimization_profile())
    with pytest.raises(KdxError, match=r"cannot build .*model\.onnx: .*images is missing dimensions"):
        engine.build(fixed, tmp_path / "a.engine", batch=BATCH, arch="sm_86")
    assert left_in(tmp_path) == []


def test_an_sm_75_multiplies_in_float16_only(fixed: Path, tmp_path: Path) -> None:
    product = [helper.make_node("MatMul", ["images", "weight"], ["logits"])]
    path = handmade(tmp_path / "wide.onnx", fixed, product, {"weight": (3, 4)})
    with pytest.raises(KdxError, match="FP32 GEMM is not supported") as caught:
        engine.build(path, tmp_path / "a.engine", batch=BATCH, arch="sm_75")
    assert "float16" in caught.value.hint
    half = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["weight"], ["w"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Cast", ["y"], ["logits"], to=TensorProto.FLOAT),
    ]
    path = handmade(tmp_path / "half.onnx", fixed, half, {"weight": (3, 4)})
    assert engine.build(path, tmp_path / "a.engine", batch=BATCH, arch="sm_75").arch == "sm_75"


def test_a_dimension_with_an_unknown_name_is_an_error(fixed: Path, tmp_path: Path) -> None:
    model = onnx.load(fixed)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "depth"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(KdxError, match="images of the file has a dimension 'depth'"):
        engine.build(tmp_path / "model.onnx", tmp_path / "a.engine", batch=BATCH, arch="sm_86")


def test_a_folder_that_cannot_be_written_is_an_error_before_the_build(
    fixed: Path, tmp_path: Path, no_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KdxError, match=r"cannot be written: (Not a directory|File exists)"):
        engine.build(fixed, tmp_path / "file" / "a.engine", batch=BATCH, arch="sm_86")
    (tmp_path / "folder.engine").mkdir()
    with pytest.raises(KdxError, match="cannot be written: Is a directory"):
        engine.build(fixed, tmp_path / "folder.engine", batch=BATCH, arch="sm_86")

    def denied(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    with pytest.raises(KdxError, match="cannot be written: Permission denied"):
        engine.build(fixed, tmp_path / "a.engine", batch=BATCH, arch="sm_86")
    assert left_in(tmp_path) == ["file", "folder.engine"]


@pytest.mark.parametrize("moment", ["build", "write", "rename"])
def test_an_interrupted_build_leaves_the_old_engine_and_nothing_else(
    moment: str, fixed: Path, built: tuple[Path, EngineDescription], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.engine"
    for to, source in ((path, built[0]), (engine.description_path(path), engine.description_path(built[0]))):
        to.write_bytes(source.read_bytes())

    def interrupt(*_: object) -> None:
        assert any(re.fullmatch(r"\.model\.engine\..*\.partial", name) for name in left_in(tmp_path))
        raise KeyboardInterrupt

    owner: Any
    owner, name = {"build": (engine, "_built"), "write": (os, "fsync"), "rename": (Path, "replace")}[moment]
    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.build(fixed, path, batch=(2, 2, 2), arch="sm_86")
    assert left_in(tmp_path) == ["model.engine", "model.engine.json"]
    assert engine.load(path)[0] == built[1]


def test_an_engine_and_a_description_that_do_not_belong_together_are_an_error(
    built: tuple[Path, EngineDescription], tmp_path: Path
) -> None:
    path = tmp_path / "model.engine"
    with pytest.raises(KdxError, match="There is no file"):
        engine.describe(path)
    path.write_bytes(b"another")
    with pytest.raises(KdxError, match=r"there is no model\.engine\.json"):
        engine.describe(path)
    text = engine.description_path(built[0]).read_text()
    entries = json.loads(text)
    beside = engine.description_path(path)
    for damaged in ("", "[]", "{}", text[:-9], json.dumps({**entries, "more": 1}), json.dumps({**entries, "file": {}})):
        beside.write_text(damaged)
        with pytest.raises(KdxError, match="was not written by this version of kdx"):
            engine.describe(path)
    beside.write_text(text)
    assert engine.describe(path) == built[1]
    with pytest.raises(KdxError, match="is not the engine that"):
        engine.load(path)
