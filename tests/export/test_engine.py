"""Engines built for GPUs that are not here, what is said of them, and every way in which a build is refused."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from kdx.errors import KdxError
from kdx.export import engine, onnx_file
from kdx.export.description import Origin, describe
from kdx.export.engine import EngineDescription
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.models.resnet import resnet

BATCH = (1, 5, 9)
VERSION = "1.7.1.116"


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A features file of images 16 x 12."""
    return _exported(tmp_path_factory.mktemp("fixed"), None, (16, 12))


@pytest.fixture(scope="module")
def resizing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A features file of images of any size."""
    return _exported(tmp_path_factory.mktemp("resizing"), (16, 12), (20, 15))


def _exported(folder: Path, size: tuple[int, int] | None, image_size: tuple[int, int]) -> Path:
    torch.manual_seed(0)
    path = folder / "model.onnx"
    graph = FeatureGraph(resnet(4, 1, 7, 2), ["layer1", "layer2"], Preprocessing(size, (0.4,), (0.2,)))
    onnx_file.write(graph, path, origin=Origin("tiny", "abc"), image_size=image_size)
    return path


@pytest.fixture(scope="module")
def built(fixed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineDescription]:
    path = tmp_path_factory.mktemp("built") / "model.engine"
    return path, engine.build(fixed, path, batch=BATCH, arch="sm_86")


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build is a mistake."""

    def refuse(*_: object) -> bytes:
        raise AssertionError("built again")

    monkeypatch.setattr(engine, "_built", refuse)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def handmade(path: Path, like: Path, nodes: list[onnx.NodeProto], weights: dict[str, tuple[int, ...]], width: int = 3) -> Path:
    """A file of these nodes, images [batch, width] -> logits, that claims to be kdx's."""
    graph = helper.make_graph(
        nodes,
        "handmade",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.full(shape, 0.5, np.float32), name) for name, shape in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("strange", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model.metadata_props.extend(onnx.load(like).metadata_props)
    onnx.save(model, path)
    return path


# ---- what is built ----


@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
def test_an_engine_is_built_for_a_gpu_that_is_not_here(fixed: Path, tmp_path: Path, arch: str) -> None:
    path = tmp_path / "a folder" / "model.engine"
    found = engine.build(fixed, path, batch=BATCH, arch=arch)
    assert left_in(path.parent) == ["model.engine", "model.engine.json"]
    assert path.read_bytes()[:4] == b"vtrt" and path.stat().st_size > 10_000
    assert (found.package, found.version, found.arch, found.gpu, found.tf32) == ("tensorrt_rtx", VERSION, arch, None, False)
    assert found.inputs == {"images": ("batch", 3, 16, 12)}
    assert found.outputs == {"logits": ("batch", 7), "layer1": ("batch", 4, 16, 12), "layer2": ("batch", 8, 8, 6)}
    assert (found.kind, found.layers, found.batch) == ("features", ("layer1", "layer2"), BATCH)
    assert found.file == describe(fixed)
    assert engine.describe(path) == found and engine.load(path) == (found, path.read_bytes())


def test_the_engine_of_a_file_for_any_size_has_one_size(resizing: Path, tmp_path: Path) -> None:
    found = engine.build(resizing, tmp_path / "a.engine", batch=(3, 3, 3), arch="sm_89", image_size=(31, 17))
    assert found.inputs == {"images": ("batch", 3, 31, 17)} and found.outputs["layer2"] == ("batch", 8, 8, 6)
    with pytest.raises(KdxError, match="takes images of any size, and an engine takes one"):
        engine.build(resizing, tmp_path / "b.engine", batch=BATCH, arch="sm_89")
    assert left_in(tmp_path) == ["a.engine", "a.engine.json"]


def test_the_size_of_a_file_of_one_size_may_be_said_but_not_changed(
    fixed: Path, built: tuple[Path, EngineDescription], no_build: None
) -> None:
    path, found = built
    assert engine.build(fixed, path, batch=BATCH, arch="sm_86", image_size=(16, 12)) == found
    with pytest.raises(KdxError, match="takes images of 16 x 12, not 12 x 16"):
        engine.build(fixed, path, batch=BATCH, arch="sm_86", image_size=(12, 16))


def test_every_input_gets_the_batches(fixed: Path, tmp_path: Path) -> None:
    path = handmade(tmp_path / "model.onnx", fixed, [helper.make_node("MatMul", ["images", "weight"], ["z"])], {"weight": (3, 4)})
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("cotangent", TensorProto.FLOAT, ["batch", 4]))
    model.graph.node.append(helper.make_node("Mul", ["z", "cotangent"], ["logits"]))
    for entry in model.metadata_props:
        if entry.key == "kdx.kind":
            entry.value = json.dumps("gradients")
    onnx.save(model, path)
    found = engine.build(path, tmp_path / "a.engine", batch=BATCH, arch="sm_80")
    assert found.kind == "gradients" and found.inputs == {"images": ("batch", 3), "cotangent": ("batch", 4)}
    assert engine.describe(tmp_path / "a.engine") == found


