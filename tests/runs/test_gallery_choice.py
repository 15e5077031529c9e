"""The images of the page: how they are chosen, when the run is computed and afterwards."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import kdx
from kdx.choices import Resizing
from kdx.commands import explain
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.report.page import write_page
from kdx.runs.gallery_choice import GalleryChoice, check_order, choose_again, read_choice
from kdx.runs.image_numbers import prediction_names, prediction_numbers
from kdx.runs.measured import Samples
from kdx.runs.record import read_run
from tests.command_line import in_folder
from tests.made_runs import make_run
from tests.runs.small_run import OPTIONS, SIZE, run


def rows_of(folder: Path) -> list[int]:
    return [int(row) for row in json.loads((folder / "gallery.json").read_text())["rows"]]


def samples_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "samples.parquet").to_pylist()
    return rows


def cards(folder: Path) -> list[str]:
    """The names on the page, in its order."""
    return re.findall(r'<article class="card"[^>]* data-id="([^"]*)"', (folder / "report.html").read_text())


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A computed run to change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_default_is_balanced_and_a_third_is_wrong(finished: Path) -> None:
    samples = samples_of(finished)
    chosen = [row for row in samples if row["row"] in rows_of(finished)]
    assert len(chosen) == 6 and {path.stem for path in (finished / "overlays").glob("?????.png")} == {f"{row['row']:05d}" for row in chosen}
    counts = [sum(row["label"] == label for row in chosen) for label in range(3)]
    assert max(counts) - min(counts) <= 2
    assert sum(any(row[f"{role}_prediction"] != row["label"] for role in ("teacher", "student", "base")) for row in chosen) >= 2
    assert "balanced over the classes" in (finished / "report.html").read_text()


def test_images_with_the_highest_values_come_first(folder: Path, copy: Path) -> None:
    for order in ("wrong", "layer3/distilled/strength"):
        choose_again(read_run(copy), GalleryChoice(9, order), str(folder / "pictures"))
        write_page(copy)
        opened = kdx.open_run(copy)
        expected = [opened.images[place] for place in np.argsort(-opened.number(order), kind="stable")[:9]]
        assert cards(copy) == expected
        assert f"the 9 images with the highest value of {order}" in (copy / "report.html").read_text()
    write_page(copy)  # the page keeps its images
    assert cards(copy) == expected


def test_new_pictures_are_those_of_the_data(folder: Path, copy: Path) -> None:
    names = ["cat/0.png", "10.png", "dog/1.png"]  # a part of a name is sufficient
    choose_again(read_run(copy), GalleryChoice(images=tuple(names)), str(folder / "pictures"))
    write_page(copy)
    assert cards(copy) == ["cat/0.png", "dog/10.png", "dog/1.png"] and "chosen by name" in (copy / "report.html").read_text()
    dataset = open_data(str(folder / "pictures"))
    pixels = load_images(dataset, [dataset.ids.index("dog/10.png")], SIZE).pixels[0].permute(1, 2, 0).numpy()
    row = kdx.open_run(copy)["dog/10.png"].row
    assert np.abs(np.asarray(Image.open(copy / "overlays" / f"{row:05d}.png")) / 255 - pixels).max() < 0.003
    choose_again(read_run(copy), GalleryChoice(order="wrong", images=tuple(names)))  # all have pictures: the data is not needed
    wrong = kdx.open_run(copy).select(["cat/0.png", "dog/10.png", "dog/1.png"]).sorted("wrong")
    assert [samples["id"] for row in rows_of(copy) for samples in samples_of(copy) if samples["row"] == row] == wrong.images


@pytest.mark.slow
def test_a_run_is_computed_with_its_choice(folder: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "run", replace(OPTIONS, gallery=4, gallery_order="changed", resize="squash", interpolation="bilinear")
    run(folder, out, options)
    expected = kdx.open_run(out).sorted("changed")[:4].images
    assert cards(out) == expected and len(list((out / "overlays").glob("?????.png"))) == 4
    run(folder, out, replace(options, gallery_order="wrong"))  # the run is complete: only the page changes
    assert cards(out) == kdx.open_run(out).sorted("wrong")[:4].images
    dataset = replace(open_data(str(folder / "pictures")), resizing=Resizing("squash", "bilinear"))
    for name in cards(out):  # resized as in the run
        pixels = load_images(dataset, [dataset.ids.index(name)], SIZE).pixels[0].permute(1, 2, 0).numpy()
        picture = kdx.open_run(out)[name].pixels
        assert picture is not None and np.abs(picture / 255 - pixels).max() < 0.003
    run(folder, out, replace(options, gallery=60, gallery_order="balanced"))  # the default chooses nothing new
    assert cards(out) == kdx.open_run(out).sorted("wrong")[:4].images


def test_mistakes_are_reported_before_anything_is_computed(folder: Path, tmp_path: Path) -> None:
    for options, text, hint in (
        (replace(OPTIONS, gallery_images=("cat/00.png",)), "no image 'cat/00.png'", "cat/0.png"),
        (replace(OPTIONS, gallery_order="wron"), "no number 'wron'", "wrong"),
        (replace(OPTIONS, gallery_order="layer9/distilled/total"), "no number", "distilled/total"),
    ):
        with pytest.raises(kdx.KdxError, match=text) as error:
            run(folder, tmp_path / "run", options)
        assert hint in error.value.hint and not (tmp_path / "run").exists()


def test_pictures_need_the_data_of_the_run(folder: Path, copy: Path, tmp_path: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["configuration"]["data"] = str(tmp_path / "moved")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    before = rows_of(copy)
    with pytest.raises(kdx.KdxError, match=r"23 of these images have no picture.*cannot be opened"):
        choose_again(read_run(copy), GalleryChoice(100))
    other = Path(shutil.copytree(folder / "pictures", tmp_path / "other"))
    (other / "cat" / "0.png").rename(other / "cat" / "renamed.png")
    with pytest.raises(kdx.KdxError, match="is not its data"):
        choose_again(read_run(copy), GalleryChoice(100), str(other))
    assert rows_of(copy) == before
    choose_again(read_run(copy), GalleryChoice(100), str(folder / "pictures"))
    assert len(rows_of(copy)) == 29


def test_names_that_several_images_have_need_their_class(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", images=6, gallery=6)
    table = pq.read_table(folder / "samples.parquet")
    ids = pq.read_table(folder / "samples.parquet").to_pydict()["id"]
    names = [f"{'cat' if i < 3 else 'dog'}/{i % 3}.png" for i in range(len(ids))]
    pq.write_table(table.set_column(table.column_names.index("id"), "id", [names]), folder / "samples.parquet")
    with pytest.raises(kdx.KdxError, match="2 images are named") as error:
        choose_again(read_run(folder), GalleryChoice(images=("1.png",)))
    assert "cat/1.png, dog/1.png" in error.value.hint


def test_older_runs_and_damaged_choices_show_the_images_that_have_pictures(tmp_path: Path) -> None:
    with zipfile.ZipFile(Path(__file__).with_name("run_of_0.1.0.zip")) as archive:
        archive.extractall(tmp_path)
    old = tmp_path / "complete"
    assert read_choice(read_run(old)) == (GalleryChoice(4), [49, 55, 199, 346])
    for content in ("{", '{"rows": 3}', '{"count": 1, "order": "wrong", "images": [], "rows": ["x"]}'):
        (old / "gallery.json").write_text(content)
        assert read_choice(read_run(old))[1] == [49, 55, 199, 346]
    choose_again(read_run(old), GalleryChoice(3, "changed"), "digits")
    write_page(old)
    assert cards(old) == kdx.open_run(old).sorted("changed")[:3].images


def test_a_single_network_has_no_changes() -> None:
    samples = Samples(
        np.arange(3), ["a", "b", "c"], np.zeros(3, int), {"student": np.array([0, 1, 0])}, {"student": np.array([0.5, 0.6, 0.7])}
    )
    assert {name: values.tolist() for name, values in prediction_numbers(samples).items()} == {"wrong": [-0.5, 0.6, -0.7]}
    with pytest.raises(kdx.KdxError, match="no number 'changed'"):
        check_order("changed", prediction_names(["student"]))


def test_the_command_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, command = make_run(tmp_path / "run", images=20, gallery=20), in_folder(tmp_path, monkeypatch, capsys)
    assert command("report", "run", "--gallery", "5", "--order", "disagreement")[0] == 0
    assert cards(folder) == kdx.open_run(folder).sorted("disagreement")[:5].images
    status, _, error = command("report", "run", "--images", "image-1")
    assert status == 2 and "There is no image 'image-1'." in error and "such as image-000" in error
    assert command("report", "run", "--images", "image-00007,image-00003")[0] == 0
    assert cards(folder) == ["image-00007", "image-00003"]


@pytest.mark.slow
def test_the_choice_is_part_of_no_result(folder: Path, copy: Path) -> None:
    """Another gallery resumes the same run."""
    options = replace(OPTIONS, gallery=7, gallery_order="wrong")
    explain.run(str(folder / "pictures"), folder / "models.toml", copy, (), options, announce=lambda line: None)
    assert len(cards(copy)) == 7
