"""The data set composites: masks are exact, splits share no pixels, classes are balanced, and the cue occurs as often as stated."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kdx.data import composites as module
from kdx.data.composites import CLASS_KINDS, PHOTOGRAPHS, SHAPES, TEXTURES, CompositeOptions, compose
from kdx.data.dataset import located, open_data
from kdx.errors import KdxError

pytestmark = pytest.mark.skipif(find_spec("skimage") is None, reason="scikit-image is not installed")


@pytest.mark.parametrize("classes", CLASS_KINDS)
def test_the_object_changes_exactly_the_mask(classes: str) -> None:
    """Outside the mask the image is the background, which is the same for another object; inside it is the texture, and no background."""
    options = CompositeOptions(classes=classes)  # type: ignore[arg-type]
    for row in range(12):
        scene = compose(options, "test", row)
        mask = scene.object_mask
        assert 0.05 < mask.mean() < 0.25  # areas of 0.41 to 0.48 of a disc whose diameter is 0.425 to 0.575 of the side
        np.testing.assert_array_equal(scene.image[~mask], scene.background[~mask])
        np.testing.assert_array_equal(scene.image[mask], scene.object_pixels[mask])
        assert (scene.image != scene.background).any(2)[mask].mean() > 0.95  # a pixel may happen to have the colour of the background
        moved = compose(replace(options, scale=0.3), "test", row)  # another object, and distractors of another size
        bare = replace(options, clutter=0)
        np.testing.assert_array_equal(compose(bare, "test", row).background, compose(replace(bare, scale=0.3), "test", row).background)
        assert moved.object_mask.sum() < mask.sum()


def test_the_object_depends_neither_on_the_photograph_nor_on_the_distractors() -> None:
    for row in range(12):
        scene = compose(CompositeOptions(spurious=0.0), "train", row)
        for other in (CompositeOptions(spurious=1.0), CompositeOptions(clutter=0), CompositeOptions(clutter=5)):
            changed = compose(other, "train", row)
            np.testing.assert_array_equal(changed.object_mask, scene.object_mask)
            np.testing.assert_array_equal(changed.image[scene.object_mask], scene.image[scene.object_mask])


def test_the_data_set_is_what_is_composed() -> None:
    data = open_data("composites:count=100,side=80,classes=shape,seed=3")
    options = CompositeOptions(count=100, side=80, classes="shape", seed=3)
    assert data.masks is not None
    for index, (split, row) in ((0, ("train", 0)), (61, ("validation", 1)), (99, ("test", 24))):
        scene = compose(options, split, row)
        np.testing.assert_array_equal(np.asarray(data.read(index)), scene.image)
        np.testing.assert_array_equal(data.masks(index), scene.object_mask[None])
        assert data.classes[data.labels[index]] == scene.shape
        assert data.ids[index] == f"{split}/{row:05d}"
    assert {name: len(indices) for name, indices in data.splits.items()} == {"train": 60, "validation": 15, "test": 25}


def test_references_are_deterministic() -> None:
    first, second = open_data("composites:count=100,seed=1"), open_data("composites:seed=1,count=100")
    assert first.fingerprint == second.fingerprint
    other = open_data("composites:count=100,seed=2")
    assert other.fingerprint != first.fingerprint
    for index in (0, 70, 99):
        np.testing.assert_array_equal(np.asarray(first.read(index)), np.asarray(second.read(index)))
        assert (np.asarray(first.read(index)) != np.asarray(other.read(index))).any()
    longer = open_data("composites:count=200,seed=1")
    np.testing.assert_array_equal(np.asarray(longer.read(59)), np.asarray(first.read(59)))  # an image does not depend on the count
    assert located("composites:seed=1,scale=0.5,count=100") == "composites:count=100,seed=1"
    assert located("composites:seed=0") == located("composites") == "composites"


def test_splits_have_no_pixel_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture is replaced by one whose pixels are the numbers of their columns; crops of two splits must have no column in common."""
    columns: dict[str, dict[tuple[int, int], set[int]]] = {}

    class Ruler:
        def __init__(self, picture: Image.Image) -> None:
            self._picture = picture
            self.width, self.height = picture.size

        def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
            left, top, right, bottom = box
            assert 0 <= left < right <= self.width and 0 <= top < bottom <= self.height
            columns.setdefault(split, {}).setdefault(self._picture.size, set()).update(range(left, right))
            return self._picture.crop(box)

    rgb, grey = module._picture, module._luminance
    monkeypatch.setattr(module, "_picture", lambda source: Ruler(rgb(source)))
    monkeypatch.setattr(module, "_luminance", lambda source: Ruler(grey(source)))
    monkeypatch.setattr(module, "_statistics", lambda source: (128.0, 60.0))
    for split in ("train", "validation", "test"):
        for row in range(60):
            compose(CompositeOptions(), split, row)
    assert all(len(widths) >= 7 for widths in columns.values())  # pictures of equal size share an entry, and also the limits of the splits
    for size in columns["train"]:
        used = [columns[split].get(size, set()) for split in columns]
        assert not (used[0] & used[1] or used[0] & used[2] or used[1] & used[2])


