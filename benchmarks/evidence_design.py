"""The design of `benchmarks.evidence`: two studies, the students that they train, and the images on which networks are measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.data.splits import stratified_splits
from kdx.study.design import Design, design_of, read_design, set_value
from kdx.study.table import Cell

STUDIES = Path(__file__).parent / "studies"
DATA = ("composites", "digits")
LAYERS = ("layer1", "layer2", "layer3")
ASSISTED_TEACHER = "large"
"""The only teacher that is larger than the assistant."""

DRAWN = {"train": None, "validation": 300, "test": 1000}
"""How many composites of each split are drawn; all for None. Their classes are balanced."""

TOY: dict[str, dict[str, Any]] = {
    "composites": {
        "data.composites.reference": "composites:count=400,classes=shape,clutter=0,scale=0.6",
        "teachers": {
            name: f"kdx:resnet,width={width},depth=1,stem=imagenet" for name, width in (("small", 4), ("medium", 5), ("large", 6))
        },
        "assistants": {"assistant": "kdx:resnet,width=5,depth=1,stem=imagenet"},
        "students": {"student": "kdx:resnet,width=3,depth=1,stem=imagenet"},
        "training.student_images": 60,
    },
    "digits": {
        "teachers": {name: f"kdx:resnet,width={width},depth=1" for name, width in (("small", 4), ("medium", 5), ("large", 6))},
        "assistants": {"assistant": "kdx:resnet,width=5,depth=1"},
        "students": {"student": "kdx:resnet,width=3,depth=1"},
    },
}
"""The settings of the toy scale, which tests the command. Its results mean nothing for the claims."""

_TOY_TRAINING = {"seeds": 1, "training.epochs": 2, "training.teacher_epochs": 1, "training.batch": 10}


@dataclass(frozen=True)
class Student:
    """A student of a seed: its method, its teacher, and whether an assistant stands between the two."""

    method: str
    teacher: str
    assisted: bool = False

    @classmethod
    def of(cls, cell: Cell) -> Student:
        return cls(cell.method, cell.teacher, bool(cell.assistants))

    @property
    def name(self) -> str:
        return f"{self.method}, {self.teacher} teacher" + (" and assistant" if self.assisted else "")


@cache
def contents(name: str) -> Mapping[str, Any]:
    """The contents of the study file of a data set."""
    return read_design(STUDIES / f"evidence_{name}.toml")


METHODS: tuple[str, ...] = tuple(contents(DATA[0])["methods"])
TEACHERS: tuple[str, ...] = tuple(contents(DATA[0])["teachers"])
STUDENTS = (
    *(Student(method, teacher) for method in METHODS for teacher in TEACHERS),
    *(Student(method, ASSISTED_TEACHER, assisted=True) for method in METHODS),
)
"""The students of a seed, which are the same on both data sets."""


def design(name: str, folder: Path, *, toy: bool = False) -> Design:
    """The design of a data set's study, on the images that `draw` has written into the folder."""
    content = deepcopy(dict(contents(name)))
    for key, value in ({**TOY[name], **_TOY_TRAINING} if toy else {}).items():
        set_value(content, key.split("."), value)
    if name == "composites":
        set_value(content, ["data", name, "reference"], str(images_file(name, folder)))
    return design_of(content)


def drawn_reference(name: str, *, toy: bool = False) -> str:
    """The reference of the images in the study file."""
    if toy and (key := f"data.{name}.reference") in TOY[name]:
        return str(TOY[name][key])
    entry = contents(name)["data"][name]
    return str(entry["reference"] if isinstance(entry, dict) else entry)


# ---- images


def images_file(name: str, folder: Path) -> Path:
    return folder.absolute() / f"{name}.npz"


def _masks_file(name: str, folder: Path) -> Path:
    return folder.absolute() / f"{name}_masks.npy"


def draw(name: str, folder: Path, *, toy: bool = False, workers: int = 1) -> None:
    """Draw composites and the masks of the test split into files, because every training reads them. Other data sets are not drawn."""
    if name != "composites" or _masks_file(name, folder).exists():
        return
    reference = drawn_reference(name, toy=toy)
    data = open_data(reference)
    indices = {split: rows[: DRAWN[split]] for split, rows in data.splits.items()}
    arrays: dict[str, Any] = {"classes": np.array(data.classes)}
    parts = [part for rows in indices.values() for part in np.array_split(rows, -(-len(rows) // 250))]
    drawn = dict(chain.from_iterable(_drawn(reference, parts, workers)))
    for split, rows in indices.items():
        arrays[f"{split}_images"] = np.stack([drawn[int(row)] for row in rows])
        arrays[f"{split}_labels"] = data.labels[rows]
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(images_file(name, folder), **arrays)
    if data.masks is None:
        raise ValueError("composites have masks")
    np.save(_masks_file(name, folder), np.stack([mask[0] for row in indices["test"] if (mask := data.masks(int(row))) is not None]))


def _drawn(reference: str, parts: Sequence[NDArray[np.int64]], workers: int) -> Iterator[Iterable[tuple[int, NDArray[np.uint8]]]]:
    if workers == 1:
        yield from map(_part, repeat(reference), parts)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(_part, repeat(reference), parts)


def _part(reference: str, rows: NDArray[np.int64]) -> list[tuple[int, NDArray[np.uint8]]]:
    """Images [h, w, 3] of these rows of a data set."""
    data = open_data(reference)
    return [(int(row), np.asarray(data.read(int(row)))) for row in rows]


@dataclass(frozen=True)
class TestImages:
    """The test images [n, 3, height, width] in [0, 1], at the size of the networks, their labels [n], and the masks [n, height, width]."""

    __test__ = False  # not a test of pytest
    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]

    def first(self, count: int) -> TestImages:
        """The first images."""
        return TestImages(self.images[:count], self.labels[:count], self.masks[:count])


@cache
def test_images(name: str, reference: str, folder: Path, size: tuple[int, int], split_seed: int = 0) -> TestImages:
    """The test images of a study with the masks of their objects. The object of a digit is its ink.

    reference: the reference of the images on which the networks are trained. folder: the folder into which `draw` wrote.
    """
    data = open_data(reference)
    rows = stratified_splits(data, split_seed)["test"]
    pixels = load_images(data, rows, size).pixels.numpy()
    masks = np.load(_masks_file(name, folder)) if name == "composites" else pixels[:, 0] >= 0.5
    return TestImages(pixels, data.labels[rows], masks)
