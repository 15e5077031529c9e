"""The split and its seed: the same for every training seed, recorded with every checkpoint, and checked when weights are used again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kdx.data.dataset import open_data
from kdx.data.splits import stratified_splits
from kdx.distill import EpochResult, distill
from kdx.distill.checkpoints import Recipe, TrainingData, is_finished, read_training_data
from kdx.distill.networks import Distillation
from kdx.errors import KdxError
from kdx.models import models_file
from kdx.runs.split import choose_split
from tests.distill.small import QUICK, STUDENT, TEACHER, Interruption, stop_at, summaries

BRIEF = replace(QUICK, epochs=1, teacher_epochs=1, student_images=None, batch=16)


def silent(result: EpochResult) -> None:
    """A callback that prints nothing."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 small images of two classes."""
    root, generator = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for name in ("dark", "light"):
        (root / name).mkdir(parents=True)
        for index in range(40):
            pixels = generator.integers(0, 100, (9, 9, 3)) + (150 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a distillation of photos with split seed 3."""
    out = tmp_path_factory.mktemp("trained")
    distill(str(photos), teacher=TEACHER, student=STUDENT, out=out, settings=replace(BRIEF, split_seed=3), report=silent)
    return out


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


def as_0_1_0_wrote_it(path: Path, data: str, seed: int) -> None:
    """Give weights the recipe of kdx 0.1.0: its own fingerprint of the data, and no seed of the split."""
    recipe = json.loads(metadata(path)["recipe"])
    recipe |= {"data": open_data(data).fingerprint_of_0_1_0, "seed": seed}
    del recipe["split_seed"]
    save_file(load_file(path), path, metadata={"recipe": json.dumps(recipe, sort_keys=True)})


def test_the_models_file_and_every_checkpoint_record_data_and_split(photos: Path, trained: Path) -> None:
    expected = TrainingData(open_data(str(photos)).fingerprint, 3)
    file = models_file.read_models(trained / "models.toml")
    assert (file.data, file.fingerprint, file.split_seed) == (str(photos.resolve()), expected.fingerprint, 3)
    assert file.training["seed"] == 0
    for role in ("teacher", "base", "student"):
        assert read_training_data(trained / f"{role}.safetensors") == expected


def test_explained_images_are_those_that_training_left_out(photos: Path, trained: Path) -> None:
    """From the images that the training itself reads to those that a run takes, in a copy of the data."""
    settings = replace(BRIEF, split_seed=3)
    run = Distillation.prepare(str(photos), trained, settings, torch.device("cpu"), TEACHER, STUDENT)
    read = {run.dataset.ids[index] for name in ("train", "validation", "student") for index in run.images[name].indices}
    copy = shutil.copytree(photos, trained / "copy", copy_function=shutil.copyfile)
    choice = choose_split(open_data(str(copy)), models_file.read_models(trained / "models.toml"), None, 0)
    explained = {open_data(str(copy)).ids[index] for index in choice.indices}
    assert len(explained) == 20 and len(read) == 60 and not explained & read
    for name in explained | {"dark/0.png"}:  # other data, with at least one image of each class
        (trained / "part" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photos / name, trained / "part" / name)
    part = open_data(str(trained / "part"))
    choice = choose_split(part, models_file.read_models(trained / "models.toml"), None, 0)
    assert choice.used is not None and {part.ids[row] for row in np.flatnonzero(choice.used).tolist()} == {"dark/0.png"} & read


@pytest.mark.parametrize("seed", [0, 1, pytest.param(9, marks=pytest.mark.slow)])
def test_the_training_seed_does_not_move_the_split(tmp_path: Path, seed: int) -> None:
    prepare: dict[int, Any] = {
        split_seed: Distillation.prepare(
            "digits", tmp_path, replace(QUICK, seed=seed, split_seed=split_seed), torch.device("cpu"), TEACHER, STUDENT
        )
        for split_seed in (0, 1)
    }
    expected = {split_seed: stratified_splits(open_data("digits"), split_seed) for split_seed in (0, 1)}
    for split_seed, run in prepare.items():
        for name in ("train", "validation", "test"):
            assert run.images[name].indices.tolist() == expected[split_seed][name].tolist()
    assert expected[0]["test"].tolist() != expected[1]["test"].tolist()


@pytest.mark.parametrize("origin", ["now", "0.1.0"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_that_have_seen_test_images_are_refused(photos: Path, trained: Path, tmp_path: Path, origin: str, role: str) -> None:
    weights = Path(shutil.copy(trained / f"{role}.safetensors", tmp_path / "w.safetensors"))
    if origin == "0.1.0":
        as_0_1_0_wrote_it(weights, str(photos), 3)
    data = open_data(str(photos))
    tested = [{data.ids[index] for index in stratified_splits(data, seed)["test"]} for seed in (0, 3)]
    seen = len(tested[0] - tested[1])
    references: dict[str, Any] = {"teacher": TEACHER, "student": STUDENT}
    references[role] += f"@{weights}"
    message = rf"The {role}'s weights .* split seed 3, and {seen} of the 20 test images"
    with pytest.raises(KdxError, match=message) as caught:
        distill(str(photos), **references, out=tmp_path / "out", settings=BRIEF, report=silent)
    assert "give --split-seed 3 or other weights" in caught.value.hint and not (tmp_path / "out").exists()


@pytest.mark.parametrize("origin", ["now", "0.1.0"])
def test_a_teacher_of_the_same_split_is_used_and_its_record_kept(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], origin: str
) -> None:
    """Also with another training seed. From the copy in the output folder, the teacher is still recognised."""
    weights = Path(shutil.copy(trained / "teacher.safetensors", tmp_path / "w.safetensors"))
    if origin == "0.1.0":
        as_0_1_0_wrote_it(weights, str(photos), 3)
    settings = replace(BRIEF, seed=7, split_seed=3)
    distill(str(photos), teacher=f"{TEACHER}@{weights}", student=STUDENT, out=tmp_path / "out", settings=settings, report=silent)
    assert "Warning" not in capsys.readouterr().out
    with pytest.raises(KdxError, match="split seed 3"):
        teacher = f"{TEACHER}@{tmp_path / 'out' / 'teacher.safetensors'}"
        distill(str(photos), teacher=teacher, student=STUDENT, out=tmp_path / "other", settings=BRIEF, report=silent)


def test_weights_in_the_home_folder_are_checked_too(photos: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(trained))
    with pytest.raises(KdxError, match="split seed 3"):
        distill(str(photos), teacher=f"{TEACHER}@~/teacher.safetensors", student=STUDENT, out=tmp_path, settings=BRIEF)


@pytest.mark.slow
def test_where_folders_define_the_test_images_the_split_seed_does_not_matter(photos: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(photos, tmp_path / "data" / split)
    data = str(tmp_path / "data")
    distill(data, teacher=TEACHER, student=STUDENT, out=tmp_path / "a", settings=replace(BRIEF, split_seed=1), report=silent)
    teacher = f"{TEACHER}@{tmp_path / 'a' / 'teacher.safetensors'}"
    distill(data, teacher=teacher, student=STUDENT, out=tmp_path / "b", settings=BRIEF, report=silent)


def test_a_teacher_of_other_data_is_used_with_a_warning(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(photos, tmp_path / "photos")
    (copy / "dark" / "0.png").unlink()
    teacher = f"{TEACHER}@{trained / 'teacher.safetensors'}"
    distill(str(copy), teacher=teacher, student=STUDENT, out=tmp_path / "out", settings=BRIEF, report=silent)
    output = capsys.readouterr().out
    assert output.startswith("Warning: The teacher's weights") and "may have been used in their training" in output
    expected = TrainingData(open_data(str(photos)).fingerprint, 3)
    assert read_training_data(tmp_path / "out" / "teacher.safetensors") == expected


@pytest.mark.parametrize("content", [{}, {"recipe": "{}"}, {"recipe": "cake"}, {"recipe": "[1]"}, {"recipe": '{"trained_on": 1}'}])
def test_weights_of_another_program_have_no_record(tmp_path: Path, content: dict[str, str]) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors", metadata=content)
    assert read_training_data(tmp_path / "w.safetensors") is None
    assert read_training_data(tmp_path / "w.pth") is None


def test_a_training_that_0_1_0_stopped_resumes_in_the_folder_as_it_was(photos: Path, tmp_path: Path) -> None:
    """With the old default, where the training seed was also that of the split."""
    data = shutil.copytree(photos, tmp_path / "photos")
    settings = replace(BRIEF, epochs=2, seed=1, split_seed=1)
    distill(str(data), teacher=TEACHER, student=STUDENT, out=tmp_path / "whole", settings=settings, report=silent)
    out = tmp_path / "out"
    with pytest.raises(Interruption):
        distill(str(data), teacher=TEACHER, student=STUDENT, out=out, settings=settings, report=stop_at("base", 1))
    as_0_1_0_wrote_it(out / "teacher.safetensors", str(data), 1)
    state = torch.load(out / "base.state.pt", weights_only=True)
    recipe = json.loads(state["recipe"]) | {"data": open_data(str(data)).fingerprint_of_0_1_0}
    del recipe["split_seed"]
    torch.save(state | {"recipe": json.dumps(recipe, sort_keys=True)}, out / "base.state.pt")
    with pytest.raises(KdxError, match="another configuration: split_seed differs"):
        distill(str(data), teacher=TEACHER, student=STUDENT, out=out, settings=replace(settings, split_seed=0), report=silent)
    results: list[EpochResult] = []
    again = shutil.copytree(out, tmp_path / "again")
    distill(str(data), teacher=TEACHER, student=STUDENT, out=out, settings=settings, report=results.append)
    assert summaries(results)[:2] == [("teacher", 1, False), ("base", 2, True)]
    for role in ("base", "student"):
        ours, theirs = (load_file(folder / f"{role}.safetensors") for folder in (out, tmp_path / "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    os.utime(data / "dark" / "1.png", (1, 1))
    with pytest.raises(KdxError, match="another configuration: data differs"):
        distill(str(data), teacher=TEACHER, student=STUDENT, out=again, settings=settings, report=silent)


def test_the_copy_of_a_teacher_that_0_1_0_made_is_finished(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors", metadata={"recipe": '{"given": "ab"}'})
    assert is_finished(tmp_path / "w.safetensors", Recipe({"given": "ab"}))
    assert is_finished(tmp_path / "w.safetensors", Recipe({"given": "ab", "trained_on": {"fingerprint": "12", "split_seed": 3}}))
    with pytest.raises(KdxError, match="given differs"):
        is_finished(tmp_path / "w.safetensors", Recipe({"given": "cd"}))
