"""Runs that share the features of their teacher and base: the same numbers as single runs, from fewer passes."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kdx.explain.networks import NetworkRunners
from kdx.explain.shared_features import SharedFeatures, pixels_key
from kdx.models.resnet import resnet
from kdx.runs.run import RunOptions, explain_dataset
from kdx.runtimes.runner import NetworkOutputs
from tests.runs.small_run import OPTIONS, SALIENT, WHOLE, results, same

REFERENCE = replace(OPTIONS, geometry="reference", reference_images=10)


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Path]:
    """A models file per student, which differ in the student's weights only."""
    torch.manual_seed(7)
    save_file(resnet(width=4, depth=1, classes=3).state_dict(), folder / "other.safetensors")
    text = (folder / "models.toml").read_text()
    files = {}
    for name, weights in (("kd", "student"), ("at", "other")):
        files[name] = folder / f"{name}.toml"
        files[name].write_text(text.replace("@student.safetensors", f"@{weights}.safetensors"))
    return files


def explained(folder: Path, models: Path, out: Path, options: RunOptions, shared: Path | None = None, layers: tuple[str, ...] = ()) -> Path:
    explain_dataset(str(folder / "pictures"), models, out, layers, options, shared_features=shared, announce=lambda line: None)
    return out


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the images that each role's network processes."""
    images: Counter[str] = Counter()
    original = NetworkRunners._run

    def count(self: NetworkRunners, role: str, batch: Tensor) -> NetworkOutputs:
        images[role] += len(batch)
        return original(self, role, batch)

    monkeypatch.setattr(NetworkRunners, "_run", count)
    return images


@pytest.mark.parametrize(
    "options",
    [OPTIONS, *(pytest.param(options, marks=pytest.mark.slow) for options in (WHOLE, REFERENCE))],
    ids=["batch", "whole", "reference"],
)
def test_students_that_share_have_the_numbers_of_single_runs_and_run_teacher_and_base_once(
    folder: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: RunOptions
) -> None:
    images = counted(monkeypatch)
    expected = {name: results(explained(folder, file, tmp_path / f"single-{name}", options)) for name, file in models.items()}
    single = images["teacher"] // 2
    assert images == dict.fromkeys(("teacher", "base", "student"), 2 * single)
    images.clear()
    for name, file in models.items():
        assert same(results(explained(folder, file, tmp_path / name, options, tmp_path / "shared")), expected[name])
    assert images == {"teacher": single, "base": single, "student": 2 * single}


@pytest.mark.slow
def test_salient_features_share_passes_of_salient_images_too(folder: Path, models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("kd", "at"):
        shared = results(explained(folder, models[name], tmp_path / name, SALIENT, tmp_path / "shared"))
        assert same(shared, results(explained(folder, models[name], tmp_path / f"single-{name}", SALIENT)))


@pytest.mark.slow
def test_other_weights_layers_and_images_are_not_shared(
    folder: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explained(folder, models["kd"], tmp_path / "kd", OPTIONS, tmp_path / "shared")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.copy(copy / "other.safetensors", copy / "base.safetensors")
    images = counted(monkeypatch)
    explained(copy, copy / "kd.toml", tmp_path / "other-base", OPTIONS, tmp_path / "shared")
    assert images == {"base": 29, "student": 29}
    images.clear()
    explained(folder, models["kd"], tmp_path / "other-batches", replace(OPTIONS, seed=4), tmp_path / "shared")
    assert images == {"teacher": 29, "base": 29, "student": 29}
    images.clear()
    explained(folder, models["kd"], tmp_path / "layers", OPTIONS, tmp_path / "shared", layers=("layer3",))
    assert images == {"teacher": 29, "base": 29, "student": 29}


def test_a_damaged_pass_is_computed_again(tmp_path: Path) -> None:
    outputs = NetworkOutputs(torch.rand(3, 2), {"layer": torch.rand(3, 4, 5, 5)})
    shared = SharedFeatures(tmp_path)
    for damage in (lambda content: content, lambda content: content[:500], lambda content: b""):
        read = shared.outputs("network", "images", lambda: outputs, torch.device("cpu"))
        assert torch.equal(read.features["layer"], outputs.features["layer"])
        (file,) = tmp_path.rglob("*.pt")
        file.write_bytes(damage(file.read_bytes()))


def test_without_space_passes_are_computed_and_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = NetworkOutputs(torch.rand(3, 2), {"layer": torch.rand(3, 4, 5, 5)})
    size = outputs.logits.nbytes + outputs.features["layer"].nbytes
    usage = shutil.disk_usage(tmp_path)._replace(free=size)
    monkeypatch.setattr("kdx.explain.shared_features.shutil.disk_usage", lambda path: usage)
    shared = SharedFeatures(tmp_path)
    for images in ("first", "second", "third", "second"):
        assert torch.equal(shared.outputs("network", images, lambda: outputs, torch.device("cpu")).logits, outputs.logits)
    assert [path.stem for path in tmp_path.rglob("*.pt")] == ["first"]
    assert caplog.text.count("takes half of the free space") == 1


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 64 vs 0"), OSError(28, "No space left on device")])
def test_a_disk_that_becomes_full_fails_no_run(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    outputs = NetworkOutputs(torch.rand(3, 2), {})
    assert torch.equal(SharedFeatures(tmp_path).outputs("network", "images", lambda: outputs, torch.device("cpu")).logits, outputs.logits)
    assert "is not shared" in caplog.text
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["images.lock"]


@pytest.mark.slow
def test_the_runtime_auto_is_that_of_the_first_run(folder: Path, models: dict[str, Path], tmp_path: Path) -> None:
    shared = SharedFeatures(tmp_path / "shared")
    shared.keep_runtime("onnx")
    shared.keep_runtime("eager")
    explained(folder, models["kd"], tmp_path / "kd", replace(OPTIONS, runtime="auto", device="cpu"), tmp_path / "shared")
    manifest = json.loads((tmp_path / "kd" / "manifest.json").read_text())
    assert manifest["environment"]["runtime"] == "onnx on cpu"


def test_explainers_that_need_the_same_pass_at_once_compute_it_once(tmp_path: Path) -> None:
    """File locks exclude threads with their own file objects as they exclude processes."""
    images = torch.rand(8, 3, 16, 16)
    computed: list[int] = []

    def compute() -> NetworkOutputs:
        computed.append(1)
        time.sleep(0.05)  # the others arrive meanwhile
        return NetworkOutputs(images.sum((2, 3)), {"layer": images})

    def outputs(_: int) -> NetworkOutputs:
        return SharedFeatures(tmp_path).outputs("network", pixels_key(images), compute, torch.device("cpu"))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(outputs, range(4)))
    assert computed == [1]
    assert all(torch.equal(result.features["layer"], images) for result in results)


def test_layouts_in_memory_survive(tmp_path: Path) -> None:
    """Later sums depend on the order of the values in memory in their last digit."""
    features = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    outputs = NetworkOutputs(torch.rand(2, 3, dtype=torch.float64), {"a.b": features, "c": features[:, 1:]})
    shared = SharedFeatures(tmp_path)
    for _ in range(2):
        read = shared.outputs("network", "images", lambda: outputs, torch.device("cpu"))
        assert read.logits.dtype == torch.float64 and torch.equal(read.logits, outputs.logits)
        assert {layer: values.stride() for layer, values in read.features.items()} == {
            layer: values.stride() for layer, values in outputs.features.items()
        }
        assert all(torch.equal(read.features[layer], values) for layer, values in outputs.features.items())
