"""The evidence: its scores equal those of `kdx.compare`, places of maps follow their definitions, and verdicts follow the t test.

Its grid has the students of the page, its images are those of the data set, and a run that is stopped continues.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import kdx
from benchmarks import evidence, evidence_claims, evidence_design, evidence_evaluation
from benchmarks.evidence_cells import MEASURED, Subject, largest_difference, subjects_of
from benchmarks.evidence_design import DATA, LAYERS, STUDENTS, Student, TestImages
from benchmarks.evidence_measures import MeasuredNetwork, Objects, Scoring, unicam_maps
from kdx import models
from kdx.data.dataset import open_data
from kdx.study.grid import Grid, grid_of

N = 40


def features(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(N, 5, 4, 4, generator=generator)
    return {role: shared + torch.randn(shared.shape, generator=generator) for role in ("student", "base", "teacher")}


LABELS = np.arange(N) % 4


@pytest.mark.parametrize("batch", [None, 10])
def test_scores_are_those_of_compare(batch: int | None) -> None:
    """Over batches of equal size the two draw the same batches only if there is one, so the batches of ten are compared by hand."""
    values = features()
    scores = Scoring(batch).scores(values, LABELS, seed=0)
    if batch is None:
        expected = kdx.compare({"layer": values}, LABELS, permutations=0)["layer"].scores
        assert {name: scores[name] for name in scores} == pytest.approx({name: expected[name].value for name in scores}, abs=1e-6)
        return
    batches = kdx.data.random_batches(LABELS, batch, 0)
    ratios = [
        kdx.fss(values["student"][torch.from_numpy(b)], values["teacher"][torch.from_numpy(b)], permutations=0).value for b in batches
    ]
    assert Scoring(batch, mean=True).scores(values, LABELS)["FSS(S,T)"] == pytest.approx(np.mean(ratios), abs=1e-6)


def test_biased_scores_are_those_of_fss() -> None:
    values = features()
    expected = kdx.fss(values["student"], values["teacher"], "biased", permutations=0).value
    assert Scoring(biased=True).scores(values, LABELS)["FSS(S,T)"] == pytest.approx(expected, abs=1e-6)


def test_maps_of_batches_are_unicams() -> None:
    values = features()
    maps = unicam_maps(values, "student", "base", LABELS, 10)
    chosen = torch.from_numpy(kdx.data.random_batches(LABELS, 10, 0)[1])
    expected = kdx.unicam(values["student"][chosen], values["base"][chosen], torch.from_numpy(LABELS)[chosen]).maps
    torch.testing.assert_close(maps[chosen], expected)


def test_places_of_maps() -> None:
    """An object in the left half of an image of 4 x 4 cells of 2 x 2 pixels."""
    masks = np.zeros((3, 8, 8), bool)
    masks[:, :, :4] = True
    objects = Objects.of(masks, 4, 4)
    assert objects.constant() == pytest.approx({"density": 1, "distance": (1.5 + 3.5) / 4 / 8, "background": 0.5, "empty": 0})
    maps = torch.zeros(3, 4, 4)
    maps[0, 1, 0] = 2.0  # inside
    maps[1, 2, 3] = 5.0  # outside, at 3 and 4 pixels from the object
    maps[1, 0, 0] = -1.0  # negative values do not count
    place = objects.place(maps)
    assert place == pytest.approx({"density": (2 + 0) / 2, "distance": (0 + 3.5 / 8) / 2, "background": 0.5, "empty": 1 / 3})


def record(shift: float) -> dict[str, object]:
    """A record in which every claim's difference is normal around ``shift`` with a small spread."""
    rng = np.random.default_rng(1)
    runs = []
    for data in DATA:
        for seed in range(5):
            students = {}
            for student in STUDENTS:
                boost = {"small": 1.0, "medium": 0.5, "large": 0.0}[student.teacher] + student.assisted
                students[student.name] = {layer: _layer(shift, boost, rng) for layer in LAYERS}
            runs.append({"data": data, "seed": seed, "students": students})
    return {"runs": runs}