def test_every_architecture_is_one_that_the_package_knows() -> None:
    known = engine.load_package("tensorrt_rtx").ComputeCapability.__members__
    assert {f"sm_{name.removeprefix('SM')}" for name in known if name.startswith("SM")} == set(engine.ARCHITECTURES)


def test_weights_beside_the_file_are_read_and_count_in_its_digest(fixed: Path, tmp_path: Path) -> None:
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
    seen: list[bool] = []

    class Builder:  # beside the real one: a subclass of it warns as it goes
        def __init__(self, heard: Any) -> None:
            self.real = real(heard)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            seen.append(config.get_flag(package.BuilderFlag.TF32))
            assert config.num_compute_capabilities == 1
            assert config.get_compute_capability(0) == package.ComputeCapability.SM86
            assert network.get_flag(package.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            return self.real.build_serialized_network(network, config)

    monkeypatch.setattr(package, "Builder", Builder)
    path = tmp_path / "model.engine"
    assert not engine.build(fixed, path, batch=BATCH, arch="sm_86").tf32
    assert engine.build(fixed, path, batch=BATCH, arch="sm_86", tf32=True).tf32
    assert seen == [False, True]


# ---- the engine that is kept ----


def test_the_same_engine_is_not_built_again(fixed: Path, built: tuple[Path, EngineDescription], no_build: None) -> None:
    path, found = built
    before = path.stat().st_mtime_ns
    assert engine.build(fixed, path, batch=BATCH, arch="sm_86") == found
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
def test_anything_that_differs_is_built(
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
    found = engine.build(source, path, **settings)  # type: ignore[arg-type]
    assert engine.load(path) == (found, b"another engine")
    assert (found.arch, found.batch) == (settings["arch"], settings["batch"])


# ---- what is refused ----


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "86", "", "SM86"])
def test_an_unknown_architecture_is_an_error_that_names_the_known(arch: str, fixed: Path, tmp_path: Path) -> None:
    with pytest.raises(KdxError) as caught:
        engine.build(fixed, tmp_path / "a.engine", batch=BATCH, arch=arch)
    assert repr(arch) in caught.value.problem and all(known in caught.value.hint for known in engine.ARCHITECTURES)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("batch", [(0, 1, 2), (3, 2, 4), (1, 5, 4), (2, 1, 0), (-1, 1, 1)])
def test_batches_out_of_order_are_an_error(batch: tuple[int, int, int], fixed: Path, tmp_path: Path) -> None:
    with pytest.raises(KdxError, match=f"from {batch[0]} to {batch[2]}, best {batch[1]}"):
        engine.build(fixed, tmp_path / "a.engine", batch=batch, arch="sm_86")


def test_a_file_that_is_not_kdxs_is_an_error(fixed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no network")
    model = onnx.load(fixed)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    for name, said in (("text", "not a readable ONNX file"), ("foreign", "not written by"), ("absent", "There is no file")):
        with pytest.raises(KdxError, match=said):
            engine.build(tmp_path / f"{name}.onnx", tmp_path / "out" / "a.engine", batch=BATCH, arch="sm_86")
    assert not (tmp_path / "out").exists()


NORM = helper.make_node("LayerNormalization", ["z", "scale"], ["y", "mean", "deviation"], name="the norm")


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ([helper.make_node("Invent", ["z"], ["logits"], name="the new", domain="strange")], "Invent node 'the new'"),
        ([helper.make_node("Invent", ["z"], ["logits"], domain="strange")], "Invent node 'number 1'"),
        ([NORM, helper.make_node("Sub", ["y", "mean"], ["logits"])], "LayerNormalization node 'the norm'"),
        ([helper.make_node("MatMul", ["z", "scale"], ["logits"], name="a product")], "MatMul node 'a product'.* must match"),
    ],
)
def test_a_node_that_tensorrt_does_not_take_is_named(
    last: list[onnx.NodeProto], said: str, fixed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes = [helper.make_node("Relu", ["images"], ["z"], name="first"), *last]
    path = handmade(tmp_path / "model.onnx", fixed, nodes, {"scale": (4,)}, width=4 if last[0] is NORM else 5)
    with pytest.raises(KdxError, match=said) as caught:
        engine.build(path, tmp_path / "a.engine", batch=BATCH, arch="sm_86")
    assert "\n" not in caught.value.problem and caught.value.hint
    assert left_in(tmp_path) == ["model.onnx"]
    assert capfd.readouterr() == ("", "")


def test_a_build_that_fails_says_why(fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_dimension_of_no_known_name_is_an_error(fixed: Path, tmp_path: Path) -> None:
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
    whole = engine.description_path(built[0]).read_text()
    held = json.loads(whole)
    beside = engine.description_path(path)
    for text in ("", "[]", "{}", whole[:-9], json.dumps({**held, "more": 1}), json.dumps({**held, "file": {}})):
        beside.write_text(text)
        with pytest.raises(KdxError, match="was not written by this version of kdx"):
            engine.describe(path)
    beside.write_text(whole)
    assert engine.describe(path) == built[1]
    with pytest.raises(KdxError, match="is not the engine that"):
        engine.load(path)


# ---- who builds ----


def _machine(monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int] | None, *, tensorrt: bool) -> None:
    real = importlib.util.find_spec
    found = real("math") if tensorrt else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: found if name == "tensorrt" else real(name, *rest))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")


