"""`kdx explain` with an explainer file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from PIL import Image

from kdx.commands import explain
from kdx.data.batches import random_batches
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.errors import KdxError
from kdx.roles import score_maps_among
from kdx.runs import store
from kdx.runs.run import RunOptions
from tests import command_line as commands
from tests.explain.written_files import CLASSES, FIXED, MAPS_AGREE, Written, by_pytorch, worst


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(26):
        place = root / CLASSES[number % 3]
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (14, 17, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def finished(pair: Written, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    arguments = [pictures, "--models", pair.path, "--out", out, "--batch", 9, "--permutations", 19, "--seed", 3]
    assert commands.status_of("explain", *arguments) == 0
    return out


def stored(out: Path) -> dict[str, Any]:
    group = zarr.open_group(out / "maps.zarr", mode="r")
    return {
        "scores": (out / "scores.json").read_bytes(),
        "samples": pq.read_table(out / "samples.parquet").to_pydict(),
        **{name: np.asarray(group[f"layer2/{name}"]).tolist() for name in ("distilled", "residual")},
    }


@pytest.mark.slow
def test_kdx_explain_of_a_file_is_a_run_like_any_other(pair: Written, pictures: Path, finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["images"]["explained"] == 26
    assert manifest["environment"]["runtime"] == "onnx on cpu" and manifest["random_weights"] == []
    configuration = manifest["configuration"]
    assert configuration["layers"] == {"layer2": "layer2"} and configuration["image_size"] == list(FIXED)
    for role, network in pair.networks.items():
        entry = configuration["models"][role]
        assert (entry["reference"], entry["sha256"], entry["parameters"]) == (network.reference, network.weights_hash, network.parameters)
        assert entry["preprocessing"] == json.loads(json.dumps(asdict(network.preprocessing)))
    assert set(configuration["models"]) == {"student", "base"}
    page = (finished / "report.html").read_text()
    assert "How the student differs from the base" in page and "its teacher" not in page
    dataset = open_data(str(pictures), CLASSES)
    samples = pq.read_table(finished / "samples.parquet").to_pylist()
    group = zarr.open_group(finished / "maps.zarr", mode="r")
    with by_pytorch(pair.networks, layers="layer2", permutations=0) as explainer:
        for number, batch in enumerate(random_batches(dataset.labels, 9, 3)):
            expected = explainer(load_images(dataset, batch, FIXED).pixels, torch.from_numpy(dataset.labels[batch]))
            rows = [row for row in samples if row["batch"] == number]
            assert [row["id"] for row in rows] == [dataset.ids[i] for i in batch]
            assert [row["student_prediction"] for row in rows] == expected.logits["student"].argmax(1).tolist()
            for name in ("distilled", "residual"):
                maps = np.asarray(group[f"layer2/{name}"])[[row["row"] for row in rows]]
                assert worst(maps, getattr(expected.layers["layer2"], name).maps) <= MAPS_AGREE


@pytest.mark.slow
def test_its_signed_maps_add_up_to_its_scores(finished: Path) -> None:
    layer = json.loads((finished / "scores.json").read_text())["layers"]["layer2"]
    values = {name: entry["value"] for name, entry in layer["scores"].items()}
    group = zarr.open_group(finished / "maps.zarr", mode="r")
    rows = pq.read_table(finished / "samples.parquet").to_pydict()["row"]
    for name, kind in score_maps_among(("student", "base")).items():
        more, _, less = kind.score.partition(" - ")
        total = np.asarray(group[f"layer2/{name}"], dtype=np.float64)[rows].sum()
        assert total == pytest.approx(values[more] - (values[less] if less else 0), abs=1e-4)


@pytest.mark.slow
def test_a_stopped_run_of_a_file_resumes(pair: Written, pictures: Path, finished: Path, tmp_path: Path) -> None:
    options = RunOptions(batch=9, permutations=19, seed=3)
    arguments: Any = (str(pictures), pair.path, tmp_path / "run", (), options)
    lines: list[str] = []

    def stopping(self: store.Store, batch: int, *rest: Any) -> None:
        if batch == 1:
            raise KeyboardInterrupt
        write(self, batch, *rest)

    write = store.Store.write_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "write_batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            explain.run(*arguments, announce=lambda line: None)
    explain.run(*arguments, announce=lines.append)
    assert any("Resuming: 1 of 3" in line for line in lines)
    assert stored(tmp_path / "run") == stored(finished)


@pytest.mark.parametrize(
    ("change", "layers", "message"),
    [
        ({"reference_images": 8}, (), "only with the other images of its batch"),
        ({"chunk": 4}, (), "takes a whole batch at once"),
        ({"objective": "uniqueness"}, (), "not uniqueness and gap"),
        ({"runtime": "eager"}, (), "cannot run in PyTorch"),
        ({}, ("layer1",), "does not contain the layer 'layer1'"),
    ],
)
def test_options_that_a_file_does_not_support_are_refused_before_anything_is_written(
    pair: Written, pictures: Path, tmp_path: Path, change: dict[str, Any], layers: tuple[str, ...], message: str
) -> None:
    with pytest.raises(KdxError, match=message):
        explain.run(str(pictures), pair.path, tmp_path / "run", layers, replace(RunOptions(batch=9), **change))
    assert not (tmp_path / "run").exists()


def test_a_run_of_a_file_of_features_is_refused(features_file: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(KdxError, match="is a file of features, not an explainer"):
        explain.run(str(pictures), features_file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_class_embeddings_are_the_target_of_a_file_too(pair: Written, pictures: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(4).normal(size=(len(CLASSES), 6))
    np.save(tmp_path / "words.npy", rows)
    arguments = [pictures, "--models", pair.path, "--out", tmp_path / "run", "--batch", 64, "--permutations", 0]
    assert commands.status_of("explain", *arguments, "--target", tmp_path / "words.npy") == 0
    dataset = open_data(str(pictures), CLASSES)
    (batch,) = random_batches(dataset.labels, 64, 0)
    with by_pytorch(pair.networks, layers="layer2", permutations=0) as explainer:
        expected = explainer(load_images(dataset, batch, FIXED).pixels, torch.from_numpy(rows[dataset.labels[batch]])).layers["layer2"]
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["layers"]["layer2"]["scores"]
    for name, score in expected.scores.items():
        assert scores[name]["value"] == pytest.approx(score.value, abs=1e-4)
    samples = pq.read_table(tmp_path / "run" / "samples.parquet").to_pydict()
    order = [samples["id"].index(dataset.ids[image]) for image in batch]
    maps = np.asarray(zarr.open_group(tmp_path / "run" / "maps.zarr", mode="r")["layer2/distilled"])[np.array(samples["row"])[order]]
    assert worst(torch.from_numpy(maps), expected.distilled.maps) < MAPS_AGREE