def _layer(shift: float, boost: float, rng: np.random.Generator) -> dict[str, object]:
    noise = 0.01 * rng.standard_normal(4)
    scores = {"RS(S|B)": shift + noise[0], "RS(B|S)": 0.0, "FSS(S,T)": shift * (1 + boost) + noise[1], "FSS(B,T)": 0.0}
    places = {"distilled": {"distance": 0.0, "background": 0.0}, "residual": {"distance": shift + noise[2], "background": shift + noise[3]}}
    kinds = {variant.scores: scores for variant in evidence_claims.VARIANTS}
    return {"scores": kinds, "maps": {variant.maps: places for variant in evidence_claims.VARIANTS}}


@pytest.mark.parametrize(("shift", "word"), [(0.3, "holds"), (-0.3, "**contradicted**"), (0.0, "not settled")])
def test_verdicts(shift: float, word: str) -> None:
    judged = evidence_claims.verdicts(record(shift))
    assert len(judged) == 24
    assert [verdict.word for verdict in judged.values()].count(word) >= 23
    values = np.array([evidence_claims.CLAIMS[2].value(run, "layer3", evidence_claims.VARIANTS[0]) for run in record(shift)["runs"][:5]])  # type: ignore[index]
    interval = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert judged[2, "composites", 0].interval == pytest.approx(interval)
    assert judged[2, "composites", 0].p_adjusted >= stats.ttest_1samp(values, 0).pvalue


# ---- the command


@pytest.fixture(scope="module")
def grids() -> dict[str, Grid]:
    """The toy grid on digits, which are not drawn into files."""
    return {"digits": grid_of(evidence_design.design("digits", Path(), toy=True))}


def test_the_grids_have_the_students_of_the_page(grids: dict[str, Grid]) -> None:
    assert {Student.of(cell) for cell in grids["digits"].cells} == set(STUDENTS)
    for axis in ("methods", "teachers", "assistants", "students", "seeds"):
        axes = [evidence_design.contents(name)[axis] for name in DATA]
        assert list(axes[0]) == list(axes[1]) if axis != "seeds" else axes[0] == axes[1]


def test_with_an_assistant_the_measured_teacher_is_the_assistants(grids: dict[str, Grid]) -> None:
    jobs = {job.key: job for job in grids["digits"].jobs}
    for key, subject in subjects_of(grids).items():
        weights = jobs[f"digits/seed0/teacher-{subject.student.teacher}"].folder + "/teacher.safetensors"
        assert subject.weights == weights
        assert (jobs[key].teacher_weights == weights) is not subject.student.assisted


def test_drawn_images_are_those_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = "composites:count=100,classes=shape,clutter=0,scale=0.6"
    monkeypatch.setitem(evidence_design.TOY["composites"], "data.composites.reference", reference)
    evidence_design.draw("composites", tmp_path, toy=True)
    test = evidence_design.test_images("composites", str(evidence_design.images_file("composites", tmp_path)), tmp_path, (64, 64))
    data = open_data(reference)
    rows = data.splits["test"]
    assert data.masks is not None
    assert test.labels.tolist() == data.labels[rows].tolist()
    for number in (0, len(rows) - 1):
        assert np.array_equal(np.rint(255 * test.images[number]), np.asarray(data.read(int(rows[number]))).transpose(2, 0, 1))
        mask = data.masks(int(rows[number]))
        assert mask is not None
        assert np.array_equal(test.masks[number], mask[0])


def measured_networks(n: int = 12) -> tuple[dict[str, MeasuredNetwork], TestImages]:
    generator = torch.Generator().manual_seed(0)
    labels, masks = np.arange(n) % 3, np.zeros((n, 16, 16), bool)
    masks[:, 4:12, 4:12] = True
    networks = {}
    for role in ("student", "base"):
        network = models.load("kdx:resnet,width=4,depth=1", classes=3)
        network = replace(network, preprocessing=replace(network.preprocessing, size=None))
        networks[role] = MeasuredNetwork(network, LAYERS, torch.device("cpu"))
    return networks, TestImages(torch.rand(n, 3, 16, 16, generator=generator).numpy(), labels, masks)


