"""Runs with class embeddings as the target, and with other ways of resizing images."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import kdx
from kdx.choices import GeometryName, Resizing
from kdx.commands import explain
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import load_images
from kdx.data.splits import stratified_splits
from kdx.models import models_file
from kdx.roles import ROLES
from kdx.runs.plan import RunOptions
from tests.runs.small_run import CLASSES, OPTIONS, SALIENT, SIZE, run

ROWS = np.random.default_rng(0).normal(size=(len(CLASSES), 5))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "words.csv"
    path.write_text("\n".join(f"{name},{','.join(map(repr, row.tolist()))}" for name, row in zip(CLASSES, ROWS, strict=True)))
    return path


def explained(folder: Path, resizing: Resizing = Resizing(), rows: Any = None, **settings: Any) -> kdx.Explanation[Any]:
    """The explanation of all images in one call, with the embedding of each image's class, or with rows by image, as the target."""
    dataset = replace(open_data(str(folder / "pictures"), CLASSES), resizing=resizing)
    images = load_images(dataset, np.arange(len(dataset)), SIZE)
    labels = dataset.labels[images.kept]
    trio = models_file.read_models(folder / "models.toml")
    networks: dict[str, Any] = {role: trio.load(role) for role in ROLES}
    with kdx.Explainer(**networks, layers=["layer2", "layer3"], runtime="eager", permutations=0, **settings) as explainer:
        if settings.get("geometry") == "reference":
            explainer.use_references(images.pixels, ROWS[labels])
        return explainer(images.pixels.numpy(), ROWS[labels] if rows is None else rows, classes=labels)


CASES: dict[str, tuple[RunOptions, dict[str, Any]]] = {
    "whole": (replace(OPTIONS, geometry="whole"), {}),
    "batch": (replace(OPTIONS, batch=64), {}),
    "salient": (replace(SALIENT, batch=64, noise=0.0, salient_class="true"), {"features": "salient", "keep": 0.4, "salient_class": "true"}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "batch")) for name in CASES])
def test_scores_of_a_run_are_those_of_the_embedding(name: str, folder: Path, target: Path, tmp_path: Path) -> None:
    options, settings = CASES[name]
    page = run(folder, tmp_path / "run", replace(options, target=target))
    expected = explained(folder, **settings)
    stored = json.loads((tmp_path / "run" / "scores.json").read_text())["layers"]
    for layer, result in expected.layers.items():
        values = {score: entry["value"] for score, entry in stored[layer]["scores"].items()}
        assert values == pytest.approx({score: value.value for score, value in result.scores.items()}, abs=1e-6)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["configuration"]["target"]["width"] == 5 and len(manifest["configuration"]["target"]["sha256"]) == 64
    assert "class embeddings in words.csv" in page.read_text("utf-8")
    with pytest.raises(kdx.KdxError, match=r"another run.*target"):
        run(folder, tmp_path / "run", options)


def teacher_outputs(folder: Path) -> tuple[Dataset, Tensor, Tensor]:
    """The data set, and the teacher's logits and spatial means at layer2 of all of its images, from plain calls of the module."""
    dataset = open_data(str(folder / "pictures"), CLASSES)
    pixels = load_images(dataset, np.arange(len(dataset)), SIZE).pixels
    module = models_file.read_models(folder / "models.toml").load("teacher").module
    features: list[Tensor] = []
    hook = module.layer2.register_forward_hook(lambda *arguments: features.append(arguments[-1].double().mean((2, 3))))  # type: ignore[union-attr]
    with torch.no_grad():
        logits = module((pixels - 0.5) / 0.5).double()
    hook.remove()
    return dataset, logits, features[0]


def stored_scores(out: Path, layer: str = "layer3") -> dict[str, float]:
    stored = json.loads((out / "scores.json").read_text())["layers"][layer]["scores"]
    return {score: entry["value"] for score, entry in stored.items()}


def means_without(rows: Tensor, labels: np.ndarray[Any, Any]) -> NDArray[np.float64]:
    """The mean of each image's class without the image."""
    values = rows.numpy()
    return np.stack([
        np.mean([values[j] for j in range(len(labels)) if j != i and labels[j] == labels[i]], axis=0) for i in range(len(labels))
    ])  # fmt: skip


