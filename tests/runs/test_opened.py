"""`kdx.open_run`: what it returns is what the files contain."""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image

import kdx
from kdx.roles import SCORE_MAPS
from kdx.runs.image_numbers import image_number
from kdx.runs.opened import UnknownName
from kdx.runs.record import read_run
from tests.made_runs import make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 150 images, so that its maps are read in several blocks, whose rows are not in the order of samples.parquet."""
    folder = make_run(tmp_path_factory.mktemp("made") / "run", images=150, layers={"layer1": "layer1", "block/2": "layer3"})
    table = pq.read_table(folder / "samples.parquet")
    pq.write_table(table.take(np.random.default_rng(3).permutation(150)), folder / "samples.parquet")
    return folder


def stored(folder: Path) -> tuple[dict[str, list[Any]], Any]:
    return pq.read_table(folder / "samples.parquet").to_pydict(), zarr.open_group(folder / "maps.zarr", mode="r")


def test_images_have_the_stored_maps_predictions_and_numbers(made: Path) -> None:
    run, (samples, group) = kdx.open_run(made), stored(made)
    assert (len(run), run.images, run.layers) == (150, samples["id"], ("layer1", "block/2"))
    for place in (63, 64, 5):
        image = run[samples["id"][place]]
        assert image == run[place] and image.row == samples["row"][place]
        assert image.label == samples["label"][place] and image.label_name == run.classes[image.label]
        student = image.predictions["student"]
        assert (student.index, student.confidence) == (samples["student_prediction"][place], samples["student_confidence"][place])
        assert student.right == (student.index == image.label)
        for layer in run.layers:
            maps = image.layers[layer]
            assert maps.grid == group[f"{layer}/distilled"].shape[1:]
            for kind in ("distilled", "residual", "missed", "new"):
                assert np.array_equal(maps.maps[kind], group[f"{layer}/{kind}"][image.row])
            for name, score_map in SCORE_MAPS.items():
                assert np.array_equal(maps.score_maps[score_map.symbol], group[f"{layer}/{name}"][image.row])
                assert maps.numbers[f"{name}/total"] == samples[f"{layer}/{name}/total"][place]
            assert len(maps.maps) + len(maps.score_maps) == len(run.kinds)
    whole = run.maps("block/2", "RS(S) - RS(B)")
    assert np.array_equal(whole, np.stack([image.layers["block/2"].score_maps["RS(S) - RS(B)"] for image in run]))


def test_pictures_are_those_of_the_gallery(made: Path) -> None:
    run = kdx.open_run(made)
    pictured = {image.row: image.pixels for image in run if image.pixels is not None}
    assert sorted(pictured) == list(range(16))
    expected = np.asarray(Image.open(made / "overlays" / "00007.png").convert("RGB"))
    assert np.array_equal(pictured[7], expected)


def test_numbers_from_predictions_follow_their_definition(made: Path) -> None:
    run, samples = kdx.open_run(made), stored(made)[0]
    for place, image in enumerate(run):
        vectors = {role: np.zeros(len(run.classes)) for role in run.roles}
        for role, vector in vectors.items():
            vector[samples[f"{role}_prediction"][place]] = samples[f"{role}_confidence"][place]
        assert image.numbers["changed"] == pytest.approx(np.abs(vectors["student"] - vectors["base"]).sum())
        sign = -1 if samples["student_prediction"][place] == samples["label"][place] else 1
        assert image.numbers["wrong"] == pytest.approx(sign * samples["student_confidence"][place])
        pairs = combinations([samples[f"{role}_prediction"][place] for role in run.roles], 2)
        assert image.numbers["disagreement"] == sum(a != b for a, b in pairs)


def test_sorting_puts_the_highest_first_and_unknown_values_last(made: Path) -> None:
    run, samples = kdx.open_run(made), stored(made)[0]
    name = "layer1/new/stability"  # not known for the empty map
    known = np.array(samples[name], dtype=float)
    assert np.isnan(known).sum() == 1
    for ascending in (False, True):
        values = run.sorted(name, ascending=ascending).number(name)
        expected = np.sort(known[~np.isnan(known)])[:: 1 if ascending else -1]
        assert np.isnan(values[-1]) and np.array_equal(values[:-1], expected)
    three = run.sorted("wrong")[:3]
    assert len(three) == 3 and three.images == [run.images[place] for place in np.argsort(-run.number("wrong"), kind="stable")[:3]]
    assert [image.name for image in three] == three.images and three[0] in three
    assert np.array_equal(three.maps("layer1", "new")[1], three[1].layers["layer1"].maps["new"])


def test_images_are_selected_by_name_by_mask_and_by_function(made: Path) -> None:
    run = kdx.open_run(made)
    names = [run.images[9], run.images[2]]
    assert run.select(names).images == names
    lost = run.select(lambda image: image.predictions["base"].right and not image.predictions["student"].right)
    samples = stored(made)[0]
    columns = {role: np.array(samples[f"{role}_prediction"]) == np.array(samples["label"]) for role in ("base", "student")}
    mask = columns["base"] & ~columns["student"]
    assert 0 < len(lost) < 150 and lost.images == run.select(mask).images == [
        name for name, keep in zip(run.images, mask, strict=True) if keep
    ]
    with pytest.raises(kdx.KdxError, match="no image"):
        _ = lost[run.images[int(np.flatnonzero(~mask)[0])]]
    with pytest.raises(ValueError, match="mask"):
        run.select(mask[1:])


def test_errors_name_what_is_near(made: Path) -> None:
    run = kdx.open_run(made)
    with pytest.raises(UnknownName, match="no image 'image-000003'") as error:
        _ = run["image-000003"]
    assert "image-00003" in error.value.hint and isinstance(error.value, KeyError)
    for use, near in (
        (lambda: run[0].layers["layer2"], "layer1"),
        (lambda: run[0].layers["layer1"].maps["distiled"], "distilled"),
        (lambda: run[0].layers["layer1"].score_maps["RS(S)-RS(B)"], "RS(S) - RS(B)"),
        (lambda: run.sorted("disagree"), "disagreement"),
        (lambda: run.maps("layer1", "resid"), "residual"),
    ):
        with pytest.raises(kdx.KdxError) as unknown:
            use()
        assert near in unknown.value.hint
    assert run[0].layers.get("layer9") is None and "layer1" in run[0].layers


def test_scores_are_those_of_scores_json(finished: Path) -> None:
    """A run that this version computed. scores.csv has the same rows, with the accuracies."""
    run, content = kdx.open_run(finished), json.loads((finished / "scores.json").read_text())
    by_name = {(row["layer"], row["score"]): row for row in run.scores}
    for layer, entry in content["layers"].items():
        for name, score in (entry["scores"] | entry["contrasts"]).items():
            row = by_name[layer, name]
            assert [row["value"], row["low"], row["high"], row["p_value"]] == [score["value"], *score["interval"], score["p_value"]]
    correct = stored(finished)[0]
    for role, letter in (("teacher", "T"), ("student", "S"), ("base", "B")):
        share = np.mean(np.array(correct[f"{role}_prediction"]) == np.array(correct["label"]))
        assert by_name[None, f"accuracy({letter})"]["value"] == pytest.approx(share)
    with (finished / "scores.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in run.scores] == table


def test_records_have_every_number(made: Path) -> None:
    run = kdx.open_run(made)[:7]
    records = run.records
    assert [record["id"] for record in records] == run.images
    assert set(run.numbers) <= records[0].keys() and records[3]["wrong"] == run.number("wrong")[3]
    assert records[0]["student_prediction"] == run[0].predictions["student"].name


def test_a_data_frame_needs_pandas(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(kdx.KdxError, match="pandas"):
        kdx.open_run(made).scores.frame()


def test_a_run_of_0_1_0_opens(tmp_path: Path) -> None:
    with zipfile.ZipFile(Path(__file__).with_name("run_of_0.1.0.zip")) as archive:
        archive.extractall(tmp_path)
    run, (samples, group) = kdx.open_run(tmp_path / "complete"), stored(tmp_path / "complete")
    assert run.kinds == ("distilled", "residual") and run.roles == ("base", "student")
    image = run.sorted("changed")[0]
    assert np.array_equal(image.layers["layer3"].maps["residual"], group["layer3/residual"][image.row])
    assert not image.layers["layer3"].score_maps and set(run.numbers) == {
        "changed",
        "wrong",
        "disagreement",
        "base_confidence",
        "student_confidence",
    }
    assert run.records[0]["id"] == samples["id"][0]
    with pytest.raises(KeyError):
        image_number(read_run(tmp_path / "complete"), "layer3/distilled/total")


def test_images_of_a_run_draw_themselves(made: Path, tmp_path: Path) -> None:
    run = kdx.open_run(made).select([f"image-{number:05d}" for number in (3, 90)])
    figure = run[0].figure()
    assert [axes.get_title() for axes in figure.axes[:5]] == ["image", "RS(S) − RS(B)", "RS(S)", "RS(B)", "distilled"]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["layer1 (16 × 16)", "block/2 (8 × 8)"]
    picture = run[0].pixels
    assert picture is not None and np.array_equal(np.asarray(figure.axes[0].get_images()[0].get_array())[::7, ::7], picture)
    both = run.figure(kinds=["residual"])
    assert [axes.get_title() for axes in both.axes[:3]] == ["image", "layer1 (16 × 16)\nresidual", "block/2 (8 × 8)\nresidual"]
    assert not both.axes[3].get_images()  # the second image has no picture
    highest = max(image.layers["block/2"].maps["residual"].max() for image in run)
    assert both.axes[-1].get_xticklabels()[1].get_text() == f"{highest:.2g}"
    assert run.save(tmp_path / "both.pdf").read_bytes().startswith(b"%PDF") and "2 images" in run._repr_html_()
