"""`kdx explain IMAGE ... --data DATA`: the maps are those of kdx.unicam with a reference set, whatever other images are explained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

import kdx
from kdx import KdxError
from kdx.cli.commands import app
from kdx.commands import explain_images
from kdx.commands.explain import check_data_set
from kdx.commands.references import choose_references
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.maps.overlays import overlay
from kdx.models import models_file
from kdx.runs.run import RunOptions

OPTIONS = RunOptions(runtime="eager", reference_images=20)
REFERENCE = "kdx:resnet,width=4,depth=1,stages=2"
SIZE = (12, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student and base with random weights, 21 pictures of three classes, and two others."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("images")
    for seed, role in enumerate(("student", "base")):
        torch.manual_seed(seed)
        save_file(kdx.models.load(REFERENCE, classes=3).module.state_dict(), root / f"{role}.safetensors")
    models_file.write_models(
        root / "models.toml",
        base=f"{REFERENCE}@base.safetensors",
        student=f"{REFERENCE}@student.safetensors",
        layers=("layer1", "layer2"),
        classes=("cat", "dog", "owl"),
        preprocessing=Preprocessing(SIZE, (0.5,), (0.5,)),
    )
    rng = np.random.default_rng(0)
    for number in range(21):
        class_folder = root / "pictures" / ("cat", "dog", "owl")[number % 3]
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(class_folder / f"{number}.png")
    for name in ("my cat", "b"):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(root / f"{name}.png")
    return root


def explained(folder: Path, out: Path, names: list[str], labels: list[str], lines: list[str]) -> str:
    page = explain_images.run(
        [folder / name for name in names],
        folder / "models.toml",
        str(folder / "pictures"),
        out,
        options=OPTIONS,
        labels=labels,
        announce=lines.append,
    )
    return page.read_text("utf-8")


def test_pictures_show_the_maps_among_the_references(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    text = explained(folder, tmp_path, ["my cat.png", "b.png"], ["owl", "cat"], lines)
    assert "my cat.png, explained as owl (student: " in text and "b.png, explained as cat" in text
    file = models_file.read_models(folder / "models.toml")
    references = choose_references(str(folder / "pictures"), 20, 0, file, SIZE)
    assert f"compared with {len(references.ids)} reference images of {folder / 'pictures'}." in text
    assert "residual (B | S)</dt><dd>What the base has and the student does not.</dd>" in text and "missed" not in text
    assert any(f"compared with {len(references.ids)} reference images" in line for line in lines)
    pixels = kdx.data.as_pixels([folder / "my cat.png", folder / "b.png"])
    features = {}
    for role in ("student", "base"):
        network = file.load(role)
        graph = FeatureGraph(network.module, ["layer2"], network.preprocessing)
        with torch.no_grad():
            features[role] = graph(references.images.images)[1], graph(pixels)[1]
    context = kdx.ReferenceSet(features["student"][0], features["base"][0], references.images.labels)
    expected = kdx.unicam(features["student"][1], features["base"][1], torch.tensor([2, 0]), reference=context).maps
    for number, name in enumerate(("001_my cat", "002_b")):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert np.array_equal(picture, np.asarray(Image.open(folder / f"{name[4:]}.png")))
        drawn = np.asarray(Image.open(tmp_path / f"{name}_layer2_distilled.png")).astype(int)
        assert np.abs(drawn - overlay(picture, expected[number])).max() <= 2
    assert 'src="001_my%20cat_layer2_distilled.png"' in text
    assert len(list(tmp_path.glob("*.png"))) == 2 * (1 + 2 * 2)


def test_an_image_has_the_same_map_alone_and_the_students_class(folder: Path, tmp_path: Path) -> None:
    text = explained(folder, tmp_path / "two", ["b.png", "my cat.png"], [], [])
    explained(folder, tmp_path / "one", ["b.png"], [], [])
    name = "001_b_layer1_residual.png"
    one, two = (np.asarray(Image.open(tmp_path / out / name)).astype(int) for out in ("one", "two"))
    assert np.abs(one - two).max() <= 2
    with torch.no_grad():
        network = models_file.read_models(folder / "models.toml").load("student")
        graph = FeatureGraph(network.module, [], network.preprocessing)
        predicted = ("cat", "dog", "owl")[int(graph(kdx.data.as_pixels(folder / "b.png"))[0].argmax())]
    assert f"b.png, explained as {predicted} (student: {predicted}, " in text


def test_labels_must_be_classes_and_one_per_image(folder: Path, tmp_path: Path) -> None:
    for labels, message in ((["owl", "cat"], "2 labels and 1 images"), (["owk"], "no class 'owk'")):
        with pytest.raises(KdxError, match=message):
            explained(folder, tmp_path, ["b.png"], labels, [])
    with pytest.raises(KdxError, match="no image file"):
        explained(folder, tmp_path, ["c.png"], [], [])
    assert list(tmp_path.iterdir()) == []


def test_image_files_without_a_data_set_are_refused(folder: Path, tmp_path: Path) -> None:
    check_data_set([str(folder)], None)
    for name in ("labels.csv", "images.NPZ"):  # files that are data sets
        (tmp_path / name).touch()
        check_data_set([str(tmp_path / name)], None)
    for data, labels in (([str(folder / "b.png")], None), (["digits", "x"], None), (["digits"], ["cat"])):
        with pytest.raises(KdxError, match="need a data set") as caught:
            check_data_set(data, labels)
        assert "--data" in caught.value.hint


def test_the_settings_of_the_maps_apply(folder: Path, tmp_path: Path) -> None:
    for weighting in ("gap", "elementwise"):
        explain_images.run(
            [folder / "b.png"],
            folder / "models.toml",
            str(folder / "pictures"),
            tmp_path / weighting,
            ["layer2"],
            replace(OPTIONS, weighting=weighting),
            announce=lambda line: None,
        )
    one, two = (np.asarray(Image.open(tmp_path / name / "001_b_layer2_distilled.png")) for name in ("gap", "elementwise"))
    assert not np.array_equal(one, two)


def test_the_models_files_resize_applies_to_the_images(folder: Path, tmp_path: Path) -> None:
    """A picture twice as wide as high, in a letterbox, has bars; the option in the command line takes precedence."""
    models = tmp_path / "models.toml"
    text = (folder / "models.toml").read_text("utf-8").replace("@", f"@{folder}/")
    models.write_text(text.replace("[preprocessing]", '[preprocessing]\nresize = "letterbox"'), "utf-8")
    Image.new("RGB", (24, 12), (255, 0, 0)).save(tmp_path / "wide.png")
    for options, bars in ((OPTIONS, True), (replace(OPTIONS, resize="squash"), False)):
        out = tmp_path / str(options.resize)
        explain_images.run([tmp_path / "wide.png"], models, str(folder / "pictures"), out, ["layer2"], options, announce=lambda line: None)
        picture = np.asarray(Image.open(out / "001_wide.png"))
        assert (picture[0, 0].tolist() != [255, 0, 0]) == bars
        assert picture[6, 6].tolist() == [255, 0, 0]
    with kdx.Explainer(str(models), runtime="eager") as explainer:
        assert list(explainer.layers) == ["layer1", "layer2"]
        assert explainer.input_format.resizing.mode == "letterbox"


def test_a_student_alone_and_class_embeddings(folder: Path, tmp_path: Path) -> None:
    """The only map is that of the student alone; with three classes at other distances it is another map."""
    models = tmp_path / "models.toml"
    text = (folder / "models.toml").read_text("utf-8").replace("@", f"@{folder}/")
    models.write_text("".join(line for line in text.splitlines(True) if not line.startswith("base")), "utf-8")
    np.save(tmp_path / "far.npy", np.array([[0.0], [1.0], [9.0]]))
    drawn: dict[Path | None, NDArray[np.uint8]] = {}
    for target in (None, tmp_path / "far.npy"):
        out = tmp_path / f"out{len(drawn)}"
        options = replace(OPTIONS, target=target)
        explain_images.run([folder / "b.png"], models, str(folder / "pictures"), out, ["layer2"], options, announce=lambda line: None)
        assert sorted(path.name for path in out.glob("*.png")) == ["001_b.png", "001_b_layer2_alone.png"]
        drawn[target] = np.asarray(Image.open(out / "001_b_layer2_alone.png"))
    assert not np.array_equal(drawn[None], drawn[tmp_path / "far.npy"])


def test_options_that_do_not_apply_are_refused(folder: Path, tmp_path: Path) -> None:
    """From the command line, where an option that is not given has its default."""
    given = ["explain", str(folder / "b.png"), "--models", str(folder / "models.toml"), "--data", str(folder / "pictures")]
    result = CliRunner().invoke(app, [*given, "--out", str(tmp_path), "--gallery", "60", "--split", "test"])
    assert isinstance(result.exception, KdxError)
    assert result.exception.problem == "--gallery, --split do not apply to a few images."
    names = [parameter.name for parameter in get_command(app).commands["explain"].params]  # type: ignore[attr-defined]
    assert set(names) >= explain_images.OPTIONS


def test_the_folder_of_a_run_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(KdxError, match="contains a run over a data set"):
        explained(folder, tmp_path, ["b.png"], [], [])


def test_the_report_of_the_folder_of_a_few_images_names_its_page(folder: Path, tmp_path: Path) -> None:
    explained(folder, tmp_path, ["b.png"], [], [])
    before = sorted(path.name for path in tmp_path.iterdir())
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(result.exception, KdxError)
    assert "maps of a few images" in result.exception.problem and "images.html" in result.exception.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == before