@pytest.mark.parametrize("geometry", ["batch", pytest.param("whole", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("prototypes:teacher", marks=pytest.mark.slow),
        "prototypes:teacher,layer=layer2",
        "soft:teacher,temperature=0.5",
        "images:rows.csv",
    ],
)
def test_scores_are_those_of_rows_computed_by_hand(name: str, geometry: GeometryName, folder: Path, tmp_path: Path) -> None:
    dataset, logits, features = teacher_outputs(folder)
    own = np.random.default_rng(3).normal(size=(len(dataset), 4))
    (tmp_path / "rows.csv").write_text(
        "id,a,b,c,d\n"
        + "\n".join(f"{id_},{','.join(map(repr, row.tolist()))}" for id_, row in zip(dataset.ids, own, strict=True))
        + "\nx,1,2,3,4"
    )
    rows: dict[str, Any] = {
        "prototypes:teacher": means_without(logits, dataset.labels),
        "prototypes:teacher,layer=layer2": means_without(features, dataset.labels),
        "soft:teacher,temperature=0.5": (2 * logits).softmax(1).numpy(),
        "images:rows.csv": own,
    }
    stated = name.replace("rows.csv", str(tmp_path / "rows.csv"))
    options = replace(OPTIONS, batch=64, geometry=geometry, permutations=0, gallery=2, target=stated)
    page = run(folder, tmp_path / "run", options).read_text("utf-8")
    expected = {score: value.value for score, value in explained(folder, rows=rows[name]).layers["layer3"].scores.items()}
    assert stored_scores(tmp_path / "run") == pytest.approx(expected, abs=2e-5)
    noun = {
        "prototypes": "the class means of the network ",
        "soft": "the soft labels of the network ",
        "images": "the image embeddings in ",
    }[name.partition(":")[0]]
    assert f"measured against {noun}{name.partition(':')[2]}, not against" in page and "the labels" not in page
    identity = json.loads((tmp_path / "run" / "manifest.json").read_text())["configuration"]["target"]
    assert identity["kind"] == name.partition(":")[0] and len(identity["sha256"]) == 64


def test_class_means_are_those_of_the_train_split(folder: Path, tmp_path: Path) -> None:
    """The images explained are not among those averaged."""
    dataset, logits, _ = teacher_outputs(folder)
    splits = stratified_splits(dataset, OPTIONS.seed)
    train, test = splits["train"], splits["test"]
    means = np.stack([logits[train[dataset.labels[train] == label]].mean(0).numpy() for label in range(len(CLASSES))])
    run(folder, tmp_path / "run", replace(OPTIONS, batch=64, permutations=0, gallery=2, target="prototypes:teacher", split="test"))
    student = models_file.read_models(folder / "models.toml").load("student").module
    pixels = load_images(dataset, test, SIZE).pixels
    features: list[Tensor] = []
    student.layer3.register_forward_hook(lambda *arguments: features.append(arguments[-1]))  # type: ignore[union-attr]
    with torch.no_grad():
        student((pixels - 0.5) / 0.5)
    expected = kdx.rs(features[0], torch.from_numpy(means[dataset.labels[test]])).value
    assert stored_scores(tmp_path / "run")["RS(S)"] == pytest.approx(expected, abs=2e-5)


def test_the_models_file_states_the_target(folder: Path, target: Path, tmp_path: Path) -> None:
    """In a run, where the option takes precedence, and in Python, where labels stand for rows."""
    models = folder / "with_targets.toml"
    relative = os.path.relpath(target, folder)
    models.write_text(f'targets = "{relative}"\n' + (folder / "models.toml").read_text())
    options = replace(OPTIONS, batch=64, permutations=0, gallery=2)
    for name, chosen in (("file", options), ("labels", replace(options, target="labels"))):
        explain.run(str(folder / "pictures"), models, tmp_path / name, (), chosen, announce=lambda line: None)
    dataset = open_data(str(folder / "pictures"), CLASSES)
    for name, rows in (("file", ROWS[dataset.labels]), ("labels", dataset.labels)):
        expected = explained(folder, rows=rows).layers["layer3"].scores
        assert stored_scores(tmp_path / name) == pytest.approx({score: value.value for score, value in expected.items()}, abs=1e-6)
    assert stored_scores(tmp_path / "labels")["RS(S)"] != stored_scores(tmp_path / "file")["RS(S)"]
    pixels = load_images(dataset, np.arange(len(dataset)), SIZE).pixels
    with kdx.Explainer(models, layers=["layer3"], runtime="eager", permutations=0) as explainer:
        for labels in (dataset.labels, [CLASSES[label] for label in dataset.labels]):
            result = explainer(pixels, labels).layers["layer3"].scores
            assert {name: score.value for name, score in result.items()} == pytest.approx(stored_scores(tmp_path / "file"), abs=1e-6)
        with pytest.raises(kdx.KdxError, match=r"not one of the 3 classes of words\.csv"):
            explainer(pixels, dataset.labels + 1)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("soft:teacher,temperature=-1", "temperature of the target .* is not a positive number"),
        ("soft:teacher,temperature=hot", "is not a positive number"),
        ("prototypes:pupil", "names no network"),
        ("prototypes:teacher,layer=", "states no layer"),
        ("soft:random", "names no network"),
        ("images:missing.csv", r"missing\.csv cannot be read"),
        ("images:rows.npy", r"rows\.npy is not a file of rows by image"),
        ("prototypes", "names no network"),
        ("prototypes:teacher,layer=nowhere", "nowhere"),
    ],
)
def test_targets_that_do_not_work_are_refused_before_the_run(stated: str, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(kdx.KdxError, match=message):
        run(folder, tmp_path / "run", replace(OPTIONS, target=stated))
    assert not (tmp_path / "run").exists()


def test_images_without_a_row_and_targets_by_image_in_python_are_refused(folder: Path, tmp_path: Path) -> None:
    dataset = open_data(str(folder / "pictures"), CLASSES)
    np.savez(tmp_path / "rows.npz", allow_pickle=False, **{name: np.ones(2) for name in dataset.ids[:-2]})
    with pytest.raises(kdx.KdxError, match=r"has no row for 2 images, the first being"):
        run(folder, tmp_path / "run", replace(OPTIONS, target=f"images:{tmp_path / 'rows.npz'}"))
    (tmp_path / "rows.csv").write_text("\n".join(f"{name},1,{place}" for place, name in enumerate([*dataset.ids, dataset.ids[3]])))
    with pytest.raises(kdx.KdxError, match="have an image twice"):
        run(folder, tmp_path / "run", replace(OPTIONS, target=f"images:{tmp_path / 'rows.csv'}"))
    file = replace(models_file.read_models(folder / "models.toml"), targets="soft:teacher")
    images, rows = np.random.default_rng(0).random((8, 3, *SIZE)), np.eye(8)[:, :3]
    with kdx.Explainer(file, layers=["layer3"], runtime="eager", permutations=0) as explainer:
        with pytest.raises(kdx.KdxError, match="has a row per image, which only a run"):
            explainer(images, [0, 1] * 4)
        own = explainer(images, rows).layers["layer3"].scores["RS(S)"].value
    with kdx.Explainer(replace(file, targets=None), layers=["layer3"], runtime="eager", permutations=0) as explainer:
        assert explainer(images, rows).layers["layer3"].scores["RS(S)"].value == own


@pytest.mark.slow
def test_references_have_the_embedding_too(folder: Path, target: Path, tmp_path: Path) -> None:
    """With labels in place of the embedding, the maps would differ; with another geometry, the run would fail for the shapes."""
    kinds = []
    for name, chosen in (("labels", None), ("words", target)):
        out = tmp_path / name
        run(folder, out, replace(OPTIONS, geometry="reference", reference_images=8, target=chosen))
        kinds.append(json.loads((out / "scores.json").read_text())["layers"]["layer3"])
    assert kinds[0]["scores"]["RS(S)"]["value"] != kinds[1]["scores"]["RS(S)"]["value"]
    assert kinds[0]["maps"]["distilled"]["strength"] != kinds[1]["maps"]["distilled"]["strength"]
    assert kinds[0]["scores"]["FSS(S,T)"]["value"] == kinds[1]["scores"]["FSS(S,T)"]["value"]


def test_the_resize_reaches_networks_and_page_and_is_recorded(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(folder, out, replace(OPTIONS, batch=64, resize="squash", interpolation="bilinear"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["configuration"]["resize"] == {"mode": "squash", "interpolation": "bilinear"}
    dataset = open_data(str(folder / "pictures"), CLASSES)
    row = min(int(path.stem) for path in (out / "overlays").glob("?????.png"))
    expected = dataset.read(row).resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(Image.open(out / "overlays" / f"{row:05d}.png").convert("RGB")), np.asarray(expected))
