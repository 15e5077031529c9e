"""A run over a data set: what it stores, and what does not change its results."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr

import kdx
from kdx.commands import explain
from kdx.data.batches import random_batches
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.models import models_file
from kdx.roles import ROLES, pairs_among, score_maps_among
from kdx.scores import uncertainty
from tests.runs.small_run import CLASSES, OPTIONS, SIZE, results, run, same


def test_a_run_stores_the_explainers_results(folder: Path, finished: Path) -> None:
    dataset = open_data(str(folder / "pictures"), CLASSES)
    batches = random_batches(dataset.labels, 9, 3)
    samples = pq.read_table(finished / "samples.parquet").to_pylist()
    assert sorted(row["id"] for row in samples) == sorted(dataset.ids)
    group = zarr.open_group(finished / "maps.zarr", mode="r")
    trio = models_file.read_models(folder / "models.toml")
    teacher, student, base = (trio.load(role) for role in ROLES)
    with kdx.Explainer(
        teacher=teacher, student=student, base=base, layers=["layer2", "layer3"], runtime="eager", permutations=0
    ) as explainer:
        for number, batch in enumerate(batches):
            expected = explainer(load_images(dataset, batch, SIZE).pixels, torch.from_numpy(dataset.labels[batch]))
            rows = [row for row in samples if row["batch"] == number]
            assert [row["id"] for row in rows] == [dataset.ids[i] for i in batch]
            assert [row["label"] for row in rows] == dataset.labels[batch].tolist()
            for role in ROLES:
                assert [row[f"{role}_prediction"] for row in rows] == expected.logits[role].argmax(1).tolist()
            for layer, actual in expected.layers.items():
                for name in pairs_among(ROLES):
                    stored = np.asarray(group[f"{layer}/{name}"])[[row["row"] for row in rows]]
                    assert np.allclose(stored, getattr(actual, name).maps, rtol=1e-4, atol=1e-6)


def test_files_agree_with_each_other(finished: Path) -> None:
    content = json.loads((finished / "scores.json").read_text())
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["images"] == {"planned": 29, "explained": 29, "unreadable": [], "trained_on": None}
    assert not (finished / "progress").exists()
    with (finished / "scores.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 3 + 2 * (9 + 4)
    for row, role in zip(table[:3], ("T", "B", "S"), strict=True):
        assert (row["layer"], row["score"], row["n"]) == ("", f"accuracy({role})", "29")
    for row in table[3:]:
        entry = content["layers"][row["layer"]]
        score = (entry["scores"] | entry["contrasts"])[row["score"]]
        assert float(row["value"]) == score["value"] and [float(row["low"]), float(row["high"])] == list(score["interval"])
    samples = pq.read_table(finished / "samples.parquet").to_pylist()
    for role in ROLES:
        right = sum(row[f"{role}_prediction"] == row["label"] for row in samples)
        accuracy = content["accuracy"][role]
        assert (accuracy["correct"], accuracy["n"]) == (right, 29)
        assert accuracy["interval"][0] < accuracy["value"] < accuracy["interval"][1]
    assert (finished / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_every_batch_has_its_own_permutations(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[torch.Tensor] = []

    def recorded(*arguments: Any) -> torch.Tensor:
        tables.append(uncertainty.permutation_table(*arguments))
        return tables[-1]

    monkeypatch.setattr("kdx.explain.batch_target.permutation_table", recorded)
    run(folder, tmp_path / "run")
    assert len(tables) == 4 and not torch.equal(tables[1], tables[2]) and tables[1].shape == tables[2].shape


def test_a_file_name_that_is_not_text_is_escaped(folder: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    torn = Path(os.fsdecode(os.fsencode(pictures / "dog") + b"/\xff.png"))
    try:
        (pictures / "dog" / "1.png").rename(torn)
    except OSError:
        pytest.skip("this file system takes text only")
    run(folder, tmp_path / "run", data=str(pictures))
    assert "dog/\\xff.png" in pq.read_table(tmp_path / "run" / "samples.parquet").to_pydict()["id"]


@pytest.mark.slow
def test_the_chunk_does_not_change_the_results(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(folder, out, replace(OPTIONS, chunk=4))
    whole, parts = results(finished), results(out)
    assert parts["samples"]["student_prediction"] == whole["samples"]["student_prediction"]
    for key in (key for key in whole if key.startswith("layer")):
        assert np.allclose(parts[key], whole[key], rtol=1e-3, atol=1e-5 * np.abs(whole[key]).max())


@pytest.mark.slow
def test_the_number_of_decoding_threads_does_not_change_the_results(folder: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    (pictures / "dog" / "1.png").write_bytes(b"no picture")
    actual = {}
    for workers in (0, 2, None):
        out = tmp_path / f"run-{workers}"
        run(folder, out, replace(OPTIONS, workers=workers), data=str(pictures))
        actual[workers] = results(out)
    assert [image["id"] for image in actual[0]["images"]["unreadable"]] == ["dog/1.png"]
    assert same(actual[2], actual[0]) and same(actual[None], actual[0])


def test_in_reference_mode_a_map_does_not_depend_on_its_batch(folder: Path, tmp_path: Path) -> None:
    maps = {}
    for batch in (9, 16):
        run(folder, tmp_path / str(batch), replace(OPTIONS, batch=batch, geometry="reference", reference_images=10))
        samples = pq.read_table(tmp_path / str(batch) / "samples.parquet").to_pylist()
        stored = np.asarray(zarr.open_group(tmp_path / str(batch) / "maps.zarr", mode="r")["layer3/distilled"])
        maps[batch] = np.stack([stored[row["row"]] for row in sorted(samples, key=lambda row: str(row["id"]))])
    assert np.abs(maps[9] - maps[16]).max() < 1e-3 * maps[9].max()


def test_a_corrupt_image_is_skipped_and_named(folder: Path, tmp_path: Path) -> None:
    pictures = torn(folder, tmp_path, 1)
    with pytest.raises(kdx.KdxError, match=r"1 of 30 images cannot be read.*torn0\.png"):
        run(folder, tmp_path / "run", replace(OPTIONS, max_unreadable=0), data=str(pictures))
    # The hint of the error resumes the run that stopped.
    lines: list[str] = []
    explain.run(str(pictures), folder / "models.toml", tmp_path / "run", (), OPTIONS, announce=lines.append)
    assert [line for line in lines if line.startswith("1 image is left out because unreadable, first dog/torn0.png: ")]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["images"]["explained"] == 29
    assert [entry["id"] for entry in manifest["images"]["unreadable"]] == ["dog/torn0.png"]
    assert "torn0.png" in (tmp_path / "run" / "report.html").read_text()
    ids = pq.read_table(tmp_path / "run" / "samples.parquet").to_pydict()["id"]
    assert len(ids) == 29 and "dog/torn0.png" not in ids


@pytest.mark.parametrize(
    ("count", "limit", "passes"), [(1, 0.01, True), (2, 0.01, False), (2, 0.05, False), pytest.param(2, 0.07, True, marks=pytest.mark.slow)]
)
def test_a_share_of_corrupt_images_is_allowed_and_one_image_always(
    folder: Path, tmp_path: Path, count: int, limit: float, passes: bool
) -> None:
    """With 29 readable images, 7 % allow two corrupt ones and 5 % allow one."""
    pictures, options = torn(folder, tmp_path, count), replace(OPTIONS, max_unreadable=limit)
    if passes:
        run(folder, tmp_path / "run", options, data=str(pictures))
    else:
        with pytest.raises(kdx.KdxError, match=f"{count} of {29 + count} images cannot be read"):
            run(folder, tmp_path / "run", options, data=str(pictures))


def torn(folder: Path, tmp_path: Path, count: int) -> Path:
    """A copy of the pictures with ``count`` corrupt ones added."""
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    for number in range(count):
        (pictures / "dog" / f"torn{number}.png").write_bytes((pictures / "dog" / "1.png").read_bytes()[:60])
    return pictures


@pytest.mark.slow
def test_one_batch_alone_has_an_interval_from_its_images(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", replace(OPTIONS, batch=64))
    content = json.loads((tmp_path / "run" / "scores.json").read_text())
    low, high = content["layers"]["layer3"]["scores"]["FSS(S,T)"]["interval"]
    assert -1 < low < high < 1


def test_without_a_teacher_the_other_results_are_the_same(folder: Path, pair: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    explain.run(str(folder / "pictures"), pair, out, (), OPTIONS, announce=lambda line: None)
    actual, whole = (json.loads((path / "scores.json").read_text()) for path in (out, finished))
    assert actual["accuracy"] == {role: whole["accuracy"][role] for role in ("student", "base")}
    for layer, entry in actual["layers"].items():
        assert list(entry["scores"]) == ["RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)"] and list(entry["contrasts"]) == [
            "RS(S|B) - RS(B|S)",
            "RS(S) - RS(B)",
        ]
        for kind in ("scores", "contrasts"):
            for name, score in entry[kind].items():
                expected = whole["layers"][layer][kind][name]
                assert score["value"] == pytest.approx(expected["value"], abs=1e-9)
                assert score["interval"] == pytest.approx(expected["interval"], abs=1e-7) and score["p_value"] == expected["p_value"]
    samples, expected_samples = (pq.read_table(path / "samples.parquet").to_pydict() for path in (out, finished))
    of_teacher = ("teacher", "fss_", "/missed/", "/new/")
    assert set(samples) == {name for name in expected_samples if not any(part in name for part in of_teacher)}
    for name, values in samples.items():
        if "/" not in name:
            assert values == expected_samples[name]
        elif not name.endswith("stability"):
            assert np.allclose(values, expected_samples[name], rtol=1e-4, atol=1e-6), name
    group, maps = (zarr.open_group(path / "maps.zarr", mode="r") for path in (out, finished))
    for layer in ("layer2", "layer3"):
        names = sorted(group[layer])  # type: ignore[arg-type]
        assert names == sorted(["distilled", "residual", *score_maps_among(("student", "base"))])
        for name in names:
            assert np.allclose(np.asarray(group[f"{layer}/{name}"]), np.asarray(maps[f"{layer}/{name}"]), rtol=1e-4, atol=1e-6)
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["configuration"]["models"]) == {"student", "base"}
    with (out / "scores.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 + 2 * (4 + 2)
    drawn = {path.stem.split("_", 2)[2] for path in (out / "overlays").glob("*_*.png")}
    assert drawn == {"distilled", "residual", "rs_student_minus_base"}
    page = (out / "report.html").read_text()
    assert "How the student differs from the base" in page and "its teacher" not in page


def test_random_weights_are_announced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    load = models_file.ModelsFile.load

    def untrained(self: models_file.ModelsFile, role: str) -> Any:
        return replace(load(self, role), trained=role != "base")

    monkeypatch.setattr(models_file.ModelsFile, "load", untrained)
    explain.run(str(folder / "pictures"), folder / "models.toml", tmp_path / "run", (), OPTIONS, announce=lines.append)
    assert [line.partition(",")[0] for line in lines if "random" in line] == ["Some or all weights of the base are random: kdx:resnet"]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["random_weights"] == ["base"]
