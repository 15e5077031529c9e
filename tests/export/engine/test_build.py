"""Engines for GPUs that are not in the machine, and their descriptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kdx.errors import KdxError
from kdx.export import engine
from kdx.export.description import describe
from kdx.export.engine import EngineDescription
from tests.export.engine.files import BATCH, VERSION, handmade, left_in


@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
def test_an_engine_is_built_for_a_gpu_that_is_not_here(fixed: Path, tmp_path: Path, arch: str) -> None:
    path = tmp_path / "a folder" / "model.engine"
    description = engine.build(fixed, path, batch=BATCH, arch=arch)
    assert left_in(path.parent) == ["model.engine", "model.engine.json"]
    assert path.read_bytes()[:4] == b"vtrt" and path.stat().st_size > 10_000
    assert (description.package, description.version, description.arch, description.gpu, description.tf32) == (
        "tensorrt_rtx",
        VERSION,
        arch,
        None,
        False,
    )
    assert description.inputs == {"images": ("batch", 3, 16, 12)}
    assert description.outputs == {"logits": ("batch", 7), "layer1": ("batch", 4, 16, 12), "layer2": ("batch", 8, 8, 6)}
    assert (description.kind, description.layers, description.batch) == ("features", ("layer1", "layer2"), BATCH)
    assert description.file == describe(fixed)
    assert engine.describe(path) == description and engine.load(path) == (description, path.read_bytes())


def test_the_engine_of_a_file_for_any_size_has_one_size(resizing: Path, tmp_path: Path) -> None:
    description = engine.build(resizing, tmp_path / "a.engine", batch=(3, 3, 3), arch="sm_89", image_size=(31, 17))
    assert description.inputs == {"images": ("batch", 3, 31, 17)} and description.outputs["layer2"] == ("batch", 8, 8, 6)
    with pytest.raises(KdxError, match="takes images of any size, and an engine takes one"):
        engine.build(resizing, tmp_path / "b.engine", batch=BATCH, arch="sm_89")
    assert left_in(tmp_path) == ["a.engine", "a.engine.json"]


def test_the_image_size_of_a_file_of_one_size_may_be_given_but_not_changed(
    fixed: Path, built: tuple[Path, EngineDescription], no_build: None
) -> None:
    path, description = built
    assert engine.build(fixed, path, batch=BATCH, arch="sm_86", image_size=(16, 12)) == description
    with pytest.raises(KdxError, match="takes images of 16 x 12, not 12 x 16"):
        engine.build(fixed, path, batch=BATCH, arch="sm_86", image_size=(12, 16))


def test_every_input_has_the_batch_range(fixed: Path, tmp_path: Path) -> None:
    path = handmade(tmp_path / "model.onnx", fixed, [helper.make_node("MatMul", ["images", "weight"], ["z"])], {"weight": (3, 4)})
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("cotangent", TensorProto.FLOAT, ["batch", 4]))
    model.graph.node.append(helper.make_node("Mul", ["z", "cotangent"], ["logits"]))
    for entry in model.metadata_props:
        if entry.key == "kdx.kind":
            entry.value = json.dumps("gradients")
    onnx.save(model, path)
    description = engine.build(path, tmp_path / "a.engine", batch=BATCH, arch="sm_80")
    assert description.kind == "gradients" and description.inputs == {"images": ("batch", 3), "cotangent": ("batch", 4)}
    assert engine.describe(tmp_path / "a.engine") == description


def test_the_architectures_are_those_of_the_package() -> None:
    known = engine.load_package("tensorrt_rtx").ComputeCapability.__members__
    assert {f"sm_{name.removeprefix('SM')}" for name in known if name.startswith("SM")} == set(engine.ARCHITECTURES)


def test_weights_beside_the_file_are_read_and_part_of_its_digest(fixed: Path, tmp_path: Path) -> None:
    whole = handmade(tmp_path / "whole.onnx", fixed, [helper.make_node("MatMul", ["images", "weight"], ["logits"])], {"weight": (3, 4)})
    split = tmp_path / "split.onnx"
    onnx.save(onnx.load(whole), split, save_as_external_data=True, location="split.data", size_threshold=0)
    path = tmp_path / "model.engine"
    first = engine.build(split, path, batch=BATCH, arch="sm_86")
    data = (tmp_path / "split.data").read_bytes()
    (tmp_path / "split.data").write_bytes(np.full(len(data) // 4, 0.25, np.float32).tobytes())
    second = engine.build(split, path, batch=BATCH, arch="sm_86")
    assert first.onnx_sha256 != second.onnx_sha256 and first.sha256 != second.sha256
    (tmp_path / "split.data").unlink()
    with pytest.raises(KdxError, match=r"split\.data cannot be read: No such file"):
        engine.build(split, path, batch=BATCH, arch="sm_86")
    assert engine.describe(path) == second


def test_tensorfloat_is_off_unless_it_is_allowed(fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = engine.load_package("tensorrt_rtx")
    real = package.Builder
    flags: list[bool] = []

    class Builder:  # wraps the real one, because a subclass of it warns when it is deleted
        def __init__(self, logger: Any) -> None:
            self.real = real(logger)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            flags.append(config.get_flag(package.BuilderFlag.TF32))
            assert config.num_compute_capabilities == 1
            assert config.get_compute_capability(0) == package.ComputeCapability.SM86
            assert network.get_flag(package.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            return self.real.build_serialized_network(network, config)

    monkeypatch.setattr(package, "Builder", Builder)
    path = tmp_path / "model.engine"
    assert not engine.build(fixed, path, batch=BATCH, arch="sm_86").tf32
    assert engine.build(fixed, path, batch=BATCH, arch="sm_86", tf32=True).tf32
    assert flags == [False, True]


def test_the_same_engine_is_not_built_again(fixed: Path, built: tuple[Path, EngineDescription], no_build: None) -> None:
    path, description = built
    before = path.stat().st_mtime_ns
    assert engine.build(fixed, path, batch=BATCH, arch="sm_86") == description
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change",
    [
        {"arch": "sm_80"},
        {"batch": (1, 5, 10)},
        {"batch": (1, 4, 9)},
        {"tf32": True},
        {"version": "1.7.0"},
        {"file": "another"},
        {"engine": b"damaged"},
        {"json": "{"},
        {"json": None},
    ],
    ids=str,
)
def test_an_engine_that_differs_in_anything_is_built_again(
    change: dict[str, Any], fixed: Path, built: tuple[Path, EngineDescription], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, source = tmp_path / "model.engine", tmp_path / "model.onnx"
    path.write_bytes(built[0].read_bytes())
    beside = engine.description_path(path)
    beside.write_text(engine.description_path(built[0]).read_text())
    source.write_bytes(fixed.read_bytes())
    monkeypatch.setattr(engine, "_built", lambda *_: b"another engine")
    settings = {"batch": BATCH, "arch": "sm_86"}
    if "file" in change:
        model = onnx.load(fixed)
        model.doc_string = "changed"
        onnx.save(model, source)
    elif "engine" in change:
        path.write_bytes(change["engine"])
    elif "json" in change:
        beside.unlink() if change["json"] is None else beside.write_text(change["json"])
    elif "version" in change:
        beside.write_text(beside.read_text().replace(VERSION, change["version"]))
    else:
        settings |= change
    description = engine.build(source, path, **settings)  # type: ignore[arg-type]
    assert engine.load(path) == (description, b"another engine")
    assert (description.arch, description.batch) == (settings["arch"], settings["batch"])