@pytest.mark.parametrize("classes", CLASS_KINDS)
def test_classes_are_balanced_and_the_other_property_is_random(classes: str) -> None:
    data = open_data(f"composites:count=240,classes={classes}")
    for indices in data.splits.values():
        counts = np.bincount(data.labels[indices], minlength=len(data.classes))
        assert counts.max() - counts.min() <= 1
    scenes = [compose(CompositeOptions(classes=classes, clutter=0), "train", row) for row in range(240)]  # type: ignore[arg-type]
    names = list(TEXTURES) if classes == "texture" else list(SHAPES)
    assert data.classes == tuple(names)
    own, other = ("texture", "shape") if classes == "texture" else ("shape", "texture")
    assert all(getattr(scene, own) == names[scene.label] for scene in scenes)
    others = list(SHAPES) if classes == "texture" else list(TEXTURES)
    assert independence(np.array([(scene.label, others.index(getattr(scene, other))) for scene in scenes])) < 50  # 25 are expected


def test_the_spurious_cue_occurs_in_its_share_of_the_training_split_alone() -> None:
    options = CompositeOptions(spurious=0.6, clutter=0)
    photographs = list(PHOTOGRAPHS)
    pairs = {
        split: np.array(
            [(scene.label, photographs.index(scene.photograph)) for scene in (compose(options, split, row) for row in range(count))]
        )
        for split, count in (("train", 240), ("validation", 150), ("test", 150))
    }
    share = float((pairs["train"][:, 0] == pairs["train"][:, 1]).mean())
    assert share == pytest.approx(0.6 + 0.4 / 6, abs=0.1)  # a photograph that is drawn uniformly may be that of the class
    assert independence(pairs["train"]) > 200
    for split in ("validation", "test"):
        assert independence(pairs[split]) < 50


def independence(pairs: NDArray[Any]) -> float:
    """The chi-squared statistic [25 degrees of freedom] of the independence of two series of six classes, in pairs [n, 2]."""
    joint = np.zeros((6, 6))
    np.add.at(joint, (pairs[:, 0], pairs[:, 1]), 1)
    expected = joint.sum(1, keepdims=True) * joint.sum(0) / joint.sum()
    return float(((joint - expected) ** 2 / expected).sum())


def test_areas_of_the_shapes_are_similar() -> None:
    rows, columns = (np.mgrid[:400, :400] + 0.5) / 200 - 1
    areas = {name: float(inside(columns, rows).mean() * 4) for name, inside in module._SHAPE_TESTS.items()}
    assert set(areas) == set(SHAPES)
    assert max(areas.values()) / min(areas.values()) < 1.17
    assert areas["star"] == pytest.approx(5 * 0.5 * np.sin(np.pi / 5), rel=0.01)
    assert areas["triangle"] == pytest.approx(3 * np.sqrt(3) / 4, rel=0.01)
    assert not any(inside(columns, rows)[np.hypot(columns, rows) > 1.001].any() for inside in module._SHAPE_TESTS.values())


@pytest.mark.parametrize(
    ("place", "problem", "hint"),
    [
        ("class=shape", "no option 'class'", "classes"),
        ("spurius=0.5", "no option 'spurius'", "spurious"),
        ("side=64,side=96", "side of composites occurs twice", "once"),
        ("side=large", "side of composites cannot be 'large'", "whole number"),
        ("scale=", "scale of composites cannot be ''", "Give a number"),
        ("side=32", "side of composites cannot be 32", "64 to 224"),
        ("classes=colour", "classes of composites cannot be 'colour'", "texture or shape"),
        ("spurious=1.5", "spurious of composites cannot be 1.5", "0 to 1"),
        ("clutter=-1", "clutter of composites cannot be -1", "0 to 8"),
        ("scale=nan", "scale of composites cannot be nan", "0.2 to 0.8"),
        ("count=50", "count of composites cannot be 50", "from 100"),
        ("seed=-1", "seed of composites cannot be -1", "0 or more"),
    ],
)
def test_options_that_are_wrong(place: str, problem: str, hint: str) -> None:
    with pytest.raises(KdxError) as error:
        open_data(f"composites:{place}")
    assert problem in error.value.problem and hint in error.value.hint


def test_without_scikit_image_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(KdxError, match=r"kdx\[composites\]"):
        open_data("composites")
