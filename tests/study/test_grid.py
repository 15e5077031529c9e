"""The grid: which cells there are, which trainings they share, and what may change in a study that exists."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kdx.data.dataset import table_of
from kdx.errors import KdxError
from kdx.models.models_file import ModelsFile
from kdx.models.resnet import resnet
from kdx.runs.plan import Plan
from kdx.study.checks import check_runs
from kdx.study.conflicts import check_same_study
from kdx.study.design import design_of
from kdx.study.grid import Grid, grid_of
from tests.study.small_study import ASSISTANT, CONTENT, STUDENT, TEACHER


def grid(**entries: Any) -> Grid:
    result = grid_of(design_of({**copy.deepcopy(CONTENT), **entries}))
    check_runs(result.jobs)
    return result


def test_shared_networks_are_trained_once() -> None:
    """Two teachers, two students, three methods and two seeds: 24 cells, 4 teachers and 4 bases."""
    result = grid(
        teachers={"large": TEACHER, "medium": ASSISTANT},
        students={"tiny": STUDENT, "other": "kdx:resnet,width=2,depth=2,stages=2"},
        methods=["kd", "at", "rkd"],
        seeds=2,
    )
    assert len(result.cells) == len({cell.key for cell in result.cells}) == 24
    assert Counter(job.kind for job in result.jobs) == {"cell": 24, "teacher": 4, "base": 4}
    started: set[str] = set()
    for job in result.jobs:
        assert started.issuperset(job.needs)
        started.add(job.key)
        if job.kind == "cell":
            data, teacher, student, _, seed = job.key.split("/")
            assert job.teacher_weights == f"trainings/{data}/{seed}/teacher-{teacher}/teacher.safetensors"
            assert str(job.base).startswith(f"trainings/{data}/{seed}/base-{student}-")
            assert job.settings.seed == int(seed.removeprefix("seed"))
    assert {cell.key for cell in result.cells} <= started


def test_an_assistant_stands_between_a_larger_teacher_and_a_smaller_student() -> None:
    result = grid(teachers={"large": TEACHER, "same": STUDENT}, assistants={"medium": ASSISTANT, "huge": "kdx:resnet,width=9,stages=2"})
    chains = {(cell.teacher, *cell.assistants) for cell in result.cells}
    assert chains == {("large",), ("large", "medium"), ("same",)}
    (job,) = [job for job in result.jobs if job.key == "digits/large+medium/tiny/at/seed0"]
    assert job.teacher == ASSISTANT and job.teacher_weights == "trainings/digits/seed0/assistant-large+medium-at/student.safetensors"
    assert Counter(job.kind for job in result.jobs)["assistant"] == 2  # one per method


def test_a_study_without_bases_trains_none() -> None:
    result = grid(training={"base": "none", "image_size": 8, "epochs": 1})
    assert Counter(job.kind for job in result.jobs) == {"cell": 2, "teacher": 1}
    assert {job.options.base for job in result.jobs} == {"none"}


def test_teachers_with_other_preprocessing_have_other_bases(tmp_path: Path) -> None:
    """The networks of a distillation share the teacher's preprocessing, so a base belongs to it."""
    factory = "tests.study.factories:brighter"
    result = grid(teachers={"large": TEACHER, "other": factory})
    bases = {str(job.base) for job in result.jobs if job.kind == "cell"}
    assert len(bases) == Counter(job.kind for job in result.jobs)["base"] == 2


def test_keys_and_networks_that_are_not_valid_are_errors() -> None:
    with pytest.raises(KdxError, match="the key digits/large/tiny/kd-at/seed0"):
        grid(methods={"kd at": "kd", "kd/at": "at"})
    with pytest.raises(KdxError, match="The network large: "):
        grid(teachers={"large": "kdx:nothing"})
    with pytest.raises(KdxError, match="no folder"):
        grid(data={"x": "nowhere"})


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"split": "holdout"}, "There is no split 'holdout'."),
        ({"target": "missing.csv"}, "missing.csv"),
        ({"target": "soft:student,temperature=cold"}, "is not a positive number"),
        ({"target": "prototypes:teacher,layer=layer9"}, "layer9"),
        ({"target": "prototypes:teacher,layer=layer3"}, "layer3"),  # only the first teacher has it
        ({"groups": "camera"}, "has no table with a column 'camera'"),
        ({"groups_file": "missing.csv"}, "missing.csv"),
        ({"gallery_order": "magic"}, "Images have no number 'magic'"),
        ({"gallery_order": "layer1/distilled/magic"}, "Images have no number"),
        ({"gallery_images": ["nobody.png"]}, "There is no image 'nobody.png'"),
        ({"reference_images": 2}, "A reference set of 2 is too small."),
        ({"geometry": "batch", "keep_features": True}, "Only the geometry whole stores features."),
        ({"geometry": "whole", "max_disk": 1e-6}, "and the limit is 0.0 MB (--max-disk)"),
        ({"features": "salient", "geometry": "whole"}, "Salient features have the geometry batch or reference."),
        ({"features": "salient", "gallery_order": "layer1/rs_student/total"}, "Images have no number 'layer1/rs_student/total'"),
    ],
)
def test_an_error_in_how_cells_are_explained_appears_before_anything_is_trained(entries: dict[str, Any], problem: str) -> None:
    explain = {**CONTENT["explain"], **entries}
    with pytest.raises(KdxError) as error:
        grid(teachers={"deep": "kdx:resnet,width=4,depth=1,stages=3", "large": TEACHER}, explain=explain)
    assert problem in error.value.problem and error.value.problem.startswith("The runs of the data set digits: ")