@pytest.mark.parametrize(
    ("arch", "gpu", "tensorrt", "expected"),
    [
        ("sm_86", None, False, ("tensorrt_rtx", "sm_86", None)),
        ("sm_86", (8, 6), True, ("tensorrt_rtx", "sm_86", None)),
        (None, (8, 6), True, ("tensorrt", "sm_86", "A GPU")),
        (None, (9, 0), True, ("tensorrt", "sm_90", "A GPU")),
        (None, (12, 0), False, ("tensorrt_rtx", "sm_120", None)),
    ],
)
def test_the_package_that_builds(
    arch: str | None,
    gpu: tuple[int, int] | None,
    tensorrt: bool,
    expected: tuple[str, str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _machine(monkeypatch, gpu, tensorrt=tensorrt)
    found = engine.choose_target(arch)
    assert (found.package, found.arch, found.gpu) == expected
    assert found.why.startswith("TensorRT-RTX" if found.package == "tensorrt_rtx" else "TensorRT,")


def test_where_nobody_can_build_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, None, tensorrt=True)
    with pytest.raises(KdxError, match="sees none here") as caught:
        engine.choose_target()
    assert "sm_86" in caught.value.hint
    _machine(monkeypatch, (9, 0), tensorrt=False)
    with pytest.raises(KdxError, match="An engine for sm_90 needs the package tensorrt") as caught:
        engine.choose_target()
    assert "kdx[gpu]" in caught.value.hint


@pytest.mark.parametrize(("name", "hint"), [("tensorrt_rtx", "tensorrt-rtx-cu13"), ("tensorrt", "kdx[gpu]")])
def test_a_package_that_is_missing_or_broken_names_its_mend(name: Any, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(KdxError, match=f"The package {name} cannot be loaded") as caught:
        engine.load_package(name)
    assert hint in caught.value.hint
    monkeypatch.delitem(sys.modules, name)
    (tmp_path / f"{name}.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KdxError, match=r"libnvinfer\.so\.11: cannot open") as caught:
        engine.load_package(name)
    assert hint in caught.value.hint


# ---- TensorRT's timings ----


class Config:
    """What TensorRT's builder configuration does with a timing cache."""

    def __init__(self, fits: bool) -> None:
        self.fits = fits
        self.held = b""

    def create_timing_cache(self, data: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: data + b" and more", data=data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if self.fits or not cache.data:
            self.held = cache.data
            self.cache = cache
        return self.fits or not cache.data

    def get_timing_cache(self) -> Any:
        return self.cache


@pytest.mark.parametrize("fits", [True, False])
def test_timings_go_on_from_the_last_build_or_begin_anew(fits: bool, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "timings"
    config = Config(fits)
    engine._take_timings(config, path)
    assert config.held == b""
    engine._keep_timings(config, path)
    assert path.read_bytes() == b" and more" and left_in(path.parent) == ["timings"]
    engine._take_timings(config, path)
    assert config.held == (b" and more" if fits else b"")


def test_timings_that_cannot_be_kept_fail_no_build(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    config = Config(True)
    engine._take_timings(config, tmp_path / "file" / "timings")
    with caplog.at_level("INFO", "kdx"):
        engine._keep_timings(config, tmp_path / "file" / "timings")
    assert "were not kept" in caplog.text and left_in(tmp_path) == ["file"]


def test_timings_lie_in_the_users_cache_folder(
    built: tuple[Path, EngineDescription], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = replace(built[1], package="tensorrt", version="11.4.0", gpu="NVIDIA H200 / 141 GB")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engine._timing_cache(described) == tmp_path / "kdx" / "timings-11.4.0-NVIDIA-H200-141-GB.cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert engine._timing_cache(described).parent == tmp_path / "home" / ".cache" / "kdx"


def test_a_build_writes_nothing_but_its_files(fixed: Path, tmp_path: Path) -> None:
    """In a fresh process, whose cache, home and working folders stay empty and which says nothing."""
    code = "import sys; from pathlib import Path; from kdx.export import engine; engine.build(*map(Path, sys.argv[1:]), {})"
    code = code.replace("{}", "batch=(2, 3, 4), arch='sm_121'")
    places = {name: tmp_path / name for name in ("XDG_CACHE_HOME", "HOME", "TMPDIR")}
    for place in places.values():
        place.mkdir()
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(fixed), str(tmp_path / "out" / "a.engine")],
        cwd=places["HOME"],
        env=os.environ | {name: str(place) for name, place in places.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert [left_in(place) for place in places.values()] == [[], [], []]
