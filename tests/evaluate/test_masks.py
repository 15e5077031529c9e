"""Masks from every kind of annotation, matched to images and transformed as the images are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from PIL import Image

from kdx.choices import COVER, ResizeMode, Resizing
from kdx.data.dataset import Dataset
from kdx.data.pixels import fit, to_rgb
from kdx.errors import KdxError
from kdx.evaluate.annotations import Annotations, read_annotations, run_lengths
from kdx.evaluate.masks import mask_source, transformed, upright
from kdx.runs.record import read_run
from tests.made_runs import make_run

HEIGHT, WIDTH = 20, 31


def square(top: int, left: int, side: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def only(annotations: Annotations, class_name: str = "cat", size: tuple[int, int] | None = (HEIGHT, WIDTH)) -> Any:
    (mask,) = annotations.masks.values()
    return mask(size, class_name)


@pytest.mark.parametrize("mode", ["cover", "squash", "letterbox"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(12, 12), (40, 16), (20, 31)])
def test_a_mask_stays_on_its_object(mode: ResizeMode, interpolation: Any, size: tuple[int, int]) -> None:
    """A picture that is white exactly where its mask is stays so, except along the edge of the mask."""
    mask = square(6, 9, 11)
    picture = Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).convert("RGB")
    resizing = Resizing(mode, interpolation)
    levels = np.asarray(fit(picture, size, resizing))[..., 0]
    fitted = transformed(mask, size, resizing)
    bars = np.asarray(fit(Image.new("RGB", picture.size), size, resizing))[..., 0] == 128
    assert fitted.any() and not fitted[bars].any()
    assert (levels[fitted] >= 120).all() and (levels[~fitted & ~bars] <= 136).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_its_image(orientation: int, tmp_path: Path) -> None:
    mask = square(2, 4, 7)
    picture = Image.fromarray(np.repeat(mask[..., None], 3, 2).astype(np.uint8) * np.uint8(255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "1.png", exif=exif)
    with Image.open(tmp_path / "1.png") as opened:
        shown = np.asarray(to_rgb(opened))[..., 0] == 255
    assert (only(read_annotations(tmp_path)) == shown).all()  # the file of the mask states its orientation itself
    assert (upright(shown, (HEIGHT, WIDTH), orientation, "1") == shown).all()
    if orientation > 4:  # height and width are exchanged, so a mask for the stored pixels is recognised
        assert (upright(mask, (HEIGHT, WIDTH), orientation, "1") == shown).all()
    with pytest.raises(KdxError, match="The mask of 1 has 31 x 10 pixels"):
        upright(mask[:10], (HEIGHT, WIDTH), orientation, "1")


def test_mask_images(tmp_path: Path) -> None:
    mask = square(3, 5, 8)
    levels = mask.astype(np.uint8)
    images = {
        "grey.png": Image.fromarray(levels),
        "rgb.png": Image.fromarray(np.stack([levels * 0, levels * 9, levels * 0], 2)),
        "one.png": Image.fromarray(mask),
        "alpha.png": Image.fromarray(np.stack([levels * 0 + 255] * 3 + [levels * 255], 2)),
        "sixteen.tiff": Image.fromarray(levels.astype(np.uint16) * np.uint16(300)),
        "noisy.jpg": Image.fromarray(levels * np.uint8(255)),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
    palette = Image.fromarray(np.where(mask, 3, 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0] * 256)
    border = np.asarray(palette).copy()
    border[0] = 255  # Pascal VOC's void
    voc = Image.fromarray(border, "P")
    voc.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "palette.png")
    voc.save(tmp_path / "void.png")
    annotations = read_annotations(tmp_path)
    assert len(annotations.masks) == 8
    for name, load in annotations.masks.items():
        loaded = load(None, "cat")
        assert loaded is not None and np.array_equal(loaded, mask), name
    (tmp_path / "grey.png").write_bytes(b"no image")
    with pytest.raises(KdxError, match=r"grey\.png cannot"):
        annotations.masks["grey.png"](None, "cat")


def coco(tmp_path: Path, *objects: dict[str, Any], **image: Any) -> Path:
    entries = [{"image_id": 7, "category_id": 1, **entry} for entry in objects]
    categories = [{"id": 1, "name": "Cat"}, {"id": 2, "name": "dog"}]
    stated = {"id": 7, "file_name": "cat/1.jpg", "height": HEIGHT, "width": WIDTH, **image}
    (tmp_path / "coco.json").write_text(json.dumps({"images": [stated], "annotations": entries, "categories": categories}))
    return tmp_path / "coco.json"


def test_coco_polygons_and_boxes(tmp_path: Path) -> None:
    points = [(3.2, 2.1), (17.9, 4.4), (12.3, 18.2), (5.5, 9.0)]
    flat = [value for point in points for value in point]
    centres = [(x + 0.5, y + 0.5) for y in range(HEIGHT) for x in range(WIDTH)]
    expected = Outline(points, closed=False).contains_points(centres).reshape(HEIGHT, WIDTH)
    result = only(read_annotations(coco(tmp_path, {"segmentation": [flat], "bbox": [0, 0, 1, 1]})))
    assert (result == expected).all() and result.sum() > 80
    two = only(read_annotations(coco(tmp_path, {"segmentation": [flat, [20, 1, 29, 1, 29, 8, 20, 8]]})))
    expected[1:8, 20:29] = True
    assert (two == expected).all()
    box = only(read_annotations(coco(tmp_path, {"bbox": [5, 3, 8, 8]}, {"bbox": [25, 15, 99, 99]})))
    expected = square(3, 5, 8)
    expected[15:, 25:] = True
    assert (box == expected).all()


def test_coco_classes_and_crowds(tmp_path: Path) -> None:
    cat, dog = {"bbox": [5, 3, 8, 8]}, {"bbox": [0, 0, 4, 4], "category_id": 2}
    annotations = read_annotations(coco(tmp_path, cat, dog, {"bbox": [0, 0, 31, 20], "iscrowd": 1}))
    assert (only(annotations, "cat") == square(3, 5, 8)).all()  # the class of the image, in any case of letters
    assert (only(annotations, "DOG") == square(0, 0, 4)).all()
    assert (only(annotations, "owl") == (square(3, 5, 8) | square(0, 0, 4))).all()  # not a class of the file: every object
    assert only(read_annotations(coco(tmp_path, dog)), "cat") is None


def compressed(counts: list[int]) -> str:
    """COCO's compression of run lengths, as its interface in C writes it."""
    text = ""
    for number, count in enumerate(counts):
        value = count - (counts[number - 2] if number > 2 else 0)
        while True:
            bits, value = value & 0x1F, value >> 5
            more = value != -1 if bits & 0x10 else value != 0
            text += chr((bits | 0x20 if more else bits) + 48)
            if not more:
                break
    return text


