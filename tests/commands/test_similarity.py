"""`kdx similarity`: its numbers against those of the features, and its files."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kdx
from kdx.commands import similarity as command
from kdx.commands.similarity import run
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.errors import KdxError, Stopped
from kdx.export.graphs import FeatureGraph
from kdx.features.projection import Sketch
from kdx.features.rows import InMemory
from kdx.kernels import layer_sums
from kdx.kernels.tiles import FeatureDistances
from kdx.models.network import load
from kdx.runs.similarity_networks import ComparedNetworks
from kdx.runs.similarity_options import SimilarityOptions
from kdx.runs.similarity_sums import kept_similarity

A = "small_nets:wide"
B = "small_nets:narrow"

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width, dead):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 1))
        self.dead, self.fc = nn.Linear(4, 3), nn.Linear(4, 2)
        nn.init.zeros_(self.dead.weight)

    def forward(self, x):
        x = self.second(self.first(x)).mean((2, 3))
        return self.fc(x) + self.dead(x).sum(1, keepdim=True)

def wide():
    torch.manual_seed(0)
    return Net(6, False)

def narrow():
    torch.manual_seed(1)
    return Net(3, True)
"""

LAYERS = {"A": ("first", "second", "fc"), "B": ("first", "dead:vector", "fc")}

OPTIONS = SimilarityOptions(layers=LAYERS, image_size=12, runtime="eager", batch=8, workers=0, seed=2)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small_nets.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    rng = np.random.default_rng(0)
    for place in range(26):
        folder = tmp_path / "pictures" / ("cat" if place % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / f"{place}.png")
    return tmp_path / "pictures"


def features(reference: str, layers: tuple[str, ...], pictures: Path) -> dict[str, torch.Tensor]:
    data = open_data(str(pictures))
    pixels = load_images(data, np.arange(len(data)), (12, 12)).pixels
    network = load(reference)
    with torch.no_grad():
        _, *maps = FeatureGraph(network.module.eval(), layers, network.preprocessing)(pixels)
    return dict(zip(layers, maps, strict=True))


def compare(pictures: Path, out: Path, references: dict[str, str] | None = None, **changes: Any) -> tuple[kdx.Similarity, list[str]]:
    lines: list[str] = []
    options = SimilarityOptions(**{**{name: getattr(OPTIONS, name) for name in OPTIONS.__dataclass_fields__}, **changes})
    _, result = run(references or {"A": A, "B": B}, str(pictures), out, options, announce=lines.append)
    return result, lines


