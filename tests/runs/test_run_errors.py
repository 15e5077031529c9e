"""What a run refuses, before anything is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import kdx
from kdx.commands import explain
from kdx.models.layer_pairs import parse_layers
from kdx.runs.record import read_run
from tests.runs.small_run import OPTIONS, run


def test_a_teachers_layer_without_a_teacher_is_refused(folder: Path, pair: Path, tmp_path: Path) -> None:
    with pytest.raises(kdx.KdxError, match="layer2=layer3 names a layer of the teacher, but there is no teacher"):
        explain.run(str(folder / "pictures"), pair, tmp_path / "run", ("layer2=layer3",), OPTIONS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("layer1=",), "'layer1=' is not a layer"),
        (("=layer1",), "'=layer1' is not a layer"),
        (("",), "'' is not a layer"),
        (("a=b", "c", "a=c"), "'a' is named twice"),
        (("a", "a"), "'a' is named twice"),
        (("student=a,teacher=b", "a"), "'a' is named twice"),
        (("student=a,student=b",), "layer of a role twice"),
        (("teacher=b",), "is not a layer for each role"),
        (("student=a,base=",), "is not a layer for each role"),
    ],
)
def test_malformed_layers_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(kdx.KdxError, match=message):
        parse_layers(names)


def test_layers_are_paired() -> None:
    parsed = parse_layers(("a", "b=c", "d=a=b", "student=e,teacher=f.0", "student=g:x,base=h[1],teacher=i,j=k"))
    expected = {"a": ("a", "a"), "b": ("b", "c"), "d": ("d", "a=b"), "e": ("e", "f.0"), "g:x": ("h[1]", "i,j=k")}
    assert {layer: (names.base, names.teacher) for layer, names in parsed.items()} == expected
    assert parse_layers([str(names) for names in parsed.values()]) == parsed


def test_without_a_layer_the_error_lists_the_layers(folder: Path, tmp_path: Path) -> None:
    text = (folder / "models.toml").read_text()
    (folder / "bare.toml").write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("layers")))
    with pytest.raises(kdx.KdxError, match=r"No layer was named") as caught:
        explain.run(str(folder / "pictures"), folder / "bare.toml", tmp_path / "run", (), OPTIONS)
    assert "layer2, layer3" in caught.value.hint and not (tmp_path / "run").exists()


def test_a_refused_folder_is_left_as_it_was(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    with pytest.raises(kdx.KdxError, match="neither empty nor a run"):
        run(folder, tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": replace(OPTIONS, batch=12)}, "another run .*batch"),
        ({"layers": ("layer1",)}, "another run .*layers"),
        ({"layers": ("layr3",), "out": "new"}, "layr3"),
        ({"options": replace(OPTIONS, split="tset"), "out": "new"}, "tset"),
        ({"data": "nowhere", "out": "new"}, "nowhere"),
        ({"options": replace(OPTIONS, geometry="reference", reference_images=3), "out": "new"}, "reference set of 3"),
        ({"options": replace(OPTIONS, geometry="batch", stored_precision="float16"), "out": "new"}, "Only the geometry whole stores"),
        ({"options": replace(OPTIONS, geometry="batch", max_disk=1.0), "out": "new"}, "stores features and distances"),
        ({"options": replace(OPTIONS, geometry="auto", reference_images=8, max_minutes=60.0), "out": "new"}, "limit in time"),
        ({"options": replace(OPTIONS, geometry="whole", max_minutes=1.0), "out": "new"}, "limit in time"),
        ({"options": replace(OPTIONS, geometry="auto", reference_images=8, project=4), "out": "new"}, "Only the geometry whole stores"),
        ({"out": "occupied"}, "neither empty"),
    ],
)
def test_arguments_that_are_refused(folder: Path, finished: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("")
    out = tmp_path / change.pop("out") if "out" in change else finished
    with pytest.raises(kdx.KdxError, match=message):
        run(folder, out, **change)
    assert (tmp_path / "occupied" / "thesis.tex").exists()


def test_networks_of_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "models.toml").read_text()
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "models.toml").write_text(text.replace('"cat", "dog", "owl"', '"cat", "dog", "elk", "owl"'))
    with pytest.raises(kdx.KdxError, match="predicts 3 classes, and the data has 4"):
        run(tmp_path / "copy", tmp_path / "run")


def test_identical_student_and_base_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(folder / "base.safetensors", tmp_path / "copy" / "student.safetensors")
    with pytest.raises(kdx.KdxError, match="Nothing is left of the explained features"):
        run(tmp_path / "copy", tmp_path / "run")


def test_a_corrected_command_runs_in_the_folder_of_one_that_failed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(folder / "base.safetensors", tmp_path / "copy" / "student.safetensors")
    with pytest.raises(kdx.KdxError, match="Nothing is left"):
        run(tmp_path / "copy", tmp_path / "run")
    run(folder, tmp_path / "run")  # with other weights
    assert (tmp_path / "run" / "report.html").exists()
    with pytest.raises(kdx.KdxError, match=r"^Teacher: The network has no layer 'layr3'"):
        run(folder, tmp_path / "new", layers=("layr3",))


@pytest.mark.slow
def test_a_reference_set_is_as_large_as_the_data(folder: Path, tmp_path: Path, lines: list[str]) -> None:
    options = replace(OPTIONS, geometry="reference", reference_images=5000)
    explain.run(str(folder / "pictures"), folder / "models.toml", tmp_path / "run", (), options, announce=lines.append)
    assert any("with 29 reference images (all that there are, instead of 5,000)" in line for line in lines)
    assert read_run(tmp_path / "run").reference_images == 29
    assert "29 reference images" in (tmp_path / "run" / "report.html").read_text()
    assert "5,000 reference images" not in (tmp_path / "run" / "report.html").read_text()


def test_the_manifest_names_the_runtime_that_ran(finished: Path) -> None:
    assert json.loads((finished / "manifest.json").read_text())["environment"]["runtime"] == "eager on cpu"


@pytest.mark.parametrize(
    ("training", "problem"),
    [
        (("cat/0", "dog/0"), "at least 4 images, and there are 2"),
        (("cat/0", "cat/1", "cat/2", "dog/0"), "the classes of these 4 images have no geometry"),
    ],
)
def test_reference_images_without_geometry_are_refused_before_any_pass(
    training: tuple[str, ...], problem: str, pair: Path, tmp_path: Path
) -> None:
    """The reference images are those of the training split."""
    for name in (*(f"train/{image}" for image in training), *(f"test/{name}/{number}" for name in ("cat", "dog") for number in range(4))):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    options = replace(OPTIONS, geometry="reference", split="test")
    with pytest.raises(kdx.KdxError, match=f"(?i)The reference images: .*{problem}"):
        explain.run(str(tmp_path / "data"), pair, tmp_path / "run", ("layer1",), options)
    assert not (tmp_path / "run").exists()