def test_coco_run_lengths(tmp_path: Path) -> None:
    mask = square(3, 5, 8) | square(10, 20, 9)
    flat = mask.T.ravel()  # down the columns
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    assert (run_lengths(counts, (HEIGHT, WIDTH)) == mask).all()
    for stored in (counts, compressed(counts)):
        segmentation = {"counts": stored, "size": [HEIGHT, WIDTH]}
        assert (only(read_annotations(coco(tmp_path, {"segmentation": segmentation}))) == mask).all()
    with pytest.raises(KdxError, match=r"damaged object in cat/1.jpg"):
        only(read_annotations(coco(tmp_path, {"segmentation": {"counts": [3], "size": [HEIGHT, WIDTH]}})))


VOC = """<annotation><filename>1.jpg</filename><size><width>31</width><height>20</height><depth>3</depth></size>
<object><name>cat</name><bndbox><xmin>6</xmin><ymin>4</ymin><xmax>13</xmax><ymax>11</ymax></bndbox></object>
<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object></annotation>"""


def test_voc(tmp_path: Path) -> None:
    (tmp_path / "1.xml").write_text(VOC)
    annotations = read_annotations(tmp_path)
    assert (only(annotations, "cat") == square(3, 5, 8)).all() and (only(annotations, "dog", None) == square(0, 0, 2)).all()
    (tmp_path / "1.xml").write_text(VOC.replace("<ymax>11</ymax>", ""))
    with pytest.raises(KdxError, match="it has no bndbox/ymax"):
        read_annotations(tmp_path)
    (tmp_path / "1.xml").write_text('<!DOCTYPE a [<!ENTITY b "b">]>' + VOC)
    with pytest.raises(KdxError, match="entities"):
        read_annotations(tmp_path)