def test_numbers_are_those_of_the_features_in_memory(pictures: Path, tmp_path: Path) -> None:
    result, lines = compare(pictures, tmp_path / "out")
    assert result.layers_b == ("first", "fc"), "the constant layer is left out"
    assert any("B: the layer dead:vector is left out" in line for line in lines)
    expected = kdx.similarity(features(A, LAYERS["A"], pictures), features(B, ("first", "fc"), pictures), seed=2)
    for name in ("values", "low", "high", "cka"):
        assert np.allclose(getattr(result, name), getattr(expected, name), atol=1e-6), name
    assert not (tmp_path / "out" / "features").exists()
    rows = list(csv.DictReader((tmp_path / "out" / "similarity.csv").read_text().splitlines()))
    assert [float(row["distance_correlation"]) for row in rows] == result.values.flatten().tolist()
    stored = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert stored["similarity"]["cka"] == result.cka.tolist() and stored["left_out"][0][:2] == ["B", "dead:vector"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<rect data-row=") == 2 * result.values.size
    assert all((tmp_path / "out" / f"heatmap.{ending}").stat().st_size for ending in ("svg", "png", "pdf"))


def test_batches_are_those_of_the_features_in_memory(pictures: Path, tmp_path: Path) -> None:
    references = {"A": A, "B": A, "C": B}
    layers = {"A": ("first", "fc"), "B": ("first", "second"), "C": ("fc",)}
    result, _ = compare(pictures, tmp_path / "out", references, layers=layers, geometry="batch")
    a = features(A, ("first", "second", "fc"), pictures)
    first, second = ({name: a[name] for name in layers[network]} for network in ("A", "B"))
    expected = kdx.similarity(first, second, features(B, ("fc",), pictures), batch=8, seed=2)
    assert result.geometry == "batch" and result.batches == expected.batches == 4
    assert result.partial is not None and expected.partial is not None
    assert np.allclose(result.values, expected.values, atol=1e-6) and np.allclose(result.partial, expected.partial, atol=1e-6)
    assert result.values[0, 0] == pytest.approx(1, abs=1e-12)


@pytest.mark.slow
def test_a_network_that_is_given_twice_runs_once(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    original = ComparedNetworks.features

    def counted(self: Any, images: torch.Tensor) -> Any:
        passes.append(list(self.opened))
        return original(self, images)

    monkeypatch.setattr(ComparedNetworks, "features", counted)
    result, _ = compare(pictures, tmp_path / "out", {"A": A, "B": A}, layers={"A": ("first", "fc"), "B": ("first", "fc")})
    assert np.allclose(np.diag(result.values), 1) and passes == [["A"]] * 5  # blank images, and 26 images in batches of 8


def stopped_after(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise KeyboardInterrupt after this many passes, of which the first is that of blank images."""
    original, done = ComparedNetworks.features, []

    def features_until(self: Any, images: torch.Tensor) -> Any:
        done.append(0)
        if len(done) > passes:
            raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(ComparedNetworks, "features", features_until)


@pytest.mark.parametrize(("geometry", "stored"), [pytest.param("whole", "features", marks=pytest.mark.slow), pytest.param("batch", "sums")])
def test_a_comparison_that_is_stopped_in_a_pass_resumes_to_the_same_numbers(
    geometry: Any, stored: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "cat" / "25.png").write_bytes(b"damaged")
    expected, _ = compare(pictures, tmp_path / "whole", geometry=geometry)
    with monkeypatch.context() as patch:
        stopped_after(3, patch)
        with pytest.raises(Stopped):
            compare(pictures, tmp_path / "out", geometry=geometry)
    result, lines = compare(pictures, tmp_path / "out", geometry=geometry)
    assert any(f"the {stored} of 1" in line and "Resuming" in line for line in lines), lines
    assert json.dumps(result.to_dict()) == json.dumps(expected.to_dict())
    assert result.n == 25 and not (tmp_path / "out" / "features").exists()


@pytest.mark.slow
def test_other_arguments_do_not_continue_a_stopped_comparison(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stopped_after(3, patch)
        with pytest.raises(Stopped):
            compare(pictures, tmp_path / "out", geometry="batch")
    _, lines = compare(pictures, tmp_path / "out", geometry="batch", batch=9)
    assert not any("Resuming" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["of_set", "write_results"])
def test_a_comparison_that_is_stopped_after_its_passes_needs_no_further_pass(
    phase: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = compare(pictures, tmp_path / "whole")
    with monkeypatch.context() as patch:

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(layer_sums if phase == "of_set" else command, phase, stop)
        with pytest.raises(Stopped):
            compare(pictures, tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()
    result, lines = compare(pictures, tmp_path / "out")
    assert any("26 of 26 images" in line and "Resuming" in line for line in lines)
    assert np.array_equal(result.values, expected.values) and np.array_equal(result.low, expected.low)


@pytest.mark.slow
def test_projected_features_are_those_of_the_sketches(pictures: Path, tmp_path: Path) -> None:
    result, lines = compare(pictures, tmp_path / "out", project=20, layers={"A": ("first", "fc"), "B": ("first",)})
    assert any("at 2 of 3 layers are projected to 20 numbers" in line for line in lines), lines
    rows = {}
    for name, reference, layers in (("A", A, ("first", "fc")), ("B", B, ("first",))):
        rows[name] = {layer: values.flatten(1) for layer, values in features(reference, layers, pictures).items()}
        rows[name]["first"] = Sketch.of(rows[name]["first"].shape[1], 20, 2, name, "first")(rows[name]["first"])
    expected = kdx.similarity(rows["A"], rows["B"], seed=2)
    assert np.allclose(result.values, expected.values, atol=1e-5) and np.allclose(result.cka, expected.cka, atol=1e-5)
    stored = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert stored["options"]["project"] == 20 and stored["projected"] == [["A", "first"], ["B", "first"]]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "projected to 20 random numbers per image" in page and f"{100 * stored['lowered']:.1f}" in page
    assert any("lowers similarities by up to about" in line for line in lines), "the pixels are noise, with many dimensions"


@pytest.mark.slow
def test_the_geometry_batch_projects_nothing(pictures: Path, tmp_path: Path) -> None:
    result, lines = compare(pictures, tmp_path / "out", geometry="batch", project=20)
    expected, _ = compare(pictures, tmp_path / "other", geometry="batch")
    assert np.array_equal(result.values, expected.values) and any("--project has no effect" in line for line in lines)
    assert json.loads((tmp_path / "out" / "similarity.json").read_text())["projected"] == []


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [5, 60])
def test_projections_lower_similarities_by_the_estimated_share(dimensions: int) -> None:
    """CKA of two projections of the same features, in which each has its own random numbers, over 40 pairs of projections."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(dimensions, 4000))
    x = torch.from_numpy(rng.normal(size=(150, dimensions)) @ mixing)
    variances = np.linalg.eigvalsh(mixing @ mixing.T)
    values, factors = [], []
    for seed in range(40):
        sketches = [Sketch.of(4000, 50, seed, name, "fc") for name in ("A", "B")]
        a, b = (sketch(x) for sketch in sketches)
        result = kdx.similarity(a, b)
        values.append([result.values[0, 0], result.cka[0, 0]])
        matrices = [FeatureDistances.of(InMemory(rows)) for rows in (a, b)]
        norms = layer_sums.of_set(matrices).squares.products().diagonal()
        factors.append(
            np.prod([kept_similarity(float(m.scale), float(s), sketch) for m, s, sketch in zip(matrices, norms, sketches, strict=True)])
        )
    distances, cka = np.mean(values, 0)
    assert cka == pytest.approx(np.mean(factors), abs=0.02) and distances == pytest.approx(np.mean(factors), abs=0.05)
    assert np.mean(factors) == pytest.approx(1 / (1 + variances.sum() ** 2 / (variances**2).sum() / 50), abs=0.03)


def test_features_that_do_not_fit_are_compared_in_batches(pictures: Path, tmp_path: Path) -> None:
    result, lines = compare(pictures, tmp_path / "out", max_disk=1e-6)
    assert result.geometry == "batch" and any("--max-disk" in line for line in lines)
    with pytest.raises(KdxError, match="are available"):
        compare(pictures, tmp_path / "other", max_disk=1e-6, geometry="whole")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers": {"A": ("third",)}}, "A: .*third"),
        ({"layers": {"B": ("dead:vector",), "A": ("fc",)}}, "B: all layers are constant"),
        ({"split": "holdout"}, "no split"),
        ({"batch": 3}, "too small"),
        ({"layers": {"C": ("fc",)}}, "no network C for --layer-c"),
    ],
)
def test_bad_requests_are_refused(pictures: Path, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(KdxError, match=problem):
        compare(pictures, tmp_path / "out", **changes)


def test_random_weights_are_announced(pictures: Path, tmp_path: Path) -> None:
    """They differ between two processes, so the numbers of a comparison cannot be repeated. A user's factory may have loaded weights."""
    lines: list[str] = []
    options = SimilarityOptions(layers={}, runtime="eager", batch=8, image_size=16)
    run({"A": "kdx:resnet,width=2,depth=1,stages=2", "B": B}, str(pictures), tmp_path / "out", options, announce=lines.append)
    warnings = [line for line in lines if line.startswith("Warning: ")]
    assert len(warnings) == 1 and "weights of A are random" in warnings[0]


def test_a_figure_of_an_unknown_type_is_refused_before_the_work(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(KdxError, match=r"No figure can be written as map\.gif"):
        run({"A": A, "B": B}, str(pictures), tmp_path / "out", OPTIONS, figure=tmp_path / "map.gif")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["one class", "no class folders", "other classes"])
def test_images_need_no_classes(layout: str, pictures: Path, tmp_path: Path) -> None:
    """Distances between images have no classes, so any folder of images is compared. Relevance still needs two classes."""
    folder = tmp_path / "photos"
    files = sorted(pictures.rglob("*.png"), key=lambda path: int(path.stem))[:8]
    for place, file in enumerate(files):
        name = {"one class": "all/", "no class folders": "", "other classes": f"{place % 2}/"}[layout]
        target = folder / f"{name}{file.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    data = open_data(str(folder), ("cat", "dog"), labelled=False)
    assert sorted(Path(name).name for name in data.ids) == sorted(file.name for file in files)
    with pytest.raises(KdxError):
        open_data(str(folder), ("cat", "dog"))
    if layout == "no class folders":
        result, _ = compare(folder, tmp_path / "out", layers={"A": ("fc",), "B": ("fc",)})
        assert result.n == 8


@pytest.mark.slow
def test_a_transformer_is_compared_with_a_residual_network(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    references = {"A": "timm:vit_tiny_patch16_224", "B": "timm:resnet18"}
    result, _ = compare(pictures, tmp_path / "out", references, layers={}, image_size=None, max_images=12, max_layers=5)
    assert result.values.shape == (5, 4) and np.isfinite(result.values).all() and np.isfinite(result.cka).all()
