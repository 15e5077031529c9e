"""The networks of `benchmarks.evidence`: for every seed two teachers, an assistant, a base and seven students, on two data sets.

    python -m benchmarks.evidence_networks composites --out FOLDER    train what is missing in FOLDER

A training that was interrupted continues. All networks of a seed are trained on the same images, and the seeds differ in everything that
is random in a training. The images are the same for all seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.data.splits import stratified_splits
from kdx.distill import TrainingSettings, distill

SEEDS = 5
METHODS = ("kd", "at", "rkd")
LAYERS = ("layer1", "layer2", "layer3")
TEACHERS = ("small", "large")
IMAGES = {"validation": 180, "test": 600}
"""The numbers of composites of the splits that are used, because every epoch is validated. Their classes are balanced."""


@dataclass(frozen=True)
class Design:
    """What is trained on a data set. The teachers are trained on the whole training split, base, assistant and students on a part of it.

    The assistant has the architecture of the small teacher and is distilled from the large one.
    """

    data: str
    teachers: dict[str, str]
    student: str
    settings: TrainingSettings


DESIGNS = {
    "composites": Design(
        "composites:count=4800,clutter=0,scale=0.8",
        {"small": "kdx:resnet,width=16,depth=1,stem=imagenet", "large": "kdx:resnet,width=32,depth=1,stem=imagenet"},
        "kdx:resnet,width=12,depth=1,stem=imagenet",
        TrainingSettings(
            epochs=24, teacher_epochs=9, batch=32, learning_rate=0.05, augment=True, flip=True, student_images=240, image_size=(64, 64)
        ),
    ),
    "digits": Design(
        "digits",
        {"small": "kdx:resnet,width=10,depth=1", "large": "kdx:resnet,width=24,depth=1"},
        "kdx:resnet,width=8,depth=1",
        TrainingSettings(epochs=40, teacher_epochs=6, batch=32, augment=True, student_images=80, image_size=(24, 24)),
    ),
}


@dataclass(frozen=True)
class Student:
    """A student of a seed: its method, its teacher, and whether an assistant stands between the two."""

    method: str
    teacher: str
    assisted: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}, {self.teacher} teacher" + (" and assistant" if self.assisted else "")


STUDENTS = (*(Student(method, teacher) for method in METHODS for teacher in TEACHERS), Student("kd", "large", assisted=True))


@dataclass(frozen=True)
class Trained:
    """The references of the networks of one seed, with their weights."""

    teachers: dict[str, str]
    assistant: str
    base: str
    students: dict[Student, str]


@dataclass(frozen=True)
class TestImages:
    """The test images [n, 3, height, width] in [0, 1], at the size of the networks, their labels [n], and the masks [n, height, width]."""

    __test__ = False  # not a test of pytest
    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]


def train(name: str, seed: int, out: Path) -> Trained:
    """Train the networks of one seed in ``out``, except those that are there, and return their references."""
    design = DESIGNS[name]
    data = stored_images(name, out)
    settings = replace(design.settings, seed=seed)
    folder = out / name / f"seed{seed}"
    classes = len(open_data(data).classes)

    def weights(reference: str, path: Path) -> str:
        return f"{reference},classes={classes}@{path.resolve()}"

    teachers: dict[str, str] = {}
    students: dict[Student, str] = {}
    base: Path | None = None
    for student in STUDENTS:
        if student.assisted:
            continue
        place = folder / student.name.replace(", ", "-").replace(" ", "-")
        teacher = teachers.get(student.teacher, design.teachers[student.teacher])
        distill(data, teacher=teacher, student=design.student, out=place, settings=replace(settings, method=student.method), base=base)
        teachers.setdefault(student.teacher, weights(design.teachers[student.teacher], place / "teacher.safetensors"))
        base = base or place / "base.safetensors"
        students[student] = weights(design.student, place / "student.safetensors")
    assistant_folder = folder / "assistant"
    small = design.teachers["small"]
    distill(data, teacher=teachers["large"], student=small, out=assistant_folder, settings=settings, base="none")
    assistant = weights(small, assistant_folder / "student.safetensors")
    last = STUDENTS[-1]
    place = folder / "kd-large-teacher-and-assistant"
    distill(data, teacher=assistant, student=design.student, out=place, settings=settings, base=base)
    students[last] = weights(design.student, place / "student.safetensors")
    if base is None:
        raise ValueError("no student was trained")
    return Trained(teachers, assistant, weights(design.student, base), students)


def stored_images(name: str, out: Path) -> str:
    """The reference of the images: composites are drawn once into a NumPy file, because every training reads them."""
    reference = DESIGNS[name].data
    if name == "digits":
        return reference
    path = out / name / "images.npz"
    if not path.exists():
        data = open_data(reference)
        arrays: dict[str, Any] = {"classes": np.array(data.classes)}
        for split, all_indices in data.splits.items():
            indices = all_indices[: IMAGES.get(split)]
            arrays[f"{split}_images"] = np.stack([np.asarray(data.read(int(index))) for index in indices])
            arrays[f"{split}_labels"] = data.labels[indices]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
    return str(path)


def test_images(name: str) -> TestImages:
    """The test images of a data set with the masks of their objects. The object of a digit is its ink."""
    design = DESIGNS[name]
    data = open_data(design.data)
    indices = stratified_splits(data, design.settings.split_seed)["test"][: IMAGES["test"]]
    if design.settings.image_size is None:
        raise ValueError("the design has no size of the images")
    pixels = load_images(data, indices, design.settings.image_size).pixels.numpy()
    if data.masks is None:
        masks = pixels[:, 0] >= 0.5
    else:
        masks = np.stack([mask[0] for index in indices if (mask := data.masks(int(index))) is not None])
    return TestImages(pixels, data.labels[indices], masks)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=DESIGNS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=range(SEEDS), help="several processes may train different seeds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for seed in options.seeds:
        train(options.data, seed, options.out)


if __name__ == "__main__":
    main()