def test_metrics_of_maps_with_known_values() -> None:
    """A uniform map has the mask's share of the area, and the mask itself always hits. A gain over the same network is zero."""
    networks, test = measured_networks()
    student = networks["student"]
    uniform = evidence_evaluation.measured(np.ones((12, 1, 1), np.float32), student, student, test)
    assert uniform["energy"] == pytest.approx(0.25)
    assert uniform["pointing"] == pytest.approx(0.25)
    assert uniform["density"] == pytest.approx(1)
    assert uniform["insertion[gain]"] == uniform["deletion[gain]"] == 0
    perfect = evidence_evaluation.measured(test.masks.astype(np.float32), student, networks["base"], test)
    assert perfect["pointing"] == 1
    assert perfect["energy"] == pytest.approx(1)
    probability = student.logits(torch.from_numpy(test.images)).softmax(1)[torch.arange(12), torch.from_numpy(test.labels)]
    assert abs(perfect["insertion"] - float(probability.mean())) < 0.3  # the curve ends at the probability of the image


@pytest.mark.slow
def test_the_check_of_the_gpu() -> None:
    """Two runs on the processor do not differ."""
    assert largest_difference("cpu", "cpu") == 0


def test_the_record_has_the_complete_seeds(grids: dict[str, Grid], tmp_path: Path) -> None:
    """Seed 0 is complete. Of seed 1 one cell is missing."""
    grid = grids["digits"]
    later = tuple(replace(cell, seed=1, key=cell.key.replace("seed0", "seed1")) for cell in grid.cells)
    jobs = [job for job in grid.jobs if job.kind == "cell"]
    both = replace(
        grid,
        cells=(*grid.cells, *later),
        jobs=(*jobs, *(replace(job, key=job.key.replace("seed0", "seed1"), folder=job.folder.replace("seed0", "seed1")) for job in jobs)),
    )
    subjects = {cell.key: Subject(Student.of(cell), cell.seed, "", "") for cell in both.cells}
    for number, job in enumerate(both.jobs):
        (tmp_path / job.folder).mkdir(parents=True)
        entry = {"accuracy": {"student": number / 100, "base": 0.1, "teacher": 0.9}, "layers": {"layer1": 1 / 3}, "images": 7}
        (tmp_path / job.folder / MEASURED).write_text(json.dumps(entry))
    complete = {cell.key for cell in both.cells[:-1]}
    (run,) = evidence.record_of(tmp_path, {"digits": both}, subjects, complete)
    assert (run["seed"], set(run["students"])) == (0, {student.name for student in STUDENTS})
    assert [run["accuracy"][Student.of(cell).name] for cell in grid.cells] == [number / 100 for number in range(len(jobs))]
    path = tmp_path / "records" / "record.json"
    evidence.write_record(path, {"seconds": 3, "runs": [run, run]})
    stored = json.loads(path.read_text())
    assert stored["seconds"] == 3
    assert len(stored["runs"]) == 2
    assert stored["runs"][1]["students"][STUDENTS[0].name] == {"layer1": 0.333333}


@pytest.mark.slow
def test_a_run_that_is_stopped_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time left, a run ends without a result. The next one gives the whole record, whose measurements are those of the cells."""
    monkeypatch.setattr(evidence, "DATA", ("digits",))
    monkeypatch.setitem(evidence_design.TOY, "digits", {**evidence_design.TOY["digits"], "methods": ["kd"]})
    record = tmp_path / "record.json"
    options = Namespace(
        out=tmp_path / "out", record=record, minutes=0.0, workers=1, images=30, device="cpu", toy=True, data=["digits"], seeds=8
    )
    monkeypatch.setattr(evidence, "draw", lambda *_, **__: None)
    evidence.run(options)
    assert json.loads(record.read_text())["runs"] == []
    evidence.run(Namespace(**{**vars(options), "minutes": None}))
    (run,) = json.loads(record.read_text())["runs"]
    assert set(run["students"]) == {student.name for student in STUDENTS if student.method == "kd"}
    scores = run["students"]["kd, small teacher"]["layer3"]["scores"]
    assert set(scores) == {"whole", "published", "salient features", "biased", "batches of 5, summed", "batches of 5, mean of ratios"}
    assert set(run["detailed"]) == set(LAYERS)
    written = record.read_bytes()
    evidence.run(Namespace(**{**vars(options), "minutes": None}))
    again = json.loads(record.read_text())
    assert again["runs"] == json.loads(written)["runs"]
    shutil.rmtree(tmp_path / "out")
    evidence.run(Namespace(**{**vars(options), "minutes": 0.0}))  # nothing is computed again for a seed that the record contains
    assert json.loads(record.read_text())["runs"] == again["runs"]
