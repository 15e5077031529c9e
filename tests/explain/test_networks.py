"""The runtimes of an Explainer: export, files, engines, the fallback to PyTorch, and closing."""

from __future__ import annotations

import gc
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdx import KdxError
from kdx.choices import Precision
from kdx.explain.networks import NetworkRunners
from kdx.explain.results import Explanation
from kdx.runtimes.choice import Choice
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from tests.explain.small_networks import (
    SIZE,
    Small,
    StandInEngines,
    Untraceable,
    assert_same,
    explainer,
    files,
    images,
    labels,
    named_networks,
)


def test_onnx_gives_what_eager_gives(folder: Path, explained: Explanation[Any]) -> None:
    modified = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len([name for name in modified if name.endswith(".onnx")]) == 3
    with explainer(runtime="onnx", folder=folder, chunk=5, **named_networks()) as opened:
        actual = opened(images(), labels())
        assert opened.choice.runtime == "onnx" and "as requested" in opened.choice.why
    assert_same(actual, explained, 1e-4)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == modified, "the files are kept, not written again"


def test_three_files_give_what_eager_gives(folder: Path, explained: Explanation[Any]) -> None:
    exported = files(folder)
    with explainer(runtime="auto", **exported | {"base": str(exported["base"])}) as opened:
        assert_same(opened(images(), labels()), explained, 1e-4)
        assert opened.choice.why == "onnx on the CPU: the networks are ONNX files"
        records = opened.networks()
    with explainer() as opened:
        expected = opened.networks()
    for role in records:
        assert replace(records[role], image_size=None) == replace(expected[role], code=None)  # a file has no source code
        assert records[role].image_size == SIZE


def test_a_layer_that_a_file_does_not_hold_is_named(folder: Path) -> None:
    with pytest.raises(KdxError, match="does not contain the layer 'norm'") as caught:
        explainer(runtime="auto", layers=["norm"], **files(folder))
    assert "conv2" in caught.value.hint


class Smooth(Small):
    """The weights of a `Small` with different code."""

    def forward(self, images: Tensor) -> Tensor:
        first = nn.functional.gelu(self.norm(self.get_submodule(self.first)(images)))
        logits: Tensor = self.fc(nn.functional.gelu(self.conv2(first)).mean((2, 3)))
        return logits


@pytest.mark.slow
def test_modules_with_equal_weights_and_different_code_are_different_networks(tmp_path: Path) -> None:
    for student in (Small(1).eval(), Smooth(1).eval()):
        with (
            explainer(student=student, runtime="onnx", folder=tmp_path) as opened,
            explainer(student=student) as other,
        ):
            assert_same(opened(images(), labels()), other(images(), labels()), 1e-4)


@pytest.mark.parametrize("role", ["student", "base", "teacher"])
def test_files_and_networks_do_not_mix(role: str) -> None:
    with pytest.raises(KdxError, match=f"Only the {role} is an exported file"):
        explainer(**{role: "there/is/none.onnx"})


def test_files_do_not_run_in_eager(folder: Path) -> None:
    with pytest.raises(KdxError, match="cannot run in PyTorch"):
        explainer(runtime="eager", **files(folder))


def test_onnx_and_engine_files_do_not_mix(folder: Path) -> None:
    with pytest.raises(KdxError, match=r"The networks are \.engine and \.onnx files"):
        explainer(runtime="auto", **files(folder) | {"base": "base.engine"})


def test_files_open_on_the_chosen_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("meta")
    opened_on = []
    monkeypatch.setattr("kdx.explain.networks.choose", lambda *_, **__: Choice("onnx", device, "for a test"))
    monkeypatch.setattr("kdx.explain.exported.open_file", lambda path, choice: opened_on.append(choice.device))
    for sources in (named_networks(), files(folder)):
        with explainer(runtime="auto", folder=folder, **sources) as opened:
            opened.open(SIZE)
            assert isinstance(opened._networks, NetworkRunners)
            opened._networks._runners.clear()
    assert opened_on == [device] * 6


@pytest.mark.parametrize(
    ("source", "precision"), [pytest.param("networks", "float32", marks=pytest.mark.slow), ("files", "float32"), ("files", "tf32")]
)
def test_tensorrt_runs_engines_of_the_exported_files(
    source: str, precision: Precision, folder: Path, tmp_path: Path, explained: Explanation[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = StandInEngines()
    engines.install(monkeypatch, precision)
    sources: dict[str, Any] = {**files(folder)} if source == "files" else {**named_networks()}
    with explainer(runtime="tensorrt", folder=tmp_path, chunk=5, **sources) as opened:
        assert_same(opened(images(), labels()), explained, 1e-4)
    assert engines.built == dict.fromkeys(("teacher", "student", "base"), ((1, 5, 5), None))  # the files say their size
    assert engines.devices == {torch.device("cpu")}  # the requested device
    assert engines.tf32 == {precision == "tf32"}


@pytest.mark.parametrize(("batch", "expected"), [(None, 64), (16, 16), (256, 256)])
def test_engines_are_built_for_the_batch(
    batch: int | None, expected: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = StandInEngines()
    engines.install(monkeypatch)
    with explainer(runtime="tensorrt", folder=tmp_path, **files(folder)) as opened:
        opened.open(SIZE, batch=batch)
    assert set(engines.built.values()) == {((1, expected, expected), None)}


def test_auto_falls_back_to_eager_with_a_reason(tmp_path: Path, explained: Explanation[Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kdx")
    with explainer(runtime="auto", teacher=Untraceable(3, teacher=True), folder=tmp_path) as opened:
        opened.open(SIZE)
        actual = opened(images(), labels())
        assert opened.choice.runtime == "eager" and "the export failed" in opened.choice.why and "no tracing here" in opened.choice.why
        assert opened.choice.why in caplog.text
    assert_same(actual, explained, 1e-6)
    assert list(tmp_path.iterdir()) == []


def test_onnx_by_name_does_not_fall_back(tmp_path: Path) -> None:
    with (
        explainer(runtime="onnx", teacher=Untraceable(3, teacher=True), folder=tmp_path) as opened,
        pytest.raises(KdxError, match="no tracing here"),
    ):
        opened(images(), labels())


def test_the_temporary_folder_is_deleted_with_the_explainer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("kdx.explain.exported.is_export_of", lambda *_: True)
    exported = files(folder)
    monkeypatch.setattr("kdx.explain.exported.open_file", lambda path, _: _open_in_folder(path, exported))
    with explainer(runtime="onnx", **named_networks()) as opened:
        assert list(tmp_path.iterdir()) == [], "none is made before it is needed"
        opened.open(SIZE)
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    opened.close()


def _open_in_folder(path: Path, exported: dict[str, Path]) -> OnnxRuntimeRunner:
    assert path.parent.is_dir() and path.parent.name.startswith("kdx-")
    return OnnxRuntimeRunner(exported[path.name.split("-")[0]])


@pytest.mark.parametrize("used", [True, False])
def test_a_closed_explainer_does_not_run_and_frees_its_networks(used: bool) -> None:
    with explainer() as opened:
        if used:
            opened(images(), labels())
        assert isinstance(opened._networks, NetworkRunners)
        module = weakref.ref(opened._networks._graphs["base"][0].module)
        assert module() is not None
    gc.collect()
    assert module() is None
    with pytest.raises(ValueError, match="closed"):
        opened(images(), labels())