@pytest.mark.parametrize(
    "entries",
    [
        {"split": "train"},
        {"target": "soft:student"},
        {"target": "prototypes:teacher,layer=layer1"},
        {"gallery_order": "teacher_confidence"},
        {"gallery_order": "layer9/distilled/total"},
        {"decoder": "torchvision-cuda", "device": "cuda:7"},  # `kdx.commands.study.run` looks for devices
    ],
)
def test_a_study_has_the_options_of_a_run(entries: dict[str, Any]) -> None:
    assert grid(explain={**CONTENT["explain"], **entries}).jobs


def test_a_target_of_a_network_without_a_size_has_that_of_the_training() -> None:
    plain = "tests.study.factories:plain"
    assert grid(teachers={"large": plain}, students={"tiny": plain}, explain={"target": "soft:student"}).jobs


def test_a_student_without_a_size_has_that_of_the_teacher() -> None:
    """As in `kdx distill`."""
    brighter, plain = "tests.study.factories:brighter", "tests.study.factories:plain"
    result = grid(teachers={"large": brighter}, students={"tiny": plain}, training={"epochs": 1})
    assert {job.preprocessing.size for job in result.jobs} == {(8, 8)}


def test_the_target_is_that_of_every_teacher_that_shares_an_assistant(monkeypatch: pytest.MonkeyPatch) -> None:
    planned, with_models = [], Plan.with_models

    def observed(data: str, models_file: ModelsFile, *arguments: Any) -> Plan:
        planned.append((models_file.teacher, models_file.preprocessing))
        return with_models(data, models_file, *arguments)

    monkeypatch.setattr(Plan, "with_models", observed)
    large = "tests.study.factories:wide"
    grid(teachers={"first": TEACHER, "second": large}, assistants={"medium": ASSISTANT}, explain={"target": "soft:student"})
    assert len(planned) == len(set(planned)) == 4
    assert len({preprocessing for teacher, preprocessing in planned if teacher == ASSISTANT}) == 2


def test_an_own_student_has_no_random_baseline() -> None:
    with pytest.raises(KdxError, match=r"How 'tests.study.factories:plain.*' initialises its weights is not known"):
        grid(students={"tiny": "tests.study.factories:plain"}, explain={"random_baseline": True})


def test_a_program_for_inference_is_no_student(tmp_path: Path) -> None:
    with pytest.raises(KdxError, match=r"tiny: .*student.pt2 is a program for inference and cannot be trained"):
        grid(students={"tiny": str(tmp_path / "student.pt2")})


def test_a_sample_has_the_table_of_its_data() -> None:
    assert table_of("sample:20:photos/list.csv") == table_of("photos/list.csv") == Path("photos/list.csv")
    assert table_of("sample:20:digits") is None


def test_other_weights_in_a_file_make_other_jobs_of_the_networks_that_start_with_it(tmp_path: Path) -> None:
    file, identities = tmp_path / "start.safetensors", []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        save_file(resnet(width=2, depth=1, stages=2, classes=10).state_dict(), file)
        identities.append({job.kind: job.identity for job in grid(students={"tiny": f"{STUDENT}@{file}"}).jobs})
    first, same, other = identities
    assert first == same
    assert {kind for kind in first if first[kind] != other[kind]} == {"base", "cell"}


@pytest.mark.medium
def test_other_weights_in_a_folder_of_transformers_make_other_jobs(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=10)  # type: ignore[call-arg]
    identities = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        ResNetForImageClassification(config).save_pretrained(tmp_path / "net")
        identities.append({job.kind: job.identity for job in grid(students={"tiny": f"hf:{tmp_path / 'net'}"}).jobs})
    first, same, other = identities
    assert first == same
    assert {kind for kind in first if first[kind] != other[kind]} == {"base", "cell"}


def plan(**entries: Any) -> dict[str, Any]:
    design = design_of({**copy.deepcopy(CONTENT), **entries})
    return {"design": design.as_table(), "fingerprints": {"digits": "a"}}


def test_batches_that_cannot_be_divided_are_refused_for_every_data_set() -> None:
    data = {"many": "sample:300:digits", "few": "sample:40:digits"}
    with pytest.raises(KdxError, match=r"A batch of \d+ of the \d+ training images cannot be split into 16 parts"):
        grid(data=data, training={"epochs": 1, "image_size": 8, "accumulate": 16})
    assert grid(data={"many": data["many"]}, training={"epochs": 1, "image_size": 8, "accumulate": 16}).jobs


def test_names_and_seeds_may_be_added_and_removed(tmp_path: Path) -> None:
    check_same_study(tmp_path, plan(), plan(seeds=[5], methods=["rkd"], teachers={"new": TEACHER}))


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"teachers": {"large": ASSISTANT}}, "teachers.large = 'kdx:resnet,width=4"),
        ({"methods": {"kd": "at", "at": "at"}}, "methods.kd = 'kd', and this one has 'at'"),
        ({"training": {"epochs": 2, "image_size": 8}}, "training.epochs = 1, and this one has 2"),
        ({"training": {"epochs": 1}}, "training.image_size = 8, and this one has the default"),
        ({"explain": {"permutations": 9, "gallery": 2}}, "explain.runtime"),
        ({"images": 20}, "images = the default, and this one has 20"),
        ({"layers": ["layer1"]}, "layers"),
        ({"data": {"digits": "digits"}}, "data.digits"),
    ],
)
def test_a_changed_option_of_existing_cells_is_refused(tmp_path: Path, entries: dict[str, Any], problem: str) -> None:
    with pytest.raises(KdxError, match=problem):
        check_same_study(tmp_path, plan(), plan(**entries))


def test_changed_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KdxError, match="The images of digits"):
        check_same_study(tmp_path, plan(), {**plan(), "fingerprints": {"digits": "b"}})
