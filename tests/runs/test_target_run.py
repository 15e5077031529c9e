"""Runs with class embeddings as the target, and with other ways of resizing images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import kdx
from kdx.choices import Resizing
from kdx.data.dataset import open_data
from kdx.data.images import load_images
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


def explained(folder: Path, resizing: Resizing = Resizing(), **settings: Any) -> kdx.Explanation[Any]:
    """The explanation of all images in one call, with the embedding of each image's class as the target."""
    dataset = replace(open_data(str(folder / "pictures"), CLASSES), resizing=resizing)
    images = load_images(dataset, np.arange(len(dataset)), SIZE)
    labels = dataset.labels[images.kept]
    trio = models_file.read_models(folder / "models.toml")
    networks: dict[str, Any] = {role: trio.load(role) for role in ROLES}
    with kdx.Explainer(**networks, layers=["layer2", "layer3"], runtime="eager", permutations=0, **settings) as explainer:
        if settings.get("geometry") == "reference":
            explainer.use_references(images.pixels, ROWS[labels])
        return explainer(images.pixels.numpy(), ROWS[labels], classes=labels)


CASES: dict[str, tuple[RunOptions, dict[str, Any]]] = {
    "whole": (replace(OPTIONS, geometry="whole"), {}),
    "batch": (replace(OPTIONS, batch=64), {}),
    "salient": (replace(SALIENT, batch=64, noise=0.0, salient_class="true"), {"features": "salient", "keep": 0.4, "salient_class": "true"}),
}


@pytest.mark.parametrize("name", CASES)
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
