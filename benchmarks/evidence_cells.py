"""The jobs of `benchmarks.evidence`, which its processes run: trainings, and measurements of the students."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.evidence_design import ASSISTED_TEACHER, LAYERS, Student, TestImages, test_images
from benchmarks.evidence_measures import MeasuredNetwork
from benchmarks.evidence_measuring import measure, measure_details
from kdx import models
from kdx.commands.study import train
from kdx.data.dataset import open_data
from kdx.disk import write_atomic
from kdx.distill.seeding import seeded
from kdx.study.attempts import Note
from kdx.study.grid import MODELS, Grid, Job

DETAILED = Student("kd", ASSISTED_TEACHER)
"""The student whose maps are also measured with other batches, reference sets and augmentations, and by the metrics of kdx evaluate."""

MEASURED = "measured.json"
"""The measurements of a cell, in its folder."""

_AGREE = 0.02
"""The largest allowed difference between scores of the GPU and of the processor, which add in different orders."""


@dataclass(frozen=True)
class Subject:
    """The subject of the measurements of a cell.

    teacher: the reference of the teacher with which the student is compared; with an assistant, that of the assistant. weights: its file,
    relative to the folder.
    """

    student: Student
    seed: int
    teacher: str
    weights: str


# ---- one job


def perform(job: Job, folder: Path, note: Note, *, subjects: Mapping[str, Subject], images: int, device: str) -> None:
    """Train the network of a job. Measure it if it is a student."""
    models_file = train(job, folder, note)
    if models_file is None:
        return
    subject, size = subjects[job.key], job.settings.image_size
    if size is None:
        raise ValueError("the design has no size of the images")
    place, start = torch.device(device), time.monotonic()
    classes = len(open_data(job.data).classes)
    files = {role: folder / job.folder / MODELS / f"{role}.safetensors" for role in ("student", "base")}
    references = {role: f"{job.student},classes={classes}@{path.absolute()}" for role, path in files.items()}
    references["teacher"] = f"{subject.teacher},classes={classes}@{(folder / subject.weights).absolute()}"
    networks = {role: MeasuredNetwork(models.load(reference), LAYERS, place) for role, reference in references.items()}
    data = job.key.split("/")[0]
    test = test_images(data, job.data, folder, size, job.settings.split_seed)
    result = measure(networks, test, images, note)
    if subject.student == DETAILED:
        composites = data == "composites"
        result["detailed"] = measure_details(networks, test, images, note, mirrored=composites, evaluates=composites)
    result["seconds"] = round(time.monotonic() - start, 1)
    write_atomic(folder / job.folder / MEASURED, json.dumps(result).encode())


def measurements_file(job: Job) -> list[Path]:
    """The file of the measurements of a cell, relative to the folder; other jobs have none."""
    return [Path(job.folder, MEASURED)] if job.kind == "cell" else []


def subjects_of(grids: Mapping[str, Grid]) -> dict[str, Subject]:
    """The subject of each cell, by its key."""
    jobs = {job.key: job for grid in grids.values() for job in grid.jobs}
    result = {}
    for grid in grids.values():
        for cell in grid.cells:
            teacher = jobs[f"{cell.data}/seed{cell.seed}/teacher-{cell.teacher}"]
            result[cell.key] = Subject(Student.of(cell), cell.seed, teacher.teacher, f"{teacher.folder}/teacher.safetensors")
    return result


# ---- the device


def measuring_device(name: str, say: Note) -> str:
    """The device of the measurements, after a check: a GPU has to agree with the processor on small random networks.

    If it does not, or if an operation does not run there, the processor measures.
    """
    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "cpu"
    try:
        different = largest_difference("cpu", "cuda")
    except Exception as error:
        say(f"Measuring on the processor, because the check of the GPU fails: {type(error).__name__}: {error}")
        return "cpu"
    say(f"Check of the GPU: scores and densities differ from the processor's by at most {different:.2g}.")
    return "cuda" if different < _AGREE else "cpu"


def largest_difference(*devices: str) -> float:
    """The largest difference between two devices' whole-set scores and densities of decompositions, of small random networks."""
    rng = torch.Generator().manual_seed(0)
    n, side = 60, 64  # images that batches of 5 divide
    labels = torch.arange(n) % 4
    pattern = torch.rand(4, 3, side, side, generator=rng)
    images = (pattern[labels] + torch.rand(n, 3, side, side, generator=rng)) / 2
    masks = torch.zeros(n, side, side, dtype=torch.bool)
    masks[:, 8:40, 16:48] = True
    test = TestImages(images.numpy(), labels.numpy(), masks.numpy())
    results = []
    for device in devices:
        networks = {}
        for number, role in enumerate(("student", "base", "teacher")):
            with seeded(torch.device("cpu"), 0, number):
                network = models.load("kdx:resnet,width=8,depth=1,stem=imagenet", classes=4)
            network = replace(network, preprocessing=replace(network.preprocessing, size=None))
            networks[role] = MeasuredNetwork(network, LAYERS, torch.device(device))
        result = measure(networks, test, n, lambda _: None)
        results.append(
            [
                number
                for by_layer in result["layers"].values()
                for number in (
                    *by_layer["scores"]["whole"].values(),
                    by_layer["maps"]["decomposition of RS(S|B), RS(B|S)"]["distilled"]["density"],
                )
            ]
        )
    return max(float(abs(a - b)) for a, b in zip(*results, strict=True))