@pytest.mark.parametrize(
    "segmentation",
    [{"size": [10**9, 10**9], "counts": [10**18]}, {"size": [4, 4], "counts": [10**18]}, {"counts": 3}, [["a", "b"]], "x", [[1e400] * 6]],
)
def test_a_damaged_object_takes_no_memory(segmentation: Any, tmp_path: Path) -> None:
    annotation = {"image_id": 1, "segmentation": segmentation}
    content = {"images": [{"id": 1, "file_name": "1.png", "height": 4, "width": 4}], "annotations": [annotation]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    with pytest.raises(KdxError, match="damaged object"), np.errstate(all="ignore"):
        next(iter(read_annotations(tmp_path / "coco.json").masks.values()))(None, "")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"images": [{"id": 1e999}], "annotations": []}',
        '{"images": []}',
        '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}',
    ],
)
def test_a_file_that_is_not_coco_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(KdxError, match=r"file.json is not a JSON file of COCO"):
        read_annotations(tmp_path / "file.json")


@pytest.mark.parametrize(
    ("masks", "images", "expected"),
    [
        (["cat/1.png"], ["cat/1.jpg", "dog/1.jpg"], {"cat/1.jpg": "cat/1.png"}),
        (["1.png", "2.png"], ["cat/1.jpg", "dog/2.jpg"], {"cat/1.jpg": "1.png", "dog/2.jpg": "2.png"}),
        (["cat/1.png"], ["test/cat/1.jpg"], {"test/cat/1.jpg": "cat/1.png"}),
        (["val2017/1.jpg"], ["1.jpg", "2.jpg"], {"1.jpg": "val2017/1.jpg"}),
        (["digits/0012.png"], ["digits/0012", "digits/001"], {"digits/0012": "digits/0012.png"}),
        (["v1.5.png"], ["v1.5", "v1.6"], {"v1.5": "v1.5.png"}),
        (["1.png"], ["cat/1.jpg", "dog/1.jpg"], "could be that of cat/1.jpg and of dog/1.jpg"),
        (["a/1.png", "b/1.png"], ["1.jpg"], "several masks: a/1.png, b/1.png"),
    ],
)
def test_masks_are_matched_by_name(masks: list[str], images: list[str], expected: dict[str, str] | str) -> None:
    annotations = Annotations("", {name: lambda size, class_name: None for name in masks})
    if isinstance(expected, str):
        with pytest.raises(KdxError, match=expected):
            annotations.match(images)
    else:
        assert annotations.match(images) == expected


def test_data_with_masks_of_their_own(tmp_path: Path) -> None:
    """The union of an image's objects, brought to the networks' size; an image without masks, and one that is cropped away, have none."""
    run = read_run(make_run(tmp_path / "run", images=4, gallery=0, size=(8, 16)))
    objects = {0: [square(1, 6, 3), square(12, 20, 4)], 1: [square(0, 0, 2)], 2: []}

    def masks(index: int) -> Any:
        return np.array(objects[index], dtype=bool).reshape(-1, HEIGHT, WIDTH) if index in objects else None

    data = Dataset("made", ("0", "1", "2"), run.samples.labels, tuple(run.samples.ids), {}, lambda index: Image.new("RGB", (1, 1)))
    assert mask_source(run, COVER, data, None) is None
    source = mask_source(run, COVER, replace(data, masks=masks), None)
    assert source is not None and source.places.tolist() == [0, 1, 2, 3]
    expected = transformed(objects[0][0] | objects[0][1], (8, 16), COVER)
    result = source.load(0)
    assert result is not None and (result == expected).all()
    assert [source.load(place) for place in (2, 3)] == [None, None]
    with pytest.raises(KdxError, match="None of the run's 4 images"):
        coco(tmp_path, {"bbox": [0, 0, 1, 1]})
        mask_source(run, COVER, data, tmp_path / "coco.json")
