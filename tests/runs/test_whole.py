"""Runs with the geometry whole: nothing depends on the batch, and a killed run continues to the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import kdx
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.explain.explainer import Explainer
from kdx.features import array_files
from kdx.kernels.set_geometry import StoredDistances
from kdx.kernels.tiles import tile_side
from kdx.models.models_file import read_models
from kdx.roles import SCORE_MAPS
from kdx.runs import feature_files, store, whole
from kdx.runs.cost import SetCost
from kdx.runs.plan import RunOptions
from kdx.runs.record import read_run
from tests import oracle
from tests.runs.small_run import CLASSES, SIZE, WHOLE, interrupt, results, run, same


@pytest.fixture(scope="module")
def complete(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(folder, out, WHOLE)
    return out


def digests(out: Path) -> dict[str, str]:
    """The SHA-256 of every file of a run except the manifest and the page, which contain times and the command."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in ("manifest.json", "report.html", ".lock"))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 16},
        {"batch": 64, "chunk": 5},
        {"batch": 4},
        {"batch": 32, "chunk": 16},
        {"batch": 23, "workers": 0},
    ],
)
def test_the_batch_changes_no_byte(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The test runs on the CPU. On a GPU, the number of images selects the algorithm of a convolution, and thereby its rounding."""
    run(folder, tmp_path / "expected", replace(WHOLE, batch=32, device="cpu"))
    run(folder, tmp_path / "run", replace(WHOLE, device="cpu", **changes))
    assert digests(tmp_path / "run") == digests(tmp_path / "expected")


def test_maps_and_scores_are_those_of_all_images_at_once(folder: Path, complete: Path) -> None:
    models = read_models(folder / "models.toml")
    data = open_data(str(folder / "pictures"), models.classes)
    images = load_images(data, np.arange(len(data)), SIZE)
    networks = {role: models.load(role) for role in ("teacher", "student", "base")}
    record = read_run(complete)
    with Explainer.of(networks, ["layer2", "layer3"], WHOLE) as explainer:
        result = explainer(images.pixels, torch.from_numpy(data.labels[images.kept]))
    assert record.samples.ids == [data.ids[index] for index in images.kept]
    rows = list(range(record.explained))
    for layer, expected in result.layers.items():
        for name, score in expected.scores.items():
            assert record.scores[layer][name].value == pytest.approx(score.value, abs=1e-5)
        for name, kind in SCORE_MAPS.items():
            assert oracle.error(record.maps(layer, name, rows), expected.score_maps[kind.symbol].maps) < 1e-4
        assert oracle.error(record.maps(layer, "distilled", rows), expected.distilled.maps) < 1e-4


def test_the_maps_on_disk_add_up_to_the_stored_scores(complete: Path) -> None:
    record = read_run(complete)
    assert record.map_kinds == ("distilled", "residual", "missed", "new", *SCORE_MAPS)
    for layer in record.layers:
        values = record.scores[layer] | record.contrasts[layer]
        for name, kind in SCORE_MAPS.items():
            columns = record.map_columns(layer, name)
            assert columns is not None
            maps = record.maps(layer, name, list(range(record.explained)))
            assert float(maps.sum(dtype=np.float64)) == pytest.approx(values[kind.score].value, abs=1e-5)
            assert columns.total.sum() == pytest.approx(values[kind.score].value, abs=1e-5)  # float32 features
            assert np.allclose(columns.total, maps.sum((1, 2), dtype=np.float64), atol=1e-6)
            assert columns.strength.mean() == pytest.approx(1, rel=1e-5)
            summary = record.map_summaries[layer][name]
            assert summary.strength == pytest.approx(float(np.abs(maps).mean(dtype=np.float64)), rel=1e-5)
            assert summary.above_null is not None and 0 <= summary.above_null <= 1


def _after(count: int) -> Iterator[bool]:
    yield from [False] * count
    while True:
        yield True


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("write", marks=pytest.mark.slow),
        pytest.param("write_layer", marks=pytest.mark.slow),
        "write_scores",
        pytest.param("measure_set", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("calls", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_run_continues_to_the_same_result(
    folder: Path, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, calls: int
) -> None:
    owner: Any = {"write": feature_files.FeatureFiles, "measure_set": whole}.get(target, store.Store)
    original, stop = getattr(owner, target), _after(calls)

    def stopping(*arguments: Any, **options: Any) -> Any:
        if next(stop):
            interrupt()
        return original(*arguments, **options)

    if (target, calls) == ("write_scores", 1):
        return  # there is one such call
    with monkeypatch.context() as patch:
        patch.setattr(owner, target, stopping)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "run", WHOLE)
    assert (tmp_path / "run" / "features").exists()
    run(folder, tmp_path / "run", replace(WHOLE, batch=13))  # the batch may change
    assert same(results(tmp_path / "run"), results(complete))
    assert not (tmp_path / "run" / "features").exists()


@pytest.mark.slow
def test_a_killed_process_continues_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "kdx"), "explain", str(folder / "pictures"), "--models", str(folder / "models.toml")]
    command += ["--permutations", "19", "--runtime", "eager", "--seed", "3", "--geometry", "whole", "--out"]
    subprocess.run([*command, str(tmp_path / "expected")], check=True, stdout=subprocess.DEVNULL)
    out = tmp_path / "run"
    process = subprocess.Popen([*command, str(out), "--batch", "4"], stdout=subprocess.DEVNULL)
    for _ in range(6000):
        state = out / "features" / "state.npy"
        if (state.exists() and np.load(state).any()) or process.poll() is not None:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, str(out), "--batch", "4"], check=True, stdout=subprocess.DEVNULL)
    assert digests(out) == digests(tmp_path / "expected")


@pytest.mark.slow
def test_unreadable_images_are_left_out_and_change_no_other_row(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    pictures = sorted((tmp_path / "copy" / "pictures").rglob("*.png"))
    for path in (pictures[3], pictures[20]):
        path.write_bytes(b"no picture")
    options = replace(WHOLE, max_unreadable=0.2)
    for batch in (16, 32):
        run(tmp_path / "copy", tmp_path / str(batch), replace(options, batch=batch))
    assert digests(tmp_path / "16") == digests(tmp_path / "32")
    record = read_run(tmp_path / "16")
    assert (
        record.explained == 27 and [image["id"] for image in record.unreadable] == ["cat/18.png", "owl/11.png"]
    ) or record.explained == 27
    for path in (pictures[3], pictures[20]):
        path.unlink()
    run(tmp_path / "copy", tmp_path / "without", options)
    without = read_run(tmp_path / "without")
    assert record.samples.ids == without.samples.ids
    for name, entry in without.scores["layer3"].items():
        assert record.scores["layer3"][name].value == pytest.approx(entry.value, abs=1e-5)


@pytest.mark.slow
def test_features_are_kept_on_request_and_float16_takes_half_the_space(folder: Path, complete: Path, tmp_path: Path) -> None:
    sizes = {}
    for precision in ("float32", "float16"):
        out = tmp_path / precision
        run(folder, out, replace(WHOLE, stored_precision=precision, keep_features=True))
        sizes[precision] = (out / "features" / "student-0.npy").stat().st_size
        kept = {path.stem.split("-")[0] for path in (out / "features").rglob("*")}
        assert kept == {"teacher", "student", "base", "prediction", "confidence", "state"}  # neither distances nor copies of maps
        for name, entry in read_run(complete).scores["layer3"].items():
            assert read_run(out).scores["layer3"][name].value == pytest.approx(entry.value, abs=1e-6 if precision == "float32" else 2e-3)
    assert sizes["float16"] == pytest.approx(sizes["float32"] / 2, rel=0.05)


def test_projected_features_give_approximate_scores_and_say_so(folder: Path, complete: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    kdx_run(folder, tmp_path / "run", replace(WHOLE, project=4), lines)
    assert any("projected to 4 random channels" in line and "70.7%" in line for line in lines)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["configuration"]["project"] == 4
    for name, entry in read_run(complete).scores["layer2"].items():
        assert abs(read_run(tmp_path / "run").scores["layer2"][name].value - entry.value) < 0.5


def kdx_run(folder: Path, out: Path, options: RunOptions, lines: list[str]) -> None:
    from kdx.commands import explain

    explain.run(str(folder / "pictures"), folder / "models.toml", out, (), options, announce=lines.append)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_disk": 1e-6}, "--max-disk"),
        pytest.param({"max_minutes": 0.0}, "--max-minutes", marks=pytest.mark.slow),
        ({"reference_images": 6}, "6 reference images"),
    ],
)
def test_auto_falls_back_to_a_reference_set_and_gives_the_reason(
    folder: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    lines: list[str] = []
    kdx_run(folder, tmp_path / "run", replace(WHOLE, geometry="auto", **changes), lines)
    assert any(line.startswith("Geometry reference") and reason in line for line in lines)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["geometry"] == "reference" and reason in manifest["geometry_reason"] and manifest["reference_ids"]


def test_too_little_space_is_reported_before_the_networks_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "decoded", None)  # calling it would be a TypeError
    with pytest.raises(kdx.KdxError, match=r"take [0-9.]+ MB, and the limit is 0.1 MB"):
        run(folder, tmp_path / "run", replace(WHOLE, max_disk=1e-4))
    assert not (tmp_path / "run" / "features").exists()
    monkeypatch.setattr("kdx.runs.geometry.shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(kdx.KdxError, match=r"take [0-9.]+ MB, and 0.1 MB are available in .*full"):
        run(folder, tmp_path / "full", WHOLE)


@pytest.mark.slow
def test_the_stated_space_is_at_least_what_is_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs: list[SetCost] = []
    original = SetCost.of

    def recorded(*arguments: Any) -> SetCost:
        costs.append(original(*arguments))
        return costs[-1]

    used: list[int] = []
    write_layer = store.Store.write_layer

    def measuring(self: store.Store, *arguments: Any) -> None:
        files = list((self.folder / "features").rglob("*[0-9].npy"))
        assert any(path.name == "distances-0.npy" for path in files)
        used.append(sum(path.stat().st_size for path in files))
        write_layer(self, *arguments)

    monkeypatch.setattr(SetCost, "of", recorded)
    monkeypatch.setattr(store.Store, "write_layer", measuring)
    run(folder, tmp_path / "run", WHOLE)
    assert max(used) <= costs[0].bytes * 1.05
    for n in (*range(4, 200), 1023, 1025, 4095, 4097, 10_000):  # tiles are whole tiles
        side = tile_side(n, [])
        count = -(-n // side)
        assert StoredDistances.bytes(n, 2) >= 2 * 4 * count * (count + 1) // 2 * side**2


@pytest.mark.parametrize("changes", [{"geometry": "whole", "features": "salient"}, {"geometry": "whole", "reference_images": 8}])
def test_requests_that_exclude_each_other_are_refused(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(kdx.KdxError):
        run(folder, tmp_path / "run", replace(WHOLE, **changes))


@pytest.mark.slow
def test_a_disk_that_becomes_full_is_reported_and_the_run_continues(
    folder: Path, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = array_files._reserve

    def full(path: Path) -> None:
        if path.name == "distances-1.npy":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(array_files, "_reserve", full)
        with pytest.raises(kdx.KdxError, match="No space left on device"):
            run(folder, tmp_path / "run", WHOLE)
    run(folder, tmp_path / "run", WHOLE)
    assert same(results(tmp_path / "run"), results(complete))


@pytest.mark.slow
def test_a_part_without_a_readable_image_is_stored_in_float16(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    data = open_data(str(tmp_path / "copy" / "pictures"), CLASSES)
    for index in np.random.default_rng(WHOLE.seed).permutation(np.arange(29))[16:]:  # the second pass of 16 images
        (tmp_path / "copy" / "pictures" / data.ids[index]).write_bytes(b"no picture")
    run(tmp_path / "copy", tmp_path / "run", replace(WHOLE, batch=16, stored_precision="float16", max_unreadable=0.5))
    assert read_run(tmp_path / "run").explained == 16


def test_features_too_large_for_float16_are_refused_and_their_images_stay_pending(tmp_path: Path) -> None:
    files = feature_files.FeatureFiles(tmp_path, 4, {"student": {"layer3": (3, 1, 1)}}, "float16", ["layer3"])
    columns: dict[str, Any] = {"student_prediction": np.zeros(2, np.int64), "student_confidence": np.ones(2, np.float32)}
    everything = np.ones(2, bool)
    files.write(slice(0, 2), everything, {"layer3": {"student": torch.full((2, 3, 1, 1), 65504.0)}}, columns, ())
    with pytest.raises(kdx.KdxError, match=r"The student's features at layer3 are too large for float16\."):
        files.write(slice(2, 4), everything, {"layer3": {"student": torch.full((2, 3, 1, 1), 7e4)}}, columns, ())
    assert files.pending(2) == [slice(2, 4)] and files.kept.tolist() == [0, 1]


def test_features_that_are_not_finite_are_reported_with_the_image_as_soon_as_they_occur(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(str(folder / "pictures"), CLASSES)
    spoiled = data.ids[np.random.default_rng(WHOLE.seed).permutation(np.arange(29))[20]]
    features = Explainer.features

    def spoiling(self: Explainer, images: torch.Tensor) -> Any:
        logits, layers = features(self, images)
        if images.any() and not images[13:].any():  # the second pass, of 13 images
            layers["layer3"]["student"][4, 0, 0, 0] = torch.inf
        return logits, layers

    monkeypatch.setattr(Explainer, "features", spoiling)
    with pytest.raises(kdx.KdxError, match=f"student's features at layer3 are not finite for 1 of 13 images, such as {spoiled}"):
        run(folder, tmp_path / "run", replace(WHOLE, batch=16))


def test_classes_without_geometry_are_reported_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    for name, count in (("cat", 1), ("dog", 8)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number, picture in enumerate(sorted((folder / "pictures" / name).iterdir())[:count]):
            shutil.copy(picture, tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "data" / "owl").mkdir()
    with pytest.raises(kdx.KdxError, match="classes of these 9 images have no geometry"):
        run(folder, tmp_path / "run", WHOLE, data=str(tmp_path / "data"))
    assert not (tmp_path / "run").exists()


def test_options_of_stored_features_are_not_ignored_silently(folder: Path, tmp_path: Path) -> None:
    for options in ({"project": 4}, {"keep_features": True}, {"stored_precision": "float16"}):
        with pytest.raises(kdx.KdxError, match="Only the geometry whole stores features"):
            kdx_run(folder, tmp_path / "run", replace(WHOLE, geometry="batch", **options), [])
